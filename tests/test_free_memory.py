"""Free memory: containers' limits of both versions, and this process as it is."""

import pytest

from qwen.free_memory import container_room, read_free_memory

GB = 10**9


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_limit_of_version_2_leaves_what_is_not_used(tmp_path):
    write_group(tmp_path / "app", memory__max=4 * GB, memory__current=GB)
    assert container_room(tmp_path, "0::/app\n") == 3 * GB


def test_pages_of_files_count_as_free(tmp_path):
    stat = f"anon {GB}\ninactive_file {GB}\nactive_file {GB // 2}"
    write_group(tmp_path, memory__max=4 * GB, memory__current=3 * GB, memory__stat=stat)
    assert container_room(tmp_path, "0::/\n") == 2.5 * GB


def test_limit_of_version_1_is_read(tmp_path):
    write_group(
        tmp_path / "memory" / "app",
        memory__limit_in_bytes=2 * GB,
        memory__usage_in_bytes=GB,
        memory__stat=f"total_inactive_file {GB // 2}\ninactive_file 5",
    )
    assert container_room(tmp_path, "3:cpu:/\n4:cpuset,memory:/app\n0::/\n") == 1.5 * GB


def test_the_tightest_of_nested_groups_counts(tmp_path):
    write_group(tmp_path / "a", memory__max=2 * GB, memory__current=GB)
    write_group(tmp_path / "a/b", memory__max=9 * GB, memory__current=GB)
    assert container_room(tmp_path, "0::/a/b\n") == GB


def test_group_that_is_mounted_as_the_root_is_found(tmp_path):
    write_group(tmp_path, memory__max=2 * GB, memory__current=GB)
    assert container_room(tmp_path, "0::/some/outer/path\n") == GB


def test_used_up_limit_leaves_nothing_and_not_less(tmp_path):
    write_group(tmp_path, memory__max=GB, memory__current=2 * GB)
    assert container_room(tmp_path, "0::/\n") == 0


@pytest.mark.parametrize("membership", ["", "0::/\n", "nonsense", "4:memory:/x"])
@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "-5"])
def test_no_limit_is_none(tmp_path, membership, limit):
    write_group(tmp_path, memory__max=limit, memory__current=5)
    write_group(tmp_path / "memory/x", memory__limit_in_bytes=limit, memory__usage_in_bytes=5)
    assert container_room(tmp_path, membership) is None


def test_what_this_process_has_counts_as_free_for_it():
    free = read_free_memory()
    assert free.own > 10**6
    assert free.memory > free.own
    assert free.gpus == ()
    assert free.limited_by in ("computer", "container")

"""Preflight: what fits with given figures, what is said, the command line and the start."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import LocalHub, SilentServer
from test_memory_model import QWEN_7B
from tiny_checkpoint import CONTEXT, write_tiny_folder, write_tiny_gguf

from qwen.errors import CheckpointNotFound, DoesNotFit, HubUnreachable, OutOfMemory
from qwen.free_memory import FreeMemory
from qwen.load_options import LoadOptions
from qwen.local import load_backend
from qwen.memory_model import MemoryItem
from qwen.preflight import Wish, check_memory, check_start, main
from qwen.preflight_decision import Plan, decide
from qwen.preflight_text import advise, refusal, render_table

GB = 10**9
CPU = Plan(dtype="bfloat16", chunk=256)
GPU = replace(CPU, on_gpu=True)
NAME = "Qwen-7B-Chat"


def judge(memory=0, *, gpus=(), plan=CPU, shape=QWEN_7B, name=NAME, **options):
    free = FreeMemory(int(memory * GB), tuple(int(gpu * GB) for gpu in gpus))
    return decide(name, shape, plan=plan, free=free, **options)


# Decisions.


@pytest.mark.parametrize(
    ("memory", "verdict"), [(64, "fits"), (35, "tight"), (33, "too_large"), (8, "too_large")]
)
def test_verdict_on_a_cpu(memory, verdict):
    assert judge(memory).verdict == verdict  # 34.2 GB with a cache of 32,768 tokens


def test_whole_context_is_the_default_and_the_most():
    assert judge(64).context == judge(64, context=10**6).context == 32768
    assert judge(64, context=100).context == 100


@pytest.mark.parametrize(
    "plan", [CPU, replace(CPU, kv_cache="int8"), replace(CPU, dtype="float32")]
)
@given(st.integers(1, 120 * GB))
@settings(deadline=None)
def test_largest_context_fits_and_256_tokens_more_do_not(plan, size):
    def at(context):
        return decide(NAME, QWEN_7B, plan=plan, free=FreeMemory(size), context=context)

    largest = at(None).largest_context
    assert largest % 256 == 0
    assert not largest or at(largest).fits
    assert largest == 32768 or not at(largest + 256).fits


@given(st.integers(1, 60 * GB), st.integers(0, 60 * GB))
@settings(deadline=None)
def test_more_free_memory_never_fits_less(size, more):
    def largest(free):
        return decide(NAME, QWEN_7B, plan=CPU, free=FreeMemory(free)).largest_context

    assert largest(size) <= largest(size + more)


def test_one_gpu_with_room_is_enough():
    assert judge(8, gpus=[80], plan=GPU).verdict == "fits"
    assert judge(8, gpus=[80, 80], plan=GPU).room == 80 * GB


def test_gpu_with_room_for_weights_alone_gets_a_shorter_context():
    result = judge(64, gpus=[24], plan=GPU)
    assert not result.fits
    assert 8192 < result.largest_context < 32768


def test_several_gpus_are_summed_where_one_is_too_small():
    result = judge(8, gpus=[16, 16], plan=GPU, context=4096)
    assert (result.verdict, result.room) == ("fits", 32 * GB)


def test_asking_for_one_gpu_leaves_the_others_out():
    result = judge(0, gpus=[16, 16], plan=replace(GPU, num_gpus=1), context=4096)
    assert result.verdict == "too_large"


def test_weights_that_wait_in_memory_are_slow():
    result = judge(64, gpus=[12], plan=GPU, context=2048)
    assert result.verdict == "slow"
    assert "brought for every token" in render_table(result)


def test_weights_that_fit_nowhere_do_not_fit_unless_they_may_wait_on_disk():
    assert judge(2, gpus=[12], plan=GPU, context=2048).verdict == "too_large"
    on_disk = replace(GPU, can_offload=True)
    assert judge(2, gpus=[12], plan=on_disk, context=2048).verdict == "slow"
    assert judge(4, plan=replace(CPU, can_offload=True), context=2048).verdict == "slow"


# Words.


def test_table_has_every_row_and_both_sums():
    result = judge(64, further=(MemoryItem("weights: int8 copies", 10**9, "weights"),))
    table = render_table(result)
    for row in result.estimate.rows:
        assert row.name in table
    assert f"{result.estimate.needed / 1e9:.2f} GB" in table
    assert "64.00 GB" in table
    assert "Largest context that fits: 32,768 of 32,768" in table


def test_container_limit_is_named():
    free = FreeMemory(64 * GB, limited_by="container")
    assert "container's limit" in render_table(decide(NAME, QWEN_7B, plan=CPU, free=free))


def test_what_fits_in_whole_gets_no_advice():
    assert advise(judge(64)) == ()


def test_shorter_context_and_int8_cache_are_offered_with_their_figures():
    result = judge(24)
    shorter, int8, int4 = advise(result)
    assert f"{result.largest_context:,} tokens" in shorter
    with_int8 = judge(24, plan=replace(CPU, kv_cache="int8")).largest_context
    assert f"--kv-cache int8 makes room for {with_int8:,} tokens" in int8
    assert "Qwen/Qwen-7B-Chat-Int4" in int4


def test_int4_sibling_is_offered_with_what_it_needs():
    (advice,) = [line for line in advise(judge(14, context=2048)) if "Int4" in line]
    assert advice.startswith("Qwen/Qwen-7B-Chat-Int4 needs 7.")
    assert advice.endswith("and would fit.")


@pytest.mark.parametrize("name", ["Qwen-7B", "Qwen-7B-Chat-Int4", "mine", "Qwen2.5-7B"])
def test_names_that_are_not_published_are_never_offered(name):
    assert not any("Int4" in line for line in advise(judge(14, name=name)))


def test_int4_checkpoint_is_not_offered_itself():
    packed = replace(QWEN_7B, bits=4)
    assert not any("Int4" in line for line in advise(judge(7, shape=packed)))


def test_half_the_precision_is_offered_where_it_helps():
    lines = advise(judge(24, plan=replace(CPU, dtype="float32"), context=2048))
    assert any("--dtype bfloat16 needs 17." in line and "would fit" in line for line in lines)
    assert not any("--dtype bfloat16 needs" in line for line in advise(judge(14)))


def test_the_computers_memory_is_offered_to_who_has_too_small_a_gpu():
    lines = advise(judge(64, gpus=[1], plan=replace(GPU, num_gpus=1), context=8192))
    assert any("--cpu-only" in line for line in lines)


def test_refusal_says_what_is_missing_what_fits_and_how_to_insist():
    text = refusal(judge(3))
    for part in (
        "Qwen-7B-Chat does not fit",
        "3.00 GB are free",
        "weights 15.4",
        "cache for 32,768",
    ):
        assert part in text
    assert "-c auto" in text
    assert "--skip-preflight" in text


# From names.


@pytest.fixture
def folder(tmp_path):
    return write_tiny_folder(tmp_path / "tiny")


def test_folder_is_checked_with_given_figures(folder):
    result = check_memory(str(folder), Wish(dtype="float32"), free=FreeMemory(GB))
    assert result.name == "tiny"
    assert result.fits
    assert result.context == CONTEXT


def test_gguf_file_counts_what_unpacking_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "mine.gguf")
    result = check_memory(str(path), Wish(dtype="float32"), free=FreeMemory(GB))
    assert any("unpacking" in row.name for row in result.estimate.rows)
    assert not (tmp_path / "cache").exists()


def test_embedded_model_is_known_before_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path / "cache"))
    result = check_memory("auto", Wish(device="cpu", dtype="bfloat16"), free=FreeMemory(4 * GB))
    assert result.shape.parameters == 630_167_424
    assert result.fits
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield running


def test_of_a_hub_only_config_json_is_fetched(hub, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repository("me/tiny", files)
    result = check_memory("me/tiny", Wish(dtype="float32"), free=FreeMemory(GB))
    assert (
        result.shape.parameters
        == check_memory(str(folder), Wish(dtype="float32"), free=FreeMemory(GB)).shape.parameters
    )
    fetched = {path for verb, path, _ in hub.requests if verb == "GET"}
    assert {path.rsplit("/", 1)[-1] for path in fetched} == {"config.json"}


def test_name_that_no_hub_has_is_named(hub):
    with pytest.raises(CheckpointNotFound, match="me/nothing"):
        check_memory("me/nothing", Wish(), free=FreeMemory(GB))


def test_silent_hub_is_named_and_does_not_stop_a_start(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("qwen.checkpoint_shape.PROBE_SECONDS", 0.2)
    with SilentServer() as silent:
        monkeypatch.setenv("HF_ENDPOINT", silent.url)
        with pytest.raises(HubUnreachable):
            check_memory("me/tiny", Wish(), free=FreeMemory(GB))
        assert check_start("me/tiny", Wish(), free=FreeMemory(GB)).memory is None
        assert main(["me/tiny"]) == 3


# The start.


def need(folder, context):
    wish = Wish(device="cpu", dtype="float32")
    free = FreeMemory(10 * GB)
    return check_memory(str(folder), wish, context=context, free=free).estimate.needed


@pytest.fixture
def long_folder(folder):
    """A tiny model that says that it can read a million tokens."""
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_fits_starts_with_its_whole_context(folder):
    said = []
    checked = check_start(
        str(folder), Wish(device="cpu"), free=FreeMemory(GB), report=lambda step: said.append(step)
    )
    assert (checked.context_limit, checked.notices) == (None, ())
    assert checked.memory.context == CONTEXT
    assert checked.memory.free == GB
    assert len(said) == 1
    assert "Memory: " in said[0]


def test_start_refuses_what_does_not_fit_and_says_so(folder):
    with pytest.raises(DoesNotFit, match="tiny does not fit") as refused:
        check_start(str(folder), Wish(device="cpu"), free=FreeMemory(10**6))
    assert isinstance(refused.value, OutOfMemory)


def test_user_who_insists_is_not_locked_out(folder):
    checked = check_start(str(folder), Wish(device="cpu"), enforce=False, free=FreeMemory(10**6))
    assert checked.context_limit is None
    assert checked.memory.free == 10**6


def test_context_is_shortened_with_a_notice_where_only_that_does_not_fit(long_folder):
    wish = Wish(device="cpu", dtype="float32")
    free = FreeMemory(need(long_folder, 4096))
    checked = check_start(str(long_folder), wish, free=free)
    assert checked.context_limit == checked.memory.context == 4096
    (notice,) = checked.notices
    assert "limited to 4,096 of 1,000,000 tokens" in notice
    assert check_start(str(long_folder), wish, enforce=False, free=free).context_limit is None


def test_too_short_a_context_is_refused(long_folder):
    free = FreeMemory(need(long_folder, 1023))
    with pytest.raises(DoesNotFit, match="768 tokens of prompt and reply"):
        check_start(str(long_folder), Wish(device="cpu", dtype="float32"), free=free)


def test_damaged_checkpoint_is_left_to_loading(folder):
    (folder / "config.json").write_text("{}")
    assert check_start(str(folder), Wish(), free=FreeMemory(GB)).memory is None


def test_backend_has_the_shorter_context_and_tells_of_memory(long_folder, monkeypatch):
    wish = Wish(device="cpu", dtype="float32")
    free = FreeMemory(need(long_folder, 4096))
    checked = check_start(str(long_folder), wish, free=free)
    monkeypatch.setattr("qwen.preflight.check_start", lambda *args, **options: checked)
    backend = load_backend(str(long_folder), LoadOptions(device="cpu", dtype="float32"))
    assert backend.info.context_length == 4096
    assert backend.info.memory == checked.memory
    assert checked.notices[0] in backend.info.notices
    backend.close()


def test_backend_is_refused_before_any_weight_is_read(folder, monkeypatch):
    from qwen import preflight

    free = FreeMemory(10**6)
    monkeypatch.setattr(preflight, "read_free_memory", lambda **options: free)
    monkeypatch.setattr("qwen.loading.load_model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(DoesNotFit):
        load_backend(str(folder), LoadOptions(device="cpu"))


def test_backend_that_is_insisted_on_is_loaded(folder, monkeypatch):
    from qwen import preflight

    monkeypatch.setattr(preflight, "read_free_memory", lambda **options: FreeMemory(10**6))
    backend = load_backend(str(folder), LoadOptions(device="cpu", skip_preflight=True))
    assert backend.info.context_length == CONTEXT
    backend.close()


# The command line.


def test_command_says_that_it_fits(folder, capsys):
    assert main([str(folder), "--free", "4", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "tiny · CPU · float32 · 128 tokens" in out
    assert "128 tokens: fits." in out


def test_command_says_that_it_does_not_fit(folder, capsys):
    assert main([str(folder), "--free", "0.001"]) == 1
    assert "No context fits" in capsys.readouterr().out


def test_command_looks_at_this_machine(folder, capsys):
    assert main([str(folder), "--cpu-only", "--kv-cache", "int8"]) == 0
    assert "cache in int8" in capsys.readouterr().out


def test_json_has_the_figures(folder, capsys):
    main([str(folder), "--free", "4", "--json", "--context", "64", "--dtype", "bfloat16"])
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["context"], found["largest_context"]) == ("fits", 64, 128)
    assert found["needed"] <= found["free"] == 4 * GB
    assert sum(row["size"] for row in found["rows"]) >= found["needed"]


@pytest.mark.parametrize(
    "argv",
    [
        ["auto", "--context", "0"],
        ["auto", "--context", "many"],
        ["auto", "--free", "-1"],
        ["auto", "--free", "nan"],
        ["auto", "--free", "inf"],
        ["auto", "--dtype", "int3"],
        [],
    ],
)
def test_bad_argument_ends_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_gpus_that_are_not_there_end_with_code_2(folder, capsys):
    assert main([str(folder), "--num-gpus", "99"]) == 2
    assert "99 GPUs" in capsys.readouterr().err


def test_name_of_nothing_ends_with_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "There is no folder" in capsys.readouterr().err

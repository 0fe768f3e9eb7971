import pytest
import torch

from qwen.kv_store import BLOCK, KvStore


def build(**options):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 4}
    return KvStore(**sizes | {"dtype": torch.float32, "device": torch.device("cpu")} | options)


def write(store, length):
    store.reserve(length)
    for layer in range(3):
        for number, part in enumerate(store.layer(layer)):
            for position in range(store.length, length):
                part[:, position] = 100_000 * layer + 10_000 * number + position
    store.length = length


def assert_written(store, length):
    for layer in range(3):
        for number, part in enumerate(store.layer(layer)):
            wanted = 100_000.0 * layer + 10_000 * number + torch.arange(length)
            assert torch.equal(part[:, :length], wanted[None, :, None].expand(2, -1, 4))


def test_growing_keeps_what_was_written():
    store = build()
    for length in (1, BLOCK, BLOCK + 1, 5 * BLOCK):
        write(store, length)
        assert_written(store, length)


def test_room_doubles_so_that_a_token_costs_no_copy():
    store, copies = build(), 0
    for length in range(1, 8 * BLOCK + 1):
        before = store.layer(0)[0].data_ptr()
        store.reserve(length)
        store.length = length
        copies += store.layer(0)[0].data_ptr() != before
    assert copies == 3


def test_truncated_store_keeps_its_room_and_is_written_again():
    store = build()
    write(store, 300)
    room = store.nbytes
    store.truncate(7)
    assert (store.length, store.nbytes) == (7, room)
    write(store, 40)
    assert_written(store, 40)


def test_store_never_grows_beyond_its_bound():
    store = build(max_capacity=300)
    store.reserve(300)
    assert store.capacity == 304  # whole blocks of the kernels
    with pytest.raises(ValueError, match="301"):
        store.reserve(301)


def test_bytes_are_those_of_all_room():
    assert build(capacity=10).nbytes == 2 * 3 * 2 * BLOCK * 4 * 4

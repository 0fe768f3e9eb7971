import pytest
import torch

from qwen.kv_slots import KvSlots

SIZES = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float32}


def build(**options):
    return KvSlots(**SIZES, device=torch.device("cpu"), **{"capacity": 256} | options)


def fill(slot, length, value):
    slot.reserve(length)
    for layer in range(2):
        for part in slot.layer(layer):
            part[:, :length] = value
    slot.length = length


def values(slot):
    parts = [part[:, : slot.length] for layer in range(2) for part in slot.layer(layer)]
    return torch.cat(parts).unique().tolist()


def test_sequences_keep_their_values_while_slots_and_room_grow():
    slots = build()
    taken = [slots.take(10) for _ in range(5)]
    for number, slot in enumerate(taken, start=1):
        fill(slot, 100 * number, float(number))
    assert [values(slot) for slot in taken] == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    assert slots.capacity >= 500 and slots.data.shape[2] == 8


def test_room_doubles_but_not_beyond_what_is_expected_of_any():
    slots = build()
    first, second = slots.take(10), slots.take(10)
    first.expected, second.expected = 300, 700
    first.reserve(257)
    assert slots.capacity == 512
    second.reserve(513)
    assert slots.capacity == 768
    second.reserve(900)  # more than it had said
    assert slots.capacity == 1024


def test_last_sequence_moves_into_the_gap_and_nothing_is_left_behind():
    slots = build()
    taken = [slots.take(10) for _ in range(3)]
    for number, slot in enumerate(taken, start=1):
        fill(slot, 20, float(number))
    slots.release(taken[0])
    assert [slot.index for slot in (taken[2], taken[1])] == [0, 1]
    assert [values(slot) for slot in (taken[2], taken[1])] == [[3.0], [2.0]]
    assert slots.used == (taken[2], taken[1])
    assert not slots.data[:, :, 2].any()


def test_nan_of_a_sequence_does_not_stay_in_its_slot():
    slots = build()
    slot = slots.take(10)
    fill(slot, 20, float("nan"))
    slots.release(slot)
    assert not slots.take(10).layer(0)[0].isnan().any()


def test_copy_out_of_a_slot_and_into_one():
    slots = build()
    slot = slots.take(10)
    fill(slot, 30, 7.0)
    other = slots.take(10)
    other.assign(slot.copy(), 12)
    assert (other.length, values(other)) == (12, [7.0])


def test_slots_do_not_grow_beyond_the_context():
    slots = build(max_capacity=300)
    slot = slots.take(300)
    assert slots.capacity == 304  # whole blocks, as a store has them
    with pytest.raises(ValueError, match="300"):
        slot.reserve(301)

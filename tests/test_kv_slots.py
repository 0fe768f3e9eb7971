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


def test_room_that_a_long_sequence_needed_is_given_back_when_others_come():
    slots = build()
    long = slots.take(10)
    fill(long, 2000, 1.0)
    short = slots.take(10)
    short.expected = 300
    fill(short, 20, 2.0)
    slots.release(long)
    assert slots.capacity >= 2000
    slots.take(10).expected = 100
    slots.take(10)
    assert slots.data.shape[2:5:2] == (4, 512)
    assert values(short) == [2.0]


def test_sequence_longer_than_it_said_keeps_its_room():
    slots = build()
    long = slots.take(10)
    fill(long, 512, 1.0)
    long.expected = 100
    slots.take(10)
    assert slots.capacity > 512 and values(long) == [1.0]


def test_slots_that_nobody_has_are_given_back_when_one_needs_room():
    slots = build()
    *others, last = [slots.take(10) for _ in range(9)]
    fill(last, 20, 3.0)
    for slot in others:
        slots.release(slot)
    assert slots.data.shape[2] == 16
    last.reserve(257)
    assert slots.data.shape[2] == 1 and values(last) == [3.0]


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

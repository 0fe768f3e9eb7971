import math
from dataclasses import FrozenInstanceError

import pytest

from qwen.errors import InvalidSetting
from qwen.messages import (
    SAMPLING_RANGES,
    ContextUsage,
    Message,
    SamplingParams,
    checked_number,
)


def test_default_settings_lie_within_their_ranges():
    assert SamplingParams().temperature == 0.7


@pytest.mark.parametrize("name", sorted(SAMPLING_RANGES))
def test_both_ends_of_every_range_are_allowed(name):
    allowed = SAMPLING_RANGES[name]
    for value in (allowed.low, allowed.high):
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", sorted(SAMPLING_RANGES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True, [1], -1, 1e300])
def test_wrong_values_are_refused_by_name(name, value):
    if name in ("seed", "top_logprobs") and value is None:
        assert getattr(SamplingParams(**{name: None}), name) is None
        return
    with pytest.raises(InvalidSetting, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "max_new_tokens", "seed"])
def test_whole_numbers_are_wanted_where_things_are_counted(name):
    with pytest.raises(InvalidSetting, match="whole number"):
        SamplingParams(**{name: 1.5})


def test_whole_number_given_as_a_float_becomes_an_int():
    # Sliders and JSON send 20.0.
    value = SamplingParams(top_k=20.0).top_k
    assert (value, type(value)) == (20, int)


def test_number_given_as_an_int_becomes_a_float():
    assert type(checked_number("temperature", 1)) is float


def test_refusal_tells_the_range():
    with pytest.raises(InvalidSetting, match=r"temperature must be a number from 0 to 2; 3 is not"):
        SamplingParams(temperature=3)


@pytest.mark.parametrize("stop", ["text", ["a"], ("",), (1,), None])
def test_stop_must_be_a_tuple_of_texts(stop):
    with pytest.raises(InvalidSetting, match="stop"):
        SamplingParams(stop=stop)


def test_values_are_immutable():
    with pytest.raises(FrozenInstanceError):
        Message("user", "a").content = "b"


def test_context_usage_adds_up():
    usage = ContextUsage(system=1, history=2, query=3, limit=10)
    assert (usage.prompt, usage.left) == (6, 4)
    assert ContextUsage(system=1, history=2, query=30, limit=10).left == 0

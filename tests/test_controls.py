"""Settings from the page: checked before they become a request, stored and read back."""

import json
import math

import pytest

from qwen.errors import InvalidSetting
from qwen.messages import Message, SamplingParams
from webapp.controls import (
    CONTROLS,
    STORED_SYSTEM_CHARACTERS,
    control_values,
    restored_controls,
    sampling_params,
    stored_form,
    system_messages,
)
from webapp.conversation import Conversation

DEFAULTS = control_values("Be brief.", SamplingParams())


def controls(**change):
    return tuple((dict(zip(CONTROLS, DEFAULTS, strict=True)) | change).values())


def test_settings_read_back_as_the_parameters_they_came_from():
    params = SamplingParams(temperature=0.1, top_k=3, seed=9, max_new_tokens=17)
    assert sampling_params(control_values("", params)) == params


def test_order_of_the_values_is_the_order_of_the_names():
    assert dict(zip(CONTROLS, DEFAULTS, strict=True)) == {
        "system_prompt": "Be brief.",
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_new_tokens": 1024,
        "seed": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 99),
        ("temperature", "abc"),
        ("temperature", None),
        ("temperature", math.nan),
        ("temperature", [0.5]),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", 1.5),
        ("repetition_penalty", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", math.inf),
        ("seed", -1),
        ("seed", {}),
    ],
)
def test_wrong_sampling_value_is_refused_by_name(name, value):
    with pytest.raises(InvalidSetting, match=name):
        sampling_params(controls(**{name: value}))


def test_empty_system_prompt_is_no_message():
    assert system_messages(controls(system_prompt=" \n")) == ()
    assert system_messages(DEFAULTS) == (Message("system", "Be brief."),)


@pytest.mark.parametrize("value", [None, 5, ["You are root."], {"role": "system"}])
def test_system_prompt_that_is_no_text_is_refused(value):
    with pytest.raises(InvalidSetting):
        system_messages(controls(system_prompt=value))


def test_stored_settings_read_back_through_json():
    chosen = controls(temperature=0.25, seed=None, system_prompt="你好")
    stored = json.loads(json.dumps(stored_form(Conversation(), chosen)))
    assert restored_controls(stored["controls"], DEFAULTS) == chosen


@pytest.mark.parametrize("stored", [None, [], "x", {"temperature": 99, "seed": "x", "top_k": None}])
def test_forged_settings_take_their_defaults(stored):
    assert restored_controls(stored, DEFAULTS) == DEFAULTS


def test_one_wrong_stored_setting_does_not_lose_the_others():
    read = restored_controls({"temperature": "hot", "top_k": 5, "system_prompt": 1}, DEFAULTS)
    assert read == controls(top_k=5)


@pytest.mark.parametrize("value", [2**70, math.nan, object(), "x" * 10])
def test_wrong_setting_is_not_stored(value):
    stored = stored_form(Conversation(), controls(seed=value, top_k=5))["controls"]
    assert "seed" not in stored
    assert stored["top_k"] == 5


def test_system_prompt_that_would_fill_the_browsers_storage_is_not_stored():
    values = control_values("x" * (STORED_SYSTEM_CHARACTERS + 1), SamplingParams())
    assert "system_prompt" not in stored_form(Conversation(), values)["controls"]

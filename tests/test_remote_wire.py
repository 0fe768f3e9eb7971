"""What an engine sends is read or refused, whatever it is; what flags and model lists say."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen.errors import EngineFailed, QwenError
from qwen.load_options import add_load_arguments, given_for_a_model_here
from qwen.messages import TokenLogprobs
from qwen.remote_counting import estimate_tokens
from qwen.remote_engines import choose_models
from qwen.remote_options import RemoteOptions, add_remote_arguments, read_remote_options
from qwen.remote_wire import parse_chunk

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "choices",
        "delta",
        "content",
        "text",
        "reasoning",
        "tool_calls",
        "function",
        "index",
        "id",
        "logprobs",
        "top_logprobs",
        "tokens",
        "token_logprobs",
        "bytes",
        "finish_reason",
        "usage",
        "prompt_tokens",
        "completion_tokens",
        "name",
        "arguments",
        "token",
        "logprob",
    ]
)
#: JSON that looks like a chunk until one looks closer.
NEARLY = st.recursive(
    JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=30,
)


@given(NEARLY)
@example({"choices": [{"delta": {"content": "\ud800"}}]})
@example({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [0], "top_logprobs": [1]}}]})
@example({"choices": [{"logprobs": {"content": [{"top_logprobs": 5}]}}]})
@example({"choices": [], "usage": {"prompt_tokens": -1}})
def test_any_json_is_read_or_refused(data):
    try:
        chunk = parse_chunk(data)
    except EngineFailed:
        return
    (chunk.text + chunk.reasoning).encode()
    assert all(isinstance(found, TokenLogprobs) for found in chunk.logprobs)


@given(NEARLY, st.text(max_size=3))
def test_any_model_list_is_read_or_refused(data, wanted):
    try:
        models = choose_models(data, wanted)
    except QwenError:
        return
    assert all(m.id and m.name and m.context_length >= 0 for m in models)
    assert not wanted or wanted in (models[0].id, models[0].name)
    assert len({model.name for model in models}) == len(models)


def test_the_older_form_of_log_probabilities_is_read():
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -2}]}
    chunk = parse_chunk({"choices": [{"text": "a", "logprobs": logprobs, "finish_reason": None}]})
    assert chunk.logprobs == (TokenLogprobs(b"a", -0.5, ((b"a", -0.5), (b"b", -2.0))),)


def read(*argv: str, **environ: str) -> RemoteOptions | None:
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    add_remote_arguments(parser)
    return read_remote_options(parser, parser.parse_args(argv), environ)


def test_without_the_flag_the_model_is_here():
    assert read() is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--cpu-only"],
        ["--dtype", "float32"],
        ["--num-gpus", "2"],
        ["--offload-folder", "x"],
        ["--kv-cache", "int8"],
        ["--ntk-policy", "grow"],
        ["--skip-preflight"],
        ["--max-running", "4", "--max-waiting", "9"],
        ["--cache-mb", "100"],
        ["--strict-reproducible"],
    ],
)
def test_flags_that_an_engine_would_not_know_of_are_refused_by_name(flags, capsys):
    assert read(*flags) is None
    with pytest.raises(SystemExit):
        read("--base-url", "http://h/v1", *flags)
    told = capsys.readouterr().err.split("error:")[1]
    assert all(flag in told for flag in flags if flag.startswith("--")) and "no effect" in told


def test_every_flag_of_a_model_here_is_refused_or_honoured_before_an_engine():
    parser = argparse.ArgumentParser(add_help=False)
    add_load_arguments(parser)
    known = {action.dest for action in parser._actions}
    given = argparse.Namespace(**dict.fromkeys(known, "given"))
    refused = {f[2:].replace("-", "_") for f in given_for_a_model_here(parser, given)}
    assert known - refused == {"checkpoint_path", "max_input_tokens"}


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
    ],
)
def test_the_address_gets_its_usual_end(given_url, url):
    assert read("--base-url", given_url) == RemoteOptions(url)


def test_the_key_comes_from_the_named_variable_and_is_not_printed():
    options = read("--base-url", "http://h/v1", "--api-key-env", "MY_KEY", MY_KEY=" sk-1 ")
    assert options is not None and options.api_key == "sk-1"
    assert "sk-1" not in repr(options)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--base-url", "h:8000"], "address"),
        (["--base-url", "http://"], "address"),
        (["--base-url", "http://h:99999/v1"], "address"),
        (["--base-url", "http://me:secret@h/v1"], "no password"),
        (["--base-url", "http://h/v1", "-c", "auto"], "contradict"),
        (["--base-url", "http://h/v1", "--api-key-env", "UNSET"], "UNSET is not set"),
        (["--base-url", "http://h/v1", "--api-key-env", "sk-secret"], "not the key itself"),
        (["--api-key-env", "X"], "add --base-url"),
        (["--model", "m"], "add --base-url"),
    ],
)
def test_wrong_flags_end_with_a_reason_and_without_the_secret(argv, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert reason in told and "secret" not in told


@pytest.mark.parametrize(
    ("text", "tokens"),  # as the tokenizer of Qwen2.5 counts
    [
        ("The quick brown fox jumps over the lazy dog. " * 10, 101),
        ("def add(a, b):\n    return a + b\n" * 10, 120),
        ("今天天气很好，我们去公园散步吧。" * 10, 100),
    ],
)
def test_estimates_are_near(text, tokens):
    assert 0.7 * tokens <= estimate_tokens(text) <= 1.4 * tokens

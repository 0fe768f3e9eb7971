"""Log-probabilities come with the text that they stand behind, and never tell what is held back."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import build_byte_tokenizer

from qwen.backend import BackendInfo
from qwen.engine import EngineStep
from qwen.local import LocalBackend
from qwen.messages import ChatRequest, SamplingParams, TokenLogprobs
from qwen.text_stream import stream_until_stop, stream_utf8
from qwen.token_log import TokenLog
from qwen.tokenizer import build_text_tokenizer


class ScriptedEngine:
    """Says these ids, the n-th with log-probability -n."""

    def __init__(self, ids):
        self.ids = ids

    def submit(self, ids, params, *, cancel):
        def steps():
            for place, token_id in enumerate(self.ids):
                yield EngineStep(
                    token_id=token_id,
                    logprob=-float(place),
                    top_logprobs=((token_id, -float(place)), (0, -9.0))[: params.top_logprobs],
                )
            yield EngineStep(finish_reason="length")

        return steps()

    def close(self):
        pass


@pytest.fixture
def events():
    texts = build_text_tokenizer(build_byte_tokenizer())

    def run(text, **params):
        engine = ScriptedEngine(texts.encode_text(text))
        info = BackendInfo(name="Tiny", context_length=1000, is_chat=False)
        backend = LocalBackend(engine, texts, chat_format=None, info=info)
        request = ChatRequest(raw_prompt="x", params=SamplingParams(**params))
        return list(backend.stream(request, threading.Event()))

    return run


def shown(events):
    return [(event.text, b"".join(one.token for one in event.logprobs)) for event in events[1:-1]]


def test_each_token_has_its_bytes_its_logprob_and_the_likeliest(events):
    got = events("ab", top_logprobs=2)
    assert [one.logprob for event in got for one in event.logprobs] == [0.0, -1.0]
    assert got[2].logprobs[0].top[0] == (b"b", -1.0)
    assert len(got[2].logprobs[0].top) == 2
    assert [len(event.token_ids) for event in got] == [len(event.logprobs) for event in got]


def test_without_top_logprobs_none_are_told(events):
    assert not any(event.logprobs for event in events("ab"))


def test_tokens_of_one_character_come_with_the_character(events):
    assert shown(events("a😀b", top_logprobs=0)) == [
        ("a", b"a"),
        ("", b""),
        ("", b""),
        ("", b""),
        ("😀", "😀".encode()),
        ("b", b"b"),
    ]


def test_tokens_of_a_stop_string_are_never_told(events):
    got = events("ab<end>cd", top_logprobs=0, stop=("<end>",))
    assert b"".join(part for _, part in shown(got)) == b"ab"


def test_tokens_of_what_only_looked_like_a_stop_string_come_with_its_text(events):
    got = shown(events("a<en.", top_logprobs=0, stop=("<end>",)))
    assert got == [("a", b"a"), ("", b""), ("", b""), ("", b""), ("<en.", b"<en.")]


def test_tokens_held_back_at_the_end_are_told_at_the_end(events):
    assert b"".join(part for _, part in shown(events("a<en", top_logprobs=0, stop=("<end>",)))) == (
        b"a<en"
    )


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_told_bytes_are_those_of_the_shown_text(text, stops):
    log = TokenLog()

    def chunks():
        for byte in text.encode():
            log.add(byte, TokenLogprobs(bytes([byte]), 0.0))
            yield bytes([byte])

    told, said = b"", ""
    for piece in stream_until_stop(log.count(stream_utf8(chunks())), stops):
        said += piece
        told += b"".join(token.logprobs.token for token in log.show(piece))
    assert told.decode() == said

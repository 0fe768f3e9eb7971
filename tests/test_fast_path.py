"""The fast path on the real model: what it loses, and that what it keeps changes nothing."""

import threading

import pytest

from qwen.engine import Engine
from qwen.evals import fast_path
from qwen.messages import SamplingParams

pytestmark = pytest.mark.integration


def test_perplexity_is_within_one_percent_of_float32_in_both_forms(monkeypatch):
    monkeypatch.setattr(fast_path, "_TOKENS", 320)
    # Of the first 96 tokens alone, either form loses 1.3 %: too few to tell.
    monkeypatch.setattr(fast_path, "_ONE_BY_ONE", 320)
    forms = {name: ours / exact for name, ours, exact in fast_path.fast_path_perplexities("auto")}
    assert set(forms) == {"prefill", "decode"}
    assert all(ratio <= 1.01 for ratio in forms.values()), forms


def test_conversation_on_kept_tokens_is_that_on_none_token_for_token():
    model, decoder = fast_path.load_fast("auto")
    params = SamplingParams(temperature=0, max_new_tokens=16)

    def converse(prefix_bytes):
        engine = Engine(
            model,
            eos_token_ids=(),
            context_length=2048,
            decoder=decoder,
            prefix_bytes=prefix_bytes,
        )
        ids, replies = list(range(1000, 1300)), []
        for turn in range(3):
            steps = engine.submit(ids, params, cancel=threading.Event())
            replies.append([step.token_id for step in steps if step.token_id is not None])
            ids = [*ids, *replies[-1], 5000 + turn, 6000 + turn]
        return replies

    assert converse(2**28) == converse(0)

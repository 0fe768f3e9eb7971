"""The openings that a dense model writes from: what they are about, and in which form."""

from __future__ import annotations

import pytest
from tiny_model import CHATML_TEMPLATE, build_byte_tokenizer

from qwen import tuning_prompts
from qwen.errors import CheckpointDamaged
from qwen.tokenizer import build_chat_format, build_text_tokenizer
from qwen.tuning_prompts import build_prompts


def texts_of(count=300, seed=0, **options):
    tokenizer = build_byte_tokenizer(**options)
    ours, chat_format = build_text_tokenizer(tokenizer), build_chat_format(tokenizer)
    prompts = build_prompts(ours, chat_format, count=count, seed=seed)
    return [tokenizer.decode(prompt) for prompt in prompts], prompts, ours


def test_prompts_are_of_many_topics_in_english_chinese_and_code():
    texts, _, _ = texts_of()
    assert len(texts) == 300
    assert len(set(texts)) > 200
    assert sum("请以" in text for text in texts) > 30
    assert sum("Write " in text and " about " in text for text in texts) > 30
    assert sum("Write " in text and " in " in text and ": " in text for text in texts) > 30
    assert any("in French." in text or "in German." in text for text in texts)


def test_half_are_requests_that_the_assistant_is_about_to_answer():
    texts, prompts, ours = texts_of()
    opening = ours.control_ids["<|im_start|>"]
    asked = [text for text, prompt in zip(texts, prompts, strict=True) if opening in prompt]
    assert 0.4 * len(texts) < len(asked) < 0.6 * len(texts)
    assert all(text.endswith("<|im_start|>assistant\n") for text in asked)


def test_base_model_gets_plain_beginnings_only():
    texts, prompts, _ = texts_of(chat_template=None)
    assert not any("<|im_start|>" in text for text in texts)
    assert all(prompts)


def test_format_that_refuses_gets_plain_beginnings():
    template = CHATML_TEMPLATE.replace("{%- for", "{{- raise_exception('no') }}{%- for")
    texts, prompts, _ = texts_of(chat_template=template)
    assert not any("<|im_start|>" in text for text in texts)
    assert all(prompts)


def test_prompts_are_the_same_every_time_and_others_for_another_seed():
    assert texts_of(count=30)[0] == texts_of(count=30)[0] != texts_of(count=30, seed=1)[0]


def test_lists_that_are_missing_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning_prompts, "_LISTS", tmp_path / "none.json")
    with pytest.raises(CheckpointDamaged, match="--calibration"):
        texts_of(count=1)

"""The text that a quantiser reads: where it is from, and what is refused."""

from __future__ import annotations

import sys

import pytest
from tiny_model import CHATML_TEMPLATE, build_byte_tokenizer

from qwen import calibration
from qwen.calibration import build_calibration
from qwen.errors import InvalidRequest, InvalidSetting
from qwen.tokenizer import build_chat_format, build_text_tokenizer


def build(tokenizer=None, **options):
    tokenizer = tokenizer or build_byte_tokenizer()
    options = {"samples": 6, "sequence_length": 512, "vocabulary": 300} | options
    return build_calibration(
        build_text_tokenizer(tokenizer), build_chat_format(tokenizer), **options
    )


def texts_of(calibration, tokenizer):
    return [tokenizer.decode(row) for row in calibration.ids]


def test_default_text_has_prose_code_chinese_and_conversations():
    tokenizer = build_byte_tokenizer()
    texts = texts_of(build(tokenizer, samples=30), tokenizer)
    assert sum("The" in text for text in texts) > 5
    assert sum("self." in text or "def " in text for text in texts) > 1
    assert sum("，" in text or "的" in text for text in texts) > 5
    assert any("<|im_start|>assistant" in text for text in texts)


def test_conversations_have_the_control_tokens_of_the_model_and_not_their_letters():
    tokenizer = build_byte_tokenizer()
    control = build_text_tokenizer(tokenizer).control_ids["<|im_start|>"]
    assert (build(tokenizer, samples=30).ids == control).any()


def test_base_model_reads_no_conversations():
    tokenizer = build_byte_tokenizer(chat_template=None)
    assert "<|im_start|>" not in "".join(texts_of(build(tokenizer, samples=30), tokenizer))


def test_template_that_knows_no_system_still_gives_the_other_text():
    tokenizer = build_byte_tokenizer(
        CHATML_TEMPLATE.replace("{%- for", "{{- raise_exception('no') }}{%- for")
    )
    assert build(tokenizer, samples=12).ids.shape == (12, 512)


def test_default_text_is_the_same_every_time():
    assert build().fingerprint == build().fingerprint
    assert build().fingerprint != build(samples=5).fingerprint
    assert build().fingerprint != build(samples=12, sequence_length=256).fingerprint


def test_rows_differ():
    rows = build(samples=40).ids.tolist()
    assert len({tuple(row) for row in rows}) == 40


def test_own_text_is_read_from_its_beginning(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("hello Wörld 你好 " * 100, encoding="utf-8")
    tokenizer = build_byte_tokenizer()
    texts = texts_of(build(tokenizer, file=file, samples=2, sequence_length=64), tokenizer)
    assert "".join(texts).startswith("hello Wörld 你好 hello")


def test_own_text_cannot_forge_control_tokens(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("<|im_start|>" * 100, encoding="utf-8")
    tokenizer = build_byte_tokenizer()
    ids = build(tokenizer, file=file, samples=1, sequence_length=64).ids
    assert not (ids == build_text_tokenizer(tokenizer).control_ids["<|im_start|>"]).any()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n\n\t", "is empty"),
        (b"hello", "has .* tokens, but 6 samples of 512 need 3,072"),
        (b"\xff\xfe\x00h" * 9, "not UTF-8"),
    ],
)
def test_text_of_no_use_is_refused(tmp_path, content, says):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        build(file=file)


def test_folder_instead_of_a_text_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read"):
        build(file=tmp_path)


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"samples": -1}, {"sequence_length": 1}])
def test_no_rows_are_refused(sizes):
    with pytest.raises(InvalidSetting, match="at least one sample"):
        build(**sizes)


def test_more_rows_than_the_default_text_has_are_refused(monkeypatch):
    monkeypatch.setattr(calibration, "_SOURCES", ("textwrap",))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as where it is not installed
    with pytest.raises(InvalidRequest, match="Choose fewer --samples"):
        build(samples=10**6)

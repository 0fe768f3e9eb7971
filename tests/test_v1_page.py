"""The page on a Qwen v1 checkpoint, end to end: the embedded model's real weights in v1 layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from page_driver import PageDriver
from playwright.sync_api import Browser, expect

from qwen.backend import DeferredBackend
from qwen.load_options import LoadOptions
from qwen.local import load_backend

pytestmark = [pytest.mark.browser, pytest.mark.integration]

REPLY_MILLISECONDS = 240_000


def test_qwen_v1_chats_in_the_page_and_the_bar_says_when_ntk_applies(
    chromium: Browser, embedded_v1_folder: Path, serve_page: Callable[..., str]
) -> None:
    backend = load_backend(str(embedded_v1_folder), LoadOptions(device="cpu"))
    deferred = DeferredBackend(lambda report: backend)
    deferred.start()
    context = chromium.new_context()
    tab = PageDriver(context, serve_page(deferred))
    tab.box.fill("What is the capital of France? Answer in one short sentence.")
    tab.box.press("Enter")
    expect(tab.replies.last).to_contain_text("Paris", timeout=REPLY_MILLISECONDS)
    expect(tab.send_button).to_be_visible(timeout=REPLY_MILLISECONDS)
    bar = tab.page.locator("#context")
    expect(bar).not_to_contain_text("NTK")
    tab.box.fill("word " * 33_000)  # the checkpoint was trained on 32,768 tokens
    expect(bar).to_contain_text("dynamic NTK applies, alpha 3", timeout=REPLY_MILLISECONDS)
    assert tab.problems == []
    context.close()

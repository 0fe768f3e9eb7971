"""Photographs of the real page with the real model, for the README: `make screenshots`.

Without `--screenshots FOLDER` they go to a temporary folder, so that the walk stays tested. What
the model writes differs a little between processors, so only a photograph that is to be kept must
show a formula and code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from qwen.backend import DeferredBackend
from qwen.local import LocalBackend

pytestmark = [pytest.mark.browser, pytest.mark.integration]

QUESTION = (
    "What is the area of a circle? Answer with one LaTeX formula between $$, one sentence, and a "
    "three-line Python function."
)
REPLY_MILLISECONDS = 240_000
#: What would stand on the page if formulas or code were shown as they are written.
WORDS_JS = """reply => {
  const words = reply.cloneNode(true);
  words.querySelectorAll(".katex, pre").forEach(rendered => rendered.remove());
  return words.textContent;
}"""
RAW_MARKUP = re.compile(r"\$\$|\\[(\[]|```")


class LikeliestTokens:
    """The embedded backend with temperature 0 as its default, so that pictures come out alike."""

    def __init__(self, backend: LocalBackend) -> None:
        self.stream = backend.stream
        self.count_tokens = backend.count_tokens
        params = replace(backend.info.default_params, temperature=0.0)
        self.info = replace(backend.info, default_params=params)

    def close(self) -> None:
        """Leave the embedded backend to the other tests."""


def ask(page: Page, url: str, question: str) -> None:
    page.goto(url)
    box = page.locator("#box textarea")
    box.fill(question)
    box.press("Enter")
    page.locator("#chat small.note").last.wait_for(timeout=REPLY_MILLISECONDS)
    # The frame follows a short reply a moment later; only at its end can it be written anew.
    page.locator("#regenerate:enabled").wait_for(timeout=REPLY_MILLISECONDS)
    page.locator("#send").wait_for(timeout=REPLY_MILLISECONDS)


def test_reply_of_the_real_model_is_photographed_as_it_is_rendered(
    chromium: Browser,
    embedded_backend: LocalBackend,
    serve_page: Callable[..., str],
    screenshots: Path,
    request: pytest.FixtureRequest,
) -> None:
    deferred = DeferredBackend(lambda report: LikeliestTokens(embedded_backend))
    deferred.start()
    url = serve_page(deferred)
    for name, width, height, scheme in (
        ("chat", 1180, 900, "light"),
        ("phone", 390, 844, "dark"),
    ):
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        page = context.new_page()
        ask(page, url, QUESTION if name == "chat" else "用三句话介绍一下杭州。")
        reply = page.locator("#chat .bot.message").last
        words = reply.evaluate(WORDS_JS)
        assert len(words) > len("一座美丽的城市。")
        assert not RAW_MARKUP.search(words)
        if name == "chat" and request.config.getoption("--screenshots"):
            assert reply.locator(".katex").count() >= 1
            assert reply.locator("span.token").count() >= 3
        page.locator("#chat .bubble-wrap").evaluate("e => e.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=screenshots / f"{name}.png")
        context.close()

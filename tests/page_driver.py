"""The chat page in a real browser, driven by what a user sees and presses."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Locator, Page, expect

#: Milliseconds; generous, since a busy machine must not fail a test.
PATIENCE = 30_000


class PageDriver:
    """One open tab.

    Attributes:
        problems: Errors on the console and uncaught exceptions.
        requests: Addresses of everything that the page asked for.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.open()

    def _note_console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def open(self) -> None:
        """Load the page (again) and wait until it answers events."""
        self.page.goto(self.url)
        self.context_bar_or_strip.wait_for()

    # Parts of the page.

    @property
    def context_bar_or_strip(self) -> Locator:
        """What only an event of the server fills in: the strip that names the model."""
        return self.page.locator("#status .strip")

    @property
    def box(self) -> Locator:
        return self.page.locator("#box textarea")

    @property
    def send_button(self) -> Locator:
        return self.page.locator("#send")

    @property
    def stop_button(self) -> Locator:
        return self.page.locator("#stop")

    @property
    def questions(self) -> Locator:
        return self.page.locator('#chat [data-testid="user"]')

    @property
    def replies(self) -> Locator:
        return self.page.locator('#chat [data-testid="bot"]')

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert")

    @property
    def end_mark(self) -> Locator:
        """What nobody sees: it changes when a reply has ended and is stored."""
        return self.page.locator("#notice [data-ended]")

    @property
    def other_tab_notice(self) -> Locator:
        return self.page.locator("#other-tab")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def action(self, name: str) -> Locator:
        """One of the buttons under the message box."""
        return self.page.locator(f"#{name}")

    # What a user does.

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> str:
        """Send a message, wait until the reply is stored and return its last line of words."""
        before, ended = self.replies.count(), self.end_mark.get_attribute("data-ended")
        self.send(text)
        expect(self.replies).to_have_count(before + 1, timeout=PATIENCE)
        self.wait_for_end()
        expect(self.end_mark).not_to_have_attribute("data-ended", str(ended), timeout=PATIENCE)
        return self.replies.last.inner_text()

    def wait_for_end(self) -> None:
        """Wait until the note under the last reply is there and Send is back."""
        self.replies.last.locator("small.note").wait_for()
        self.send_button.wait_for()

    def edit(self, number: int, text: str) -> None:
        """Change an earlier question; the first one is number 0."""
        self.page.locator('#chat button[aria-label="Edit"]').nth(number).click()
        self.page.locator("#chat textarea").fill(text)
        self.page.locator('#chat button[aria-label="Submit"]').click()

    def open_settings(self) -> None:
        self.page.locator(".toggle-button").click()

    # What a user sees.

    def texts(self) -> list[str]:
        """What stands in all bubbles, first to last."""
        return self.page.locator(
            '#chat [data-testid="user"], #chat [data-testid="bot"]'
        ).all_inner_texts()

    def expect_reply(self, text: str) -> None:
        expect(self.replies.last).to_contain_text(text, timeout=PATIENCE)

    def expect_questions(self, *texts: str) -> None:
        expect(self.questions).to_have_text(
            [re.compile(re.escape(t)) for t in texts], timeout=PATIENCE
        )

    def foreign_requests(self) -> list[str]:
        """Requests that left the page's own origin."""
        own = urlsplit(self.url).netloc
        schemes = ("data", "blob")
        return [
            url
            for url in self.requests
            if urlsplit(url).netloc != own and urlsplit(url).scheme not in schemes
        ]

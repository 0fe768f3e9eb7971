"""Replies in a real Chromium: Gradio's Markdown, KaTeX, highlighter and sanitiser at work."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page

import webapp
from webapp.render import LATEX_DELIMITERS, render_note, render_reply, restore_text

pytestmark = pytest.mark.browser

REPLY = "#chat .bot-row .message-content"
NOTE = "12 tokens · 3.4 tokens/s · <stop>"
REPLIES = {
    "dollar": "so $x^2$ is",
    "dollars": "$$\n\\begin{align} a &< b \\\\\n\nc &= d \\end{align}\n$$",
    "parens": r"so \(x_1 <y_2\) is",
    "brackets": r"\[ \int_0^1 x\,dx \]",
    "list_math": "- a\n  $$x\n  = 1$$\n- b",
    "quote_math": "> $$\n> a_b = c_d\n> $$",
    "table_math": "| a | b |\n|---|---|\n| $|x|$ | $6 |",
    "money": "It is $5 and $10, `$HOME $PATH`, $HOME $PATH, \\$x\\$.",
    "unfinished_math": "so \\(x_1 + y_1",
    "entities": "&lt;b&gt; A&amp;B <b> &#60;i>",
    "less": "if a<b then c>d and Vector<int> and </div> or <!-- c -->",
    "code_span": "`Vector<int>` and ``<b>``",
    "unfinished_code": "text\n```python\nprint(1)\nfor x in",
    "unfinished_fence": "text\n```py",
    "list_code": "1. a\n   ```cpp\nint<b> x;\n   ```\n2. b",
    "chinese": "是**「引号」**的，**公式 $x$**是。",
    "images": "![a](https://example.org/a.png) ![b](data:image/png;base64,AAAA)",
    "links": "[web](https://example.org/) [mail](mailto:a@b.c) [bad](javascript:x)",
    "copy": "Raw `a<b` <b> $x<y$ ![i](http://q)\n\n1. a\n   ```cpp\nv<int> x;\n   ```\n",
}
LANGUAGES = {
    "python": "def f(): return 1",
    "py": "def f(): return 1",
    "cpp": "int main() { return 0; }",
    "ts": "const x = 1;",
    "html": '<b class="x">y</b>',
    "yaml": "a: 1",
    "sh": "if true; then echo 1; fi",
    "php": "<?php return 1;",
    "json": '{"a": 1}',
}
HARMLESS_LANGUAGES = ("constructor", "toString", "__proto__", "mermaid", "nosuch", "c++/cli")
MERMAID = "graph TD; A-->B"
ATTACKS = (
    "<script>flag()</script>",
    "<img src=x onerror=flag()>",
    "<svg onload=flag()>",
    "<svg><script>flag()</script></svg>",
    "<svg><a xlink:href=javascript:flag()><text>x</text></a></svg>",
    "<iframe src=javascript:flag()></iframe>",
    "<iframe srcdoc='<script>parent.flag()</script>'></iframe>",
    "<form action=https://attacker.example/><input autofocus onfocus=flag()></form>",
    "<style>@import url(https://attacker.example/a.css); *{background:url(https://attacker.example/b)}</style>",
    "<link rel=stylesheet href=https://attacker.example/a.css>",
    "<meta http-equiv=refresh content='0;url=https://attacker.example/'>",
    "<base href=https://attacker.example/>",
    "<object data=https://attacker.example/></object><embed src=https://attacker.example/>",
    "<video src=https://attacker.example/v onerror=flag()></video>",
    "<details open ontoggle=flag()>x</details>",
    "<math><mtext><table><mglyph><style><img src=x onerror=flag()></style></mglyph></table>",
    "<noscript><p title='</noscript><img src=x onerror=flag()>'>",
    "<!--><img src=x onerror=flag()>-->",
    "<![CDATA[><img src=x onerror=flag()>]]>",
    "<?x ><img src=x onerror=flag()>?>",
    "<a href=javascript:flag()>click</a>",
    "[click](javascript:flag())",
    "[click](JaVaScRiPt:flag())",
    "[click](java&#115;cript:flag())",
    "[click](&#x6A;avascript:flag())",
    "[click](java\tscript:flag())",
    "[click](<javascript:flag()>)",
    "[click](data:text/html,<script>flag()</script>)",
    "[click](vbscript:flag())",
    "<javascript:flag()>",
    "[click][a]\n\n[a]: javascript:flag()",
    "[click][a]\n\n[a]:\njavascript:flag()",
    '[a]: https://b.c "\n```\n"\n<img src=x onerror=flag()>\n```\n',
    '[x](https://b.c "$\\" onmouseover=flag() x=\\"$")',
    '[x](https://b.c/$"onmouseover="flag()$)',
    "![x](https://attacker.example/a.png)",
    "![x][a]\n\n[a]: https://attacker.example/b.png",
    '![x](x" onerror="flag())',
    "$\\href{javascript:flag()}{click}$",
    "$\\url{javascript:flag()}$",
    "$\\includegraphics{https://attacker.example/c.png}$",
    "$\\htmlClass{x}{y} \\htmlData{onclick=flag()}{x}$",
    "$\\text{<img src=x onerror=flag()>}$",
    "$$</span><img src=x onerror=flag()>$$",
    "`$x`<img src=x onerror=flag()>`y$`",
    "```\n</code></pre><img src=x onerror=flag()>\n```",
    '```"><img/src=x/onerror=flag()>\nx\n```',
    "- a\n  ```\nx\n```\n<img src=x onerror=flag()>\n```\n",
    "text\n2. ```\n   ```\n```\n<img src=x onerror=flag()>\n```",
    "``` \\(x`y\\)\n```\n<img src=x onerror=flag()>\n```",
    "- [ ] ```\n```\n<img src=x onerror=flag()>\n```",
    "| `a | <img src=x onerror=flag()> ` |\n|---|---|\n| `b | <img src=x onerror=flag()>` |",
    "x```mermaid\n```\n<img src=x onerror=flag()>\n```",
    "```mermaid\ngraph TD; A[<img src=x onerror=flag()>] click A call flag()\n```",
    "%%%LATEX_BLOCK_0%%% $<img src=x onerror=flag()>$ `%%%LATEX_BLOCK_0%%%`",
    "\\<img src=x onerror=flag()> \\\\<img src=x onerror=flag()>",
    "&lt;img src=x onerror=flag()&gt; &#60;img src=x onerror=flag()>",
)


@dataclass
class Shown:
    """A page with one message for each text, and what happened on it."""

    page: Page
    texts: list[str]
    incidents: list[str] = field(default_factory=list)

    def message(self, text: str) -> Locator:
        return self.page.locator(REPLY).nth(self.texts.index(text))


def serve(texts: list[str]) -> tuple[object, str]:
    import gradio as gr

    # Questions in between: Gradio puts replies that follow each other under one copy button.
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for reply in texts
        for role, text in (("user", "?"), ("assistant", reply))
    ]
    script = (Path(webapp.__file__).parent / "page.js").read_text("utf-8")
    with gr.Blocks() as demo:
        gr.Chatbot(
            messages,
            elem_id="chat",
            latex_delimiters=LATEX_DELIMITERS,
            sanitize_html=True,
            render_markdown=True,
            line_breaks=True,
            layout="panel",
            height=20_000,
            buttons=["copy"],
            editable="all",
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo.launch(
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        head=f"<script>{script}</script>",
    )
    return demo, f"http://127.0.0.1:{port}/"


def open_page(chromium: Browser, url: str, texts: list[str]) -> Shown:
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    shown = Shown(page, texts)
    page.add_init_script("window.flagged = 0; window.flag = () => { window.flagged += 1; }")
    page.on("dialog", lambda dialog: (shown.incidents.append("dialog"), dialog.dismiss()))
    page.on("popup", lambda popup: shown.incidents.append(f"popup {popup.url}"))
    context.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((url, "data:font/", "blob:"))
            else shown.incidents.append(f"request {request.url}")
        ),
    )
    page.goto(url)
    page.locator(REPLY).nth(len(texts) - 1).wait_for()
    return shown


@pytest.fixture(scope="module", autouse=True)
def quiet_gradio() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield


@pytest.fixture(scope="module")
def shown(chromium: Browser) -> Iterator[Shown]:
    texts = list(REPLIES.values())
    texts += [f"```{tag}\n{code}\n```\nend" for tag, code in LANGUAGES.items()]
    texts += [f"```{tag}\n{MERMAID}\n```\nend" for tag in HARMLESS_LANGUAGES]
    demo, url = serve([render_reply(text) + render_note(NOTE, after=text) for text in texts])
    shown = open_page(chromium, url, texts)
    shown.message(REPLIES["copy"]).locator(".katex").first.wait_for()
    yield shown
    shown.page.context.close()
    demo.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def attacked(chromium: Browser) -> Iterator[Shown]:
    texts = [*ATTACKS, "end $x$"]
    demo, url = serve([render_reply(text) for text in texts])
    attacked = open_page(chromium, url, texts)
    attacked.message("end $x$").locator(".katex").first.wait_for()
    yield attacked
    attacked.page.context.close()
    demo.close()  # type: ignore[attr-defined]


# --- what is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dollar", "dollars", "parens", "brackets", "list_math", "quote_math", "table_math"]
)
def test_formulas_are_typeset(shown: Shown, name: str) -> None:
    message = shown.message(REPLIES[name])
    message.locator(".katex").first.wait_for()
    assert message.locator(".katex").count() == 1
    assert message.locator(".katex-error").count() == 0
    block = name not in ("dollar", "parens", "table_math")
    assert message.locator(".katex-display").count() == block


@pytest.mark.parametrize("name", ["money", "unfinished_math"])
def test_what_is_no_formula_is_shown_as_written(shown: Shown, name: str) -> None:
    message = shown.message(REPLIES[name])
    assert message.locator(".katex, em").count() == 0
    words = REPLIES[name].replace("`", "").replace("\\$", "$")
    assert visible(message).startswith(words)


@pytest.mark.parametrize("tag", LANGUAGES)
def test_code_is_highlighted(shown: Shown, tag: str) -> None:
    message = shown.message(f"```{tag}\n{LANGUAGES[tag]}\n```\nend")
    message.locator("pre span.token").first.wait_for()
    assert message.locator("pre").inner_text().strip() == LANGUAGES[tag]
    assert "end" in visible(message)


@pytest.mark.parametrize("tag", HARMLESS_LANGUAGES)
def test_an_unknown_language_is_shown_as_plain_code(shown: Shown, tag: str) -> None:
    message = shown.message(f"```{tag}\n{MERMAID}\n```\nend")
    assert message.locator("pre code").inner_text().strip() == MERMAID
    assert message.locator("svg.flowchart, .mermaid").count() == 0
    assert "end" in visible(message)


def test_angle_brackets_in_text_are_shown_whole(shown: Shown) -> None:
    assert visible(shown.message(REPLIES["less"])).startswith(REPLIES["less"])
    assert visible(shown.message(REPLIES["code_span"])).startswith("Vector<int> and <b>")
    assert visible(shown.message(REPLIES["entities"])).startswith("<b> A&B <b> <i>")


def test_tables_are_tables(shown: Shown) -> None:
    message = shown.message(REPLIES["table_math"])
    assert message.locator("td").count() == 2
    assert "$6" in message.locator("td").nth(1).inner_text()


@pytest.mark.parametrize("name", ["unfinished_code", "unfinished_fence", "list_code"])
def test_code_is_a_block_and_the_note_is_outside_of_it(shown: Shown, name: str) -> None:
    message = shown.message(REPLIES[name])
    assert message.locator("pre").count() == 1
    assert message.locator("p > small.note").count() == 1
    assert message.locator("small.note").inner_text().endswith(NOTE)


def test_a_list_goes_on_after_code_that_is_not_indented(shown: Shown) -> None:
    message = shown.message(REPLIES["list_code"])
    assert message.locator("ol").count() == 1
    assert message.locator("ol > li").count() == 2
    assert "int<b> x;" in message.locator("li pre").inner_text()


def test_bold_chinese_is_bold(shown: Shown) -> None:
    message = shown.message(REPLIES["chinese"])
    assert message.locator("strong").count() == 2
    assert message.locator("strong .katex").count() == 1
    assert "*" not in visible(message)


def test_only_web_and_mail_links_are_links(shown: Shown) -> None:
    links = shown.message(REPLIES["links"]).locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/",
        "mailto:a@b.c",
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert "[bad](javascript:x)" in visible(shown.message(REPLIES["links"]))


def test_no_reply_asks_for_anything_outside_the_page(shown: Shown) -> None:
    assert shown.page.locator("#chat .message-content img").count() == 0
    assert shown.incidents == []


# --- copying and editing -----------------------------------------------------------------------


def clipboard(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


@pytest.mark.parametrize("name", ["copy", "unfinished_code", "money", "quote_math", "list_code"])
def test_the_copy_button_of_a_message_gives_the_raw_text(shown: Shown, name: str) -> None:
    shown.page.evaluate("navigator.clipboard.writeText('nothing')")
    buttons = shown.page.locator("#chat").get_by_role(
        "button", name=re.compile("Copy message|Copied")
    )
    buttons.nth(2 * shown.texts.index(REPLIES[name]) + 1).click()
    shown.page.wait_for_function("async () => await navigator.clipboard.readText() !== 'nothing'")
    assert clipboard(shown.page) == REPLIES[name]


def test_the_copy_button_of_a_code_block_gives_the_code(shown: Shown) -> None:
    message = shown.message(REPLIES["list_code"])
    shown.page.evaluate("navigator.clipboard.writeText('nothing')")
    message.locator(".copy_code_button").click()
    shown.page.wait_for_function("async () => await navigator.clipboard.readText() !== 'nothing'")
    assert clipboard(shown.page) == "int<b> x;"


def test_the_page_restores_texts_as_the_server_does(shown: Shown) -> None:
    copy = "async (text) => { await navigator.clipboard.writeText(text); }"
    for text in (*shown.texts, *ATTACKS):
        shown.page.evaluate(copy, render_reply(text) + render_note(NOTE, after=text))
        assert clipboard(shown.page) == text


def test_copied_selections_hold_no_marks(shown: Shown) -> None:
    shown.message(REPLIES["less"]).locator("p").first.evaluate(
        "element => getSelection().selectAllChildren(element)"
    )
    shown.page.keyboard.press("Control+C")
    assert clipboard(shown.page) == REPLIES["less"]


def test_a_message_is_edited_as_its_raw_text(chromium: Browser) -> None:
    text = "is $a<b$ or Vector<int>?"
    demo, url = serve([render_reply(text)])
    shown = open_page(chromium, url, [text])
    shown.page.get_by_role("button", name="Edit").last.click()
    field = shown.page.locator("textarea.edit-textarea")
    field.wait_for()
    assert field.input_value() == text
    assert restore_text(field.input_value()) == text
    shown.page.context.close()
    demo.close()  # type: ignore[attr-defined]


def test_enter_that_confirms_a_candidate_reaches_nobody(shown: Shown) -> None:
    reached = shown.page.evaluate(
        """() => {
          const field = document.createElement("textarea");
          document.body.append(field);
          const seen = [];
          field.addEventListener("keydown", (event) => seen.push(event.isComposing));
          for (const isComposing of [true, false])
            field.dispatchEvent(
              new KeyboardEvent("keydown", { key: "Enter", isComposing, bubbles: true }));
          field.remove();
          return seen;
        }"""
    )
    assert reached == [False]


# --- attacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ATTACKS)
def test_an_attack_is_inert(attacked: Shown, text: str) -> None:
    message = attacked.message(text)
    dangerous = "img, form, iframe, script, object, embed, style, link, meta, base, video, "
    dangerous += "input:not([type=checkbox][disabled])"  # a task list has those
    assert message.locator(dangerous).count() == 0
    hrefs = message.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert all(re.match("https?://|mailto:", href) for href in hrefs)
    handlers = message.evaluate(
        "element => [...element.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
    )
    assert not [name for name in handlers if name.startswith("on")]
    assert message.inner_text().strip()


def test_attacks_run_nothing_and_ask_for_nothing(attacked: Shown) -> None:
    for target in attacked.page.locator("#chat").get_by_text("click").all():
        if target.is_visible():
            target.click()
    attacked.page.wait_for_timeout(300)
    assert attacked.page.evaluate("window.flagged") == 0
    assert attacked.incidents == []


def visible(message: Locator) -> str:
    return re.sub("[\u206a-\u206f]", "", message.inner_text())

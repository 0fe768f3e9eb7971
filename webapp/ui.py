"""The layout of the page: which components there are, where they stand, what they trigger.

All behaviour is in the `webapp.*_handlers`; all words are in `webapp.text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from webapp.completion_handlers import (
    COMPLETION_FRAME_VIEW,
    COMPLETION_VIEW,
    CompletionHandlers,
)
from webapp.controls import CONTROLS, Controls
from webapp.history_handlers import HistoryHandlers
from webapp.loading_handlers import STATUS_VIEW, LoadingHandlers
from webapp.page_updates import FRAME_VIEW, REPLY_VIEW, VIEW
from webapp.render import LATEX_DELIMITERS
from webapp.reply_handlers import ReplyHandlers
from webapp.text import TRANSLATIONS

#: Fixed, so that a history outlives the server: both are random per process by default. The
#: secret is known to every browser, so it hides nothing, and what comes back is not trusted.
STORAGE_KEY = "qwen-chat"
STORAGE_SECRET = "qwen-chat-storage"

FOLDER = Path(__file__).parent
#: Replies that stream at once; the engine queues them fairly.
CONCURRENT_REPLIES = 64

THEME_JS = "() => { document.body.classList.toggle('dark'); }"
#: Saves [file name, media type, text] without a copy on the server.
DOWNLOAD_JS = """(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([file[2]], {type: file[1]}));
  link.download = file[0];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

Components = dict[str, Any]


def launch_options() -> dict[str, Any]:
    """Return what the look of the page adds to `launch`."""
    script = (FOLDER / "page.js").read_text("utf-8")
    return {
        "theme": gr.themes.Default(
            primary_hue="indigo",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(  # white on indigo-500, the default, has too little contrast to read
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
        ),
        "css": (FOLDER / "style.css").read_text("utf-8"),
        "head": f"<script>{script}</script>",
        "i18n": gr.I18n(**TRANSLATIONS),
    }


@dataclass(frozen=True, slots=True)
class Handlers:
    """Everything that the page can trigger."""

    reply: ReplyHandlers
    history: HistoryHandlers
    completion: CompletionHandlers
    loading: LoadingHandlers


def build_page(handlers: Handlers) -> gr.Blocks:
    """Build the whole page."""
    t = gr.I18n(**TRANSLATIONS)
    demo: gr.Blocks
    with gr.Blocks(
        title="Qwen Chat", analytics_enabled=False, fill_height=True, fill_width=True
    ) as demo:
        c: Components = {"session": gr.State(None), "turn": gr.State(0)}
        c["completion_turn"] = gr.State(0)
        c["saved"] = gr.BrowserState(None, storage_key=STORAGE_KEY, secret=STORAGE_SECRET)
        _build_settings(c, t, handlers.history.default_controls())
        _build_header(c, t)
        with gr.Column(visible=True, elem_id="chat-page", scale=1) as c["chat_page"]:
            _build_chat(c, t)
        with gr.Column(visible=False, elem_id="completion-page") as c["completion_page"]:
            _build_completion(c, t)
        c["clock"] = gr.Timer(1.0)
        _wire_replies(c, handlers.reply)
        _wire_history(c, handlers.history)
        _wire_completion(c, handlers.completion)
        _wire_page(demo, c, handlers)
    return _silent(demo)


def _silent(demo: gr.Blocks) -> gr.Blocks:
    """Keep what was sent off the log where there are too few values: Gradio would print them."""
    check = demo.validate_inputs

    def validate(*given: Any) -> None:
        try:
            check(*given)
        except ValueError:
            text = "The page and the server do not fit together. Load the page again."
            raise gr.Error(text, print_exception=False) from None

    demo.validate_inputs = validate  # type: ignore[assignment, method-assign]
    return demo


def _unchecked(component: Any) -> Any:
    """Let a component hand over what was sent; `qwen.messages` checks it and names the setting.

    Gradio's own check fails without a name and hides the whole conversation. Not a subclass:
    Gradio would write a stub file beside this one.
    """
    component.preprocess = lambda payload: payload
    return component


def _build_settings(c: Components, t: gr.I18n, controls: Controls) -> None:
    values = dict(zip(CONTROLS, controls, strict=True))
    with gr.Sidebar(open=False, label=t("settings"), width=340):
        c["system_prompt"] = gr.Textbox(
            values["system_prompt"], label=t("system_prompt"), lines=3, max_lines=12
        )
        for name, step, low, high in (
            ("temperature", 0.05, 0, 2),
            ("top_p", 0.01, 0.01, 1),
            ("top_k", 1, 0, 200),
            ("repetition_penalty", 0.01, 0.8, 2),
            ("max_new_tokens", 16, 16, 8192),
        ):
            info = t("temperature_info") if name == "temperature" else None
            slider = gr.Slider(low, high, values[name], step=step, label=t(name), info=info)
            c[name] = _unchecked(slider)
        c["seed"] = _unchecked(gr.Number(values["seed"], label=t("seed"), precision=0))
        gr.Markdown(t("export"))
        with gr.Row():
            for kind, label in (("html", "HTML"), ("json", "JSON"), ("markdown", "Markdown")):
                c[f"export_{kind}"] = gr.Button(label, size="sm", min_width=60)
        c["download"] = gr.JSON(visible=False)
        c["theme"] = gr.Button(t("theme"), size="sm")


def _build_header(c: Components, t: gr.I18n) -> None:
    c["title"] = gr.Markdown("# Qwen Chat", elem_id="title")
    c["status"] = gr.HTML(elem_id="status")
    c["retry"] = gr.Button(t("retry"), visible=False, size="sm")


def _build_chat(c: Components, t: gr.I18n) -> None:
    c["earlier"] = gr.Button(t("earlier"), visible=False, size="sm")
    c["chatbot"] = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height="100%",
        scale=1,
        editable="user",
        buttons=["copy"],
        latex_delimiters=LATEX_DELIMITERS,
        sanitize_html=True,
    )
    with gr.Row(visible=False, elem_id="stepper") as c["stepper"]:
        c["previous"] = gr.Button("‹", size="sm", min_width=40, scale=0)
        c["version"] = gr.HTML(elem_id="version")
        c["next"] = gr.Button("›", size="sm", min_width=40, scale=0)
        c["fork"] = gr.Dropdown(
            label=t("fork_label"), show_label=False, container=False, visible=False, min_width=160
        )
    c["notice"] = gr.HTML(elem_id="notice")
    c["other_tab"] = gr.Markdown(t("other_tab"), elem_id="other-tab")
    with gr.Row(elem_id="compose"):
        c["box"] = gr.Textbox(
            lines=1,
            max_lines=10,
            label=t("box_label"),
            show_label=False,
            container=False,
            placeholder=t("box_placeholder"),
            elem_id="box",
            scale=8,
            autofocus=True,
        )
        c["send"] = gr.Button(t("send"), variant="primary", elem_id="send", min_width=90, scale=1)
        c["stop"] = gr.Button(
            t("stop"), variant="stop", visible=False, elem_id="stop", min_width=90, scale=1
        )
    with gr.Row(elem_id="actions"):
        for name in ("regenerate", "continue", "undo", "clear"):
            c[name] = gr.Button(t(name), size="sm", min_width=80, interactive=False, elem_id=name)
    c["context"] = gr.HTML(elem_id="context")


def _build_completion(c: Components, t: gr.I18n) -> None:
    c["text"] = gr.Textbox(
        lines=14,
        max_lines=30,
        label=t("completion_label"),
        info=t("completion_info"),
        placeholder=t("completion_placeholder"),
        elem_id="completion-text",
    )
    with gr.Row():
        c["complete"] = gr.Button(t("complete"), variant="primary", elem_id="complete")
        c["stop_completion"] = gr.Button(
            t("stop"), variant="stop", visible=False, elem_id="stop-completion"
        )
    c["completion_note"] = gr.HTML(elem_id="completion-note")


#: Streamed events: queued by Gradio without a limit worth feeling; the engine keeps the order.
#: Their values are what the browser takes: a conversion costs a change of threads at every update.
REPLY_EVENT: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": CONCURRENT_REPLIES,
    "concurrency_id": "replies",
    "postprocess": False,
}
#: Events that answer at once and so skip the queue.
INSTANT_EVENT: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "queue": False,
}
#: Events that show what another has changed: one at a time, and once more for what came meanwhile.
FOLLOWING_EVENT: dict[str, Any] = {**INSTANT_EVENT, "trigger_mode": "always_last"}


def _wire_replies(c: Components, reply: ReplyHandlers) -> None:
    view = [c[name] for name in REPLY_VIEW]
    inputs = [c["saved"], c["session"], *(c[name] for name in CONTROLS)]
    gr.on([c["box"].submit, c["send"].click], reply.send, [c["box"], *inputs], view, **REPLY_EVENT)
    c["chatbot"].example_select(reply.send_example, inputs, view, **REPLY_EVENT)
    c["chatbot"].edit(reply.edit, inputs, view, **REPLY_EVENT)
    c["regenerate"].click(reply.regenerate, inputs, view, **REPLY_EVENT)
    c["continue"].click(reply.continue_reply, inputs, view, **REPLY_EVENT)
    frame = [c[name] for name in FRAME_VIEW]
    c["turn"].change(reply.follow, inputs[1:], frame, **FOLLOWING_EVENT)
    c["stop"].click(reply.stop, [c["session"]], None, **INSTANT_EVENT)


def _wire_history(c: Components, history: HistoryHandlers) -> None:
    view = [c[name] for name in VIEW]
    inputs = [c["saved"], c["session"], *(c[name] for name in CONTROLS)]
    c["undo"].click(history.undo, [c["box"], *inputs], view, **INSTANT_EVENT)
    c["clear"].click(history.clear, inputs, view, **INSTANT_EVENT)
    c["earlier"].click(history.show_earlier, inputs, view, **INSTANT_EVENT)
    c["previous"].click(history.step_back, inputs, view, **INSTANT_EVENT)
    c["next"].click(history.step_forward, inputs, view, **INSTANT_EVENT)
    c["fork"].input(history.choose_fork, [c["fork"], *inputs], view, **INSTANT_EVENT)
    gr.on(
        [c["box"].change, c["system_prompt"].change, c["max_new_tokens"].release],
        history.draft_context,
        [c["box"], *inputs[1:]],
        c["context"],
        **FOLLOWING_EVENT,
    )
    for kind in ("html", "json", "markdown"):
        export = getattr(history, f"export_{kind}")
        c[f"export_{kind}"].click(export, inputs[1:], c["download"], **INSTANT_EVENT).then(
            None, c["download"], None, js=DOWNLOAD_JS
        )
    c["theme"].click(None, None, None, js=THEME_JS)


def _wire_completion(c: Components, completion: CompletionHandlers) -> None:
    inputs = [c["text"], c["session"], *(c[name] for name in CONTROLS)]
    view = [c[name] for name in COMPLETION_VIEW]
    frame = [c[name] for name in COMPLETION_FRAME_VIEW]
    c["complete"].click(completion.complete, inputs, view, **REPLY_EVENT)
    c["completion_turn"].change(
        completion.follow_completion, [c["session"]], frame, **FOLLOWING_EVENT
    )
    c["stop_completion"].click(completion.stop, [c["session"]], None, **INSTANT_EVENT)


def _wire_page(demo: gr.Blocks, c: Components, handlers: Handlers) -> None:
    controls = [c[name] for name in CONTROLS]
    view = [c[name] for name in VIEW]
    status = [*(c[name] for name in STATUS_VIEW), *controls, c["context"]]
    show = (handlers.loading.show_status, [c["session"], *controls], status)
    opening = demo.load(handlers.history.open_page, c["saved"], [*view, *controls], **INSTANT_EVENT)
    opening.then(
        handlers.history.settle_page, [c["session"], *controls], view, **INSTANT_EVENT
    ).then(*show, **INSTANT_EVENT)
    c["clock"].tick(*show, **INSTANT_EVENT)
    c["retry"].click(handlers.loading.retry, None, c["clock"], **INSTANT_EVENT)

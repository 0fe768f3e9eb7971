// Small repairs to what Gradio 6.31 does in the browser. No framework, no network, no state.
(() => {
  "use strict";

  // Mirror of restore_text in webapp/render.py: the same rules in the same order.
  const withoutNote = (display) => {
    const [text, note] = display.split('\n\n<small class="note">\u206f');
    const line = Math.max(text.lastIndexOf("\n"), text.lastIndexOf("\r"));
    if (/^\u206a/.test(note)) return text.slice(0, line);
    return /^\u206b/.test(note) ? text.slice(0, line + 1) : text;
  };
  const restoreText = (display) =>
    withoutNote(display)
      .replace(/([\u206c\u206d\u206e])([\s\S]*?)\1/g, (all, mark, text) =>
        text
          .replace(/&#([0-9]{2,3});/g, (entity, code) => String.fromCharCode(Number(code)))
          .replace(/%\u206a([> \t]*)\u206a\n/g, "$1"),
      )
      .replace(/(\u206a+)(\r\n|\r|\n)( +)/g, (all, marks, end, pad) => end + pad.slice(marks.length))
      .replace(/(?:(?<![a-z])[a-z]+ |(?<! ) +|\n\u206b)\u206b/g, "")
      .replace(/[\u206a-\u206f]/g, "");

  // The copy buttons of a message and of a code block give the raw text.
  if (navigator.clipboard) {
    const writeText = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => writeText(restoreText(String(text)));
  }

  // So does Ctrl+C, and the copy buttons where there is no clipboard API (plain HTTP): Gradio
  // then selects a hidden textarea.
  document.addEventListener("copy", (event) => {
    const field = document.activeElement;
    const inField = field && /^(textarea|input)$/i.test(field.tagName);
    const text = inField
      ? field.value.slice(field.selectionStart ?? 0, field.selectionEnd ?? 0)
      : String(document.getSelection());
    if (!/[\u206a-\u206f]/.test(text)) return;
    event.clipboardData.setData("text/plain", restoreText(text));
    event.preventDefault();
  });

  // A message that is edited in place is edited as its raw text.
  document.addEventListener("focusin", (event) => {
    const field = event.target;
    if (!field.matches?.("textarea.edit-textarea") || !/[\u206a-\u206f]/.test(field.value)) return;
    field.value = restoreText(field.value);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  });

  // Tabs of one browser share one stored history. When a reply has ended in one, the others show
  // it by loading again, with their half-written message kept; a tab that was writing at the same
  // time, or in which a message is being edited, shows a notice instead (style.css).
  const DRAFT = "qwen-chat-draft";
  const STORED_AFTER_MS = 500; // Gradio stores the history just after the mark of an end comes
  const box = () => document.querySelector("#box textarea");
  const tabs = new BroadcastChannel("qwen-chat");
  const lastEnd = () => document.querySelector("#notice [data-ended]")?.dataset.ended;
  let known; // a short reply ends before the Stop button comes, so it is no sign of an end
  let isWriting = false;
  let isWritingElsewhere = false;
  let overlapped = false;
  tabs.onmessage = (event) => {
    isWritingElsewhere = event.data === "reply begins";
    overlapped ||= isWriting || document.querySelector("textarea.edit-textarea") !== null;
    if (overlapped) {
      document.getElementById("other-tab")?.classList.add("shown");
    } else if (event.data === "reply ended") {
      sessionStorage.setItem(DRAFT, box()?.value ?? "");
      location.reload();
    }
  };
  new MutationObserver(() => {
    const draft = box() && sessionStorage.getItem(DRAFT);
    if (draft) {
      box().value = draft;
      box().dispatchEvent(new Event("input", { bubbles: true }));
    }
    if (box()) sessionStorage.removeItem(DRAFT);

    const wasWriting = isWriting;
    isWriting = document.getElementById("stop") !== null;
    if (isWriting && !wasWriting) {
      overlapped ||= isWritingElsewhere;
      tabs.postMessage("reply begins");
    }
    const wasKnown = known;
    known = lastEnd() ?? known;
    if (wasKnown !== undefined && known !== wasKnown) {
      setTimeout(() => tabs.postMessage("reply ended"), STORED_AFTER_MS);
    }
  }).observe(document, { childList: true, subtree: true });

  // Gradio sends on Enter even when Enter only confirms a candidate of an input method. Safari
  // tells so by key code 229 alone.
  for (const type of ["keydown", "keypress"]) {
    document.addEventListener(
      type,
      (event) => {
        const composing = event.isComposing || event.keyCode === 229;
        if (composing && event.key === "Enter" && event.target instanceof HTMLTextAreaElement) {
          event.stopImmediatePropagation();
        }
      },
      true,
    );
  }
})();

"""Every word that the page shows, in English, Chinese and Japanese. Knows no framework.

Errors from the layers below come in English. A new language is one more column in `_TABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LOCALES = ("en", "zh", "ja")

_TABLE: dict[str, tuple[str, str, str]] = {
    "title": ("Qwen Chat", "Qwen 对话", "Qwen チャット"),
    "box_label": ("Message", "消息", "メッセージ"),
    "box_placeholder": (
        "Ask anything. Enter sends, Shift+Enter breaks the line.",
        "想问什么都可以。Enter 发送,Shift+Enter 换行。",
        "何でも聞いてください。Enter で送信、Shift+Enter で改行。",
    ),
    "send": ("Send", "发送", "送信"),
    "stop": ("Stop", "停止", "停止"),
    "regenerate": ("↻ Regenerate", "↻ 重新生成", "↻ 再生成"),
    "continue": ("→ Continue", "→ 继续", "→ 続ける"),
    "undo": ("↩ Undo", "↩ 撤销", "↩ 元に戻す"),
    "clear": ("✕ Clear", "✕ 清空", "✕ クリア"),
    "earlier": ("Show earlier messages", "显示更早的消息", "以前のメッセージを表示"),
    "previous": ("‹", "‹", "‹"),
    "next": ("›", "›", "›"),
    "fork_label": ("Message with several versions", "有多个版本的消息", "複数の版があるメッセージ"),
    "version": (
        "Version {place} of {count}",
        "第 {place} / {count} 个版本",
        "{count} 版中の {place} 版目",
    ),
    "settings": ("Settings", "设置", "設定"),
    "system_prompt": ("System prompt", "系统提示词", "システムプロンプト"),
    "temperature": ("Temperature", "温度", "温度"),
    "temperature_info": (
        "0 always takes the likeliest token; higher is more varied.",
        "0 总是取最可能的词元;越高越多样。",
        "0 は常に最有力のトークン。高いほど多様になります。",
    ),
    "top_p": ("Top-p", "Top-p", "Top-p"),
    "top_k": ("Top-k (0 = off)", "Top-k(0 = 关闭)", "Top-k(0 = オフ)"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚", "繰り返しペナルティ"),
    "max_new_tokens": (
        "Longest reply in tokens",
        "回复的最大长度(词元)",
        "返信の最大長(トークン)",
    ),
    "seed": ("Seed (empty = random)", "随机种子(空 = 随机)", "シード(空 = ランダム)"),
    "export": ("Save this conversation", "保存此对话", "この会話を保存"),
    "theme": ("◐ Light / dark", "◐ 浅色 / 深色", "◐ ライト / ダーク"),
    "placeholder": (
        "### What would you like to know?",
        "### 想了解什么?",
        "### 何を知りたいですか?",
    ),
    "example_1": (
        "Explain how a hash table works, with a small Python example.",
        "用一个简短的 Python 例子解释哈希表的原理。",
        "ハッシュテーブルの仕組みを短い Python の例で説明してください。",
    ),
    "example_2": (
        "Derive the quadratic formula step by step, using LaTeX.",
        "用 LaTeX 一步步推导一元二次方程的求根公式。",
        "二次方程式の解の公式を LaTeX で順を追って導いてください。",
    ),
    "example_3": (
        "Write a SQL query that finds the second highest salary.",
        "写一条 SQL 查询,找出第二高的薪水。",
        "2 番目に高い給与を求める SQL を書いてください。",
    ),
    "example_4": (
        "Compare Python, Go and Rust in a table.",
        "用表格比较 Python、Go 和 Rust。",
        "Python、Go、Rust を表で比較してください。",
    ),
    "complete": ("Complete", "补全", "補完"),
    "completion_label": ("Text to complete", "要补全的文本", "補完するテキスト"),
    "completion_info": (
        "This is a base model: it has no chat format and continues the text that you give it.",
        "这是基座模型:没有对话格式,会接着您给出的文本往下写。",
        "これはベースモデルです。対話形式を持たず、与えられた文章の続きを書きます。",
    ),
    "completion_placeholder": (
        "Once upon a time",
        "很久很久以前",
        "むかしむかし",
    ),
    "loading": ("Loading the model", "正在加载模型", "モデルを読み込み中"),
    "loading_hint": (
        "You can write already; your message is answered as soon as the model is ready.",
        "现在就可以写消息;模型就绪后会立即回复。",
        "もう入力できます。準備ができしだい返信します。",
    ),
    "failed": ("The model could not be loaded", "模型加载失败", "モデルを読み込めませんでした"),
    "retry": ("Try again", "重试", "再試行"),
    "context_tokens": ("context {count} tokens", "上下文 {count} 词元", "文脈 {count} トークン"),
    "memory": (
        "Memory: {needed} of {free}",
        "内存:{needed} / {free}",
        "メモリ:{free} 中 {needed}",
    ),
    "memory_parts": (
        "estimated before loading: weights {weights} · cache of {context} tokens {cache} · "
        "working memory {working} · {free} were free",
        "加载前的估算:权重 {weights} · {context} 词元的缓存 {cache} · 工作内存 {working} · "
        "当时可用 {free}",
        "読み込み前の見積もり:重み {weights} · {context} トークンのキャッシュ {cache} · "
        "作業用 {working} · 空き {free}",
    ),
    "thinking": ("Thinking: … {thoughts}", "思考中：… {thoughts}", "思考中: … {thoughts}"),
    "waiting": ("Reading your message …", "正在阅读您的消息……", "メッセージを読んでいます…"),
    "queued": (
        "Number {position} in the queue, about {seconds} s …",
        "排队第 {position} 位,约 {seconds} 秒……",
        "順番待ち {position} 番目、約 {seconds} 秒…",
    ),
    "visitor_busy": (
        "As many replies as one visitor may have at once ({count}) are being written for your "
        "address. Stop one or wait for its end, then send again.",
        "您的地址已有 {count} 条回复正在生成。请先停止其中一条或等待其结束,再发送。",
        "あなたのアドレスへの返信がすでに {count} 件作成中です。どれかを停止するか、"
        "終わるのを待ってから送信してください。",
    ),
    "busy": (
        "A reply is still being written here. Stop it or wait for its end, then send again.",
        "这里还有回复正在生成。请先停止或等待其结束,再发送。",
        "返信を作成中です。停止するか終わるのを待ってから送信してください。",
    ),
    "empty": (
        "The message is empty. Write something first.",
        "消息是空的。请先写点什么。",
        "メッセージが空です。まず何か書いてください。",
    ),
    "nothing_to_regenerate": (
        "There is no reply to regenerate yet. Write a message first.",
        "还没有可以重新生成的回复。请先写一条消息。",
        "再生成する返信がまだありません。先にメッセージを書いてください。",
    ),
    "nothing_to_continue": (
        "The last reply is complete; there is nothing to continue.",
        "上一条回复已完整,没有可继续的内容。",
        "最後の返信は完結しています。続きはありません。",
    ),
    "stale_edit": (
        "That message is no longer shown here, so it was not changed.",
        "该消息已不在此处显示,因此未作修改。",
        "そのメッセージは表示されていないため、変更しませんでした。",
    ),
    "no_reply_yet": (
        "No reply yet. Press Regenerate to get one.",
        "还没有回复。按“重新生成”获取。",
        "返信はまだありません。「再生成」を押してください。",
    ),
    "stopped_before_text": (
        "Stopped before the first word. Press Regenerate to try again.",
        "在第一个字之前已停止。按“重新生成”再试。",
        "最初の語の前に停止しました。「再生成」でやり直せます。",
    ),
    "stopped_while_loading": (
        "Stopped before the model was ready. Your message is back in the box.",
        "模型就绪前已停止。您的消息已放回输入框。",
        "モデルの準備前に停止しました。メッセージは入力欄に戻しました。",
    ),
    "empty_reply": (
        "The model ended its reply without any text. Press Regenerate to try again.",
        "模型没有给出任何文字就结束了。按“重新生成”再试。",
        "モデルは何も書かずに終了しました。「再生成」でやり直せます。",
    ),
    "note": (
        "{tokens} tokens · {speed} tokens/s · first token after {first} s · {finish}",
        "{tokens} 词元 · {speed} 词元/秒 · 首词元 {first} 秒 · {finish}",
        "{tokens} トークン · {speed} トークン/秒 · 最初のトークンまで {first} 秒 · {finish}",
    ),
    "note_short": (
        "{tokens} token(s) · first token after {first} s · {finish}",
        "{tokens} 词元 · 首词元 {first} 秒 · {finish}",
        "{tokens} トークン · 最初のトークンまで {first} 秒 · {finish}",
    ),
    "note_dropped": (
        "{count} earlier messages did not fit and were left out",
        "有 {count} 条较早的消息放不下,已略去",
        "以前の {count} 件は収まらず省かれました",
    ),
    "interrupted": ("interrupted", "已中断", "中断"),
    "finish_stop": ("complete", "完整", "完結"),
    "finish_length": (
        "cut at the longest length: Continue goes on",
        "达到最大长度:可按“继续”",
        "最大長で打ち切り:「続ける」で続行",
    ),
    "finish_tool_calls": ("asks for a tool", "请求调用工具", "ツールを要求"),
    "finish_cancelled": ("stopped", "已停止", "停止"),
    "context_system": ("System", "系统", "システム"),
    "context_history": ("History", "历史", "履歴"),
    "context_query": ("Message", "消息", "メッセージ"),
    "context_left": (
        "{left} of {limit} tokens left for the reply",
        "剩余 {left} / {limit} 词元可用于回复",
        "返信に使える残り {left} / {limit} トークン",
    ),
    "context_budget": (
        "the prompt may take {limit}",
        "提示最多 {limit}",
        "プロンプトは最大 {limit}",
    ),
    "context_ntk": (
        "Longer than the model's training length: dynamic NTK applies, alpha {alpha}.",
        "超过模型的训练长度:启用动态 NTK,alpha = {alpha}。",
        "学習時の長さを超えるため、動的 NTK を適用します(alpha = {alpha})。",
    ),
    "context_dropped": (
        "The {count} oldest messages no longer fit and will be left out:",
        "最早的 {count} 条消息放不下,将被略去:",
        "最も古い {count} 件は収まらないため省かれます:",
    ),
    "other_tab": (
        "Two tabs wrote at the same time. This browser keeps the conversation of the tab that "
        "finishes last: save this one (⚙) before you reload.",
        "两个标签页同时在写。本浏览器只保留最后完成的标签页的对话:刷新前请先保存此对话(⚙)。",
        "2 つのタブで同時に書かれました。このブラウザには最後に終わったタブの会話が残ります。"
        "再読み込みの前にこの会話を保存してください(⚙)。",
    ),
    "unexpected": (
        "Something unexpected went wrong; the server's log has the details. "
        "Your text is kept: try again.",
        "发生意外错误;详情见服务器日志。您的文字已保留,请重试。",
        "予期しない問題が起きました。詳細はサーバーのログにあります。入力は残っています。"
        "もう一度お試しください。",
    ),
}

#: The whole table as Gradio's I18n wants it: locale → key → words.
TRANSLATIONS: Mapping[str, dict[str, str]] = MappingProxyType(
    {
        locale: {key: row[place] for key, row in _TABLE.items()}
        for place, locale in enumerate(LOCALES)
    }
)


class Words:
    """The words of one language."""

    def __init__(self, locale: str) -> None:
        self._words = TRANSLATIONS[locale]

    def __call__(self, key: str, **values: object) -> str:
        """Return the words for a key, with its placeholders filled in."""
        return self._words[key].format(**values)


def words_for(accept_language: str | None) -> Words:
    """Choose the language from a browser's Accept-Language header; English if none fits."""
    for part in (accept_language or "").split(","):
        tag = part.split(";")[0].strip().lower()
        if tag[:2] in LOCALES:
            return Words(tag[:2])
    return Words("en")

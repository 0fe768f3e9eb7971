"""Tools for models whose chat format has none: ReAct, the form that Qwen v1 was taught.

The instruction and every call with its result are folded into the text of users and assistant:
Thought, Action, Action Input, Observation, Final Answer. Knows no tokenizer. Source: what Qwen's
published `openai_api.py` answered when it was run (`tests/data/golden`), with the few differences
that `docs/tools.md` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen.chat_format import ChatFormat, ReplyPlan, Segment, plan_plain_reply
from qwen.errors import InvalidConversation
from qwen.messages import ChatRequest, Message, Tool
from qwen.react_stream import Beginning, ReactReader
from qwen.tool_prompt import must_call, offered_tools, pair_results, wanted_name

#: Where the model would go on with a result of its own making.
STOP = "Observation:"

_ANSWER = "I now know the final answer"


@dataclass(frozen=True, slots=True)
class Folded:
    """A conversation without tool messages.

    Attributes:
        messages: Of system, users and assistant.
        origins: For each of them the index of the first message that it was made of.
        open_text: The beginning of the reply, after a tool's result.
    """

    messages: tuple[Message, ...]
    origins: tuple[int, ...]
    open_text: str = ""


def render_instruction(tools: Sequence[Tool]) -> str:
    """Render what tells a model of its tools; the user's text follows it."""
    described = [
        f"{tool.name}: Call this tool to interact with the {tool.human_name or tool.name} API. "
        f"What is the {tool.human_name or tool.name} API useful for? {tool.description} "
        f"Parameters: {json.dumps(tool.parameters, ensure_ascii=False)}"
        for tool in tools
    ]
    names = ", ".join(tool.name for tool in tools)
    return "\n".join(
        [
            "Answer the following questions as best you can. "
            "You have access to the following APIs:",
            "",
            "\n\n".join(described),
            "",
            "Use the following format:",
            "",
            "Question: the input question you must answer",
            "Thought: you should always think about what to do",
            f"Action: the action to take, should be one of [{names}]",
            "Action Input: the input to the action",
            "Observation: the result of the action",
            "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)",
            f"Thought: {_ANSWER}",
            "Final Answer: the final answer to the original input question",
            "",
            "Begin!",
            "",
            "Question: ",
        ]
    )


def fold_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> Folded:
    """Fold tools, calls and results into a conversation of plain texts.

    As published, the instruction stands before the user's text of the last turn that has an
    answer, and before the newest question only when no turn has one.

    Raises:
        InvalidConversation: A result without its call.
    """
    folded: list[Message] = []
    origins: list[int] = []
    index = 0
    while index < len(messages):
        message, after = messages[index], _end_of_results(messages, index + 1)
        results = messages[index + 1 : after]
        text = _fold_message(message, results, with_tools=bool(tools))
        if message.role == "assistant" and folded and folded[-1].role == "assistant":
            folded[-1] = Message("assistant", f"{folded[-1].content}\n{text}")
        else:
            folded.append(Message(message.role, _trim(text)))
            origins.append(index)
        index = after
    if tools:
        place = _place_of_instruction(folded)
        content = render_instruction(tools) + folded[place].content
        folded[place] = Message("user", content)
    if messages[-1].role != "tool":
        return Folded(tuple(folded), tuple(origins))
    open_text = f"{folded[-1].content}\nThought:"
    return Folded(tuple(folded[:-1]), tuple(origins[:-1]), open_text)


def _end_of_results(messages: Sequence[Message], start: int) -> int:
    while start < len(messages) and messages[start].role == "tool":
        start += 1
    return start


def _fold_message(message: Message, results: Sequence[Message], *, with_tools: bool) -> str:
    """Fold a message and the results after it; a plain answer is marked as one."""
    content = _trim(message.content)
    pairs = pair_results(message.tool_calls, results)
    if not pairs:
        is_answer = message.role == "assistant" and with_tools
        return f"Thought: {_ANSWER}.\nFinal Answer: {content}" if is_answer else content
    thought = content if content.startswith("Thought:") else f"Thought: {content}"
    steps = []
    for call, result in pairs:
        step = f"{thought}\nAction: {call.name}\nAction Input: {call.arguments}"
        if result is not None:
            step += f"\nObservation: {_trim(result.content)}"
        steps.append(step)
        thought = "Thought: "
    return "\n".join(steps)


def _place_of_instruction(messages: Sequence[Message]) -> int:
    """Return the index of the user's message that the instruction stands before."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise InvalidConversation("The conversation has no user message. Send at least one.")
    answered = [i for i in users if messages[i + 1 : i + 2] and messages[i + 1].role != "user"]
    return (answered or users)[-1]


def _trim(content: str) -> str:
    return content.lstrip("\n").rstrip()


class ReactFormat:
    """A `ChatFormat` that brings tools to one that has none.

    A conversation without tools, calls and results is rendered by the inner format as it is.

    Args:
        inner: Renders system, users and assistant.
    """

    def __init__(self, inner: ChatFormat) -> None:
        self._inner = inner

    @property
    def joins_text(self) -> bool:
        """See `ChatFormat.joins_text`."""
        return self._inner.joins_text

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """See `ChatFormat.render_chat`. Everything about tools is plain text."""
        if not tools and not any(m.role == "tool" or m.tool_calls for m in messages):
            return self._inner.render_chat(messages)
        folded = fold_messages(messages, tools)
        segments = [
            segment
            if segment.message is None
            else replace(segment, message=folded.origins[segment.message])
            for segment in self._inner.render_chat(folded.messages)
        ]
        return [*segments, Segment(folded.open_text, is_control=False)]

    def plan_reply(self, request: ChatRequest) -> ReplyPlan:
        """See `ChatFormat.plan_reply`.

        After a tool's result the reply goes on behind "Thought:". Where no tool is offered
        there, it is made to be the answer.
        """
        resumes = bool(request.messages) and request.messages[-1].role == "tool"
        lead = " " if resumes else "Thought: "
        begun = request.reply_prefix
        answer = f"{lead}{_ANSWER}.\nFinal Answer:{' ' if begun else ''}{begun}"
        if not offered_tools(request):
            if not resumes:
                return plan_plain_reply(request)
            reader = None if begun else _reader("answer", calls=False)
            return ReplyPlan(prefix=_text(answer), build_reader=reader)
        stop = (*bare_stops(request.params.stop), STOP)
        if must_call(request):
            name = wanted_name(request)
            call = "\nAction:" if name is None else f"\nAction: {name}\nAction Input:"
            return ReplyPlan(
                prefix=_text(f"{lead}{begun}{call}"),
                stop=stop,
                build_reader=_reader("thought"),
                heard=call,
            )
        if begun:
            return ReplyPlan(prefix=_text(answer), stop=stop, build_reader=_reader("plain"))
        return ReplyPlan(stop=stop, build_reader=_reader("thought" if resumes else "reply"))


def _reader(begins: Beginning, *, calls: bool = True) -> Callable[[], ReactReader]:
    return lambda: ReactReader(begins, reads_calls=calls)


def _text(text: str) -> tuple[Segment, ...]:
    return (Segment(text, is_control=False),)


def bare_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Return stop strings without the line breaks before them, where that gives new ones.

    As published: a reply may begin with what elsewhere stands on a line of its own.
    """
    bare = [stop.lstrip("\n") for stop in stops]
    return tuple(dict.fromkeys(stop for stop in bare if stop and stop not in stops))

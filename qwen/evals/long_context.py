"""How well a model predicts a text behind a long context: teacher forcing in chunks.

Memory stays bounded: a cache grows with the text, and logits exist for one chunk at a time. Knows
no files and no reports. Dynamic NTK and log-n are switched on the model's own configuration, so a
model that is measured must not answer requests meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen.errors import InvalidRequest

#: Tokens read at once. Logits of 152,064 float32 for each of them take 0.3 GB.
CHUNK = 512

#: Rows of logits that are made float32 at once.
_SLICE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A way of running a Qwen v1 model on long contexts.

    Attributes:
        title: As in the table of Qwen's README.
    """

    name: str
    title: str
    use_dynamic_ntk: bool
    use_logn_attn: bool


ROWS = {
    row.name: row
    for row in (
        Row("plain", "plain", False, False),
        Row("ntk", "+ dynamic NTK", True, False),
        Row("ntk-logn", "+ dynamic NTK + log-n", True, True),
    )
}


def is_qwen_v1(model: Any) -> bool:
    """Tell whether dynamic NTK and log-n can be switched on a model."""
    return bool(model.config.model_type == "qwen")


def check_rows(model: Any, names: Sequence[str]) -> None:
    """Refuse rows that a model does not have.

    Raises:
        InvalidRequest: With what can be measured.
    """
    switched = [name for name in names if name != "plain"]
    if switched and not is_qwen_v1(model):
        raise InvalidRequest(
            f"The row {switched[0]} is for Qwen v1 (model_type qwen); this model is of the kind "
            f"'{model.config.model_type}', which has neither dynamic NTK nor log-n. Measure "
            "--rows plain, or convert it first (python -m qwen.convert … --to qwen1)."
        )


@contextmanager
def switched(model: Any, row: Row) -> Iterator[None]:
    """Run a model in the way of a row; afterwards it is as before."""
    if not is_qwen_v1(model):
        yield
        return
    config = model.config
    before = config.use_dynamic_ntk, config.use_logn_attn
    config.use_dynamic_ntk, config.use_logn_attn = row.use_dynamic_ntk, row.use_logn_attn
    try:
        yield
    finally:
        config.use_dynamic_ntk, config.use_logn_attn = before


def is_like_plain(model: Any, length: int) -> bool:
    """Tell whether all rows are one model: up to the trained length nothing is stretched."""
    return not is_qwen_v1(model) or length <= model.config.seq_length


def ignore_chunk(done: int) -> None:
    """Report to nobody."""


class TeacherForcing:
    """One sequence that is read token by token as given, and scored on the way.

    Args:
        model: A causal language model of Transformers in eval mode; not changed.
        prompt_length: Tokens of the whole prompt, which fix the alpha of dynamic NTK.
        chunk: Tokens read at once.
    """

    def __init__(self, model: Any, *, prompt_length: int, chunk: int = CHUNK) -> None:
        from transformers import DynamicCache

        self._model = model
        self._chunk = chunk
        self._cache: Any = DynamicCache(config=model.config)
        self._options = {"prompt_length": prompt_length} if is_qwen_v1(model) else {}

    @torch.inference_mode()
    def losses(
        self, ids: Sequence[int], targets: Sequence[int], on_chunk: Callable[[int], None]
    ) -> Tensor:
        """Read tokens and score what follows each of them.

        Args:
            ids: Read after what was read before.
            targets: The true next token of each; fewer leave the last ones unscored.
            on_chunk: Called with how many were read; may raise to stop.

        Returns:
            (len(targets),), float32: -log p(target), in nats.
        """
        scored = []
        wanted = torch.tensor(targets, dtype=torch.int64)
        for start in range(0, len(ids), self._chunk):
            piece = torch.tensor(ids[start : start + self._chunk], device=self._model.device)
            known = wanted[start : start + self._chunk].to(self._model.device)
            output = self._model(
                piece[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if len(known) else 1,
                **self._options,
            )
            for first in range(0, len(known), _SLICE):
                part = known[first : first + _SLICE]
                logits = output.logits[0, first : first + len(part)].float()
                scored.append(torch.nn.functional.cross_entropy(logits, part, reduction="none"))
            on_chunk(min(start + self._chunk, len(ids)))
        return torch.cat(scored).cpu() if scored else torch.empty(0)


def window_losses(
    model: Any,
    ids: Sequence[int],
    *,
    chunk: int = CHUNK,
    on_chunk: Callable[[int], None] = ignore_chunk,
) -> Tensor:
    """Score a window of text that is the whole prompt.

    Every token but the first is predicted from all before it in the window; the first has nothing
    before it and is not counted. No token is put in front.

    Args:
        model: See `TeacherForcing`.
        ids: The window, at least 2 tokens.
        chunk: Tokens read at once.
        on_chunk: Called with how many tokens were read; may raise to stop.

    Returns:
        (len(ids) - 1,), float32: -log p, in nats.
    """
    forcing = TeacherForcing(model, prompt_length=len(ids), chunk=chunk)
    return forcing.losses(ids, ids[1:], on_chunk)


def policy_losses(
    model: Any,
    ids: Sequence[int],
    *,
    prompt_length: int,
    chunk: int = CHUNK,
    on_chunk: Callable[[int], None] = ignore_chunk,
) -> tuple[Tensor, Tensor]:
    """Score a reply to a prompt under both NTK policies, the text standing for what is generated.

    As `qwen.engine` does it: "published" keeps the alpha of the prompt; "grow" reads the sequence
    again when it has become so long that a prompt of that length would get another alpha.

    Args:
        model: A Qwen v1 with dynamic NTK.
        ids: Prompt and reply.
        prompt_length: Tokens of the prompt.
        chunk: Tokens read at once.
        on_chunk: Called with how many tokens of a reading were read; may raise to stop.

    Returns:
        -log p, in nats, of each token of the reply: "published" and "grow", both
        (len(ids) - prompt_length,), float32.
    """
    alpha = model.config.ntk_alpha
    lengths = range(prompt_length + 1, len(ids))
    rereads = [length for length in lengths if alpha(length) != alpha(length - 1)]

    def read(start: int, end: int) -> Tensor:
        """Read a sequence of `start` tokens anew, then score what follows up to `end`."""
        forcing = TeacherForcing(model, prompt_length=start, chunk=chunk)
        forcing.losses(ids[: start - 1], (), on_chunk)
        return forcing.losses(ids[start - 1 : end - 1], ids[start:end], on_chunk)

    published = read(prompt_length, len(ids))
    parts = [published[: rereads[0] - prompt_length] if rereads else published]
    for start, end in zip(rereads, [*rereads[1:], len(ids)], strict=True):
        parts.append(read(start, end))
    return published, torch.cat(parts)


def window_starts(corpus_length: int, length: int, windows: int) -> list[int]:
    """Choose where windows begin: spread evenly over a text, never overlapping.

    Returns:
        As many starts as asked for, or fewer where the text is too short for them.

    Raises:
        InvalidRequest: It is too short for one.
    """
    fitting = min(windows, corpus_length // length)
    if fitting < 1:
        raise InvalidRequest(
            f"The text has {corpus_length:,} tokens, too few for a window of {length:,}. Name a "
            "longer text, or shorter --lengths."
        )
    return [index * (corpus_length // fitting) for index in range(fitting)]

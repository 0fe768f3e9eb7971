"""The text that a quantised model is tuned on: what there is, and what the dense model writes.

Three of four rows are the dense model's own samples, as in LLM-QAT (Liu et al., arXiv:2305.17888):
they need no data set, and reach what the model knows far beyond the text that comes along. The
openings are requests on many topics (`qwen.tuning_prompts`), pieces of that text, and single
tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from qwen.backend import ReportProgress
from qwen.ntk_cache import NtkLayer

#: Text that there is little of is read so often at most; what the model writes fills the rest.
_PASSES = 4
#: Of all rows; the text that a step is judged by.
HELD_OUT = 24
#: Rows of the dense model's own for each row of other text.
OWN_ROWS = 3
#: Longest opening, tokens.
_OPENING = 32
#: Rows that are sampled at once; more are no faster.
_MOST_ROWS = 2048
_CPU_ROWS = 32

#: Of the rows in turn. What people write surprises a model more than what it would write itself.
TEMPERATURES = (1.0, 1.0, 1.0, 1.25)

Row = Sequence[int]


@dataclass(frozen=True, slots=True)
class TuningText:
    """Rows of token ids, all of one length.

    Attributes:
        rows: (rows, seq_len) int64, in the order in which they are read.
        held_out: Likewise; rows that are not among the others.
    """

    rows: Tensor
    held_out: Tensor


def collect_rows(texts: Iterable[Sequence[int]], *, length: int, most: int) -> list[Row]:
    """Join texts of a kind and cut them into rows; what is left over is dropped."""
    stream = (token for text in texts for token in text)
    rows: list[Row] = []
    while len(rows) < most and len(row := list(islice(stream, length))) == length:
        rows.append(row)
    return rows


def build_openings(
    kinds: Sequence[Sequence[Row]],
    ordinary: Sequence[int],
    *,
    count: int,
    prompts: Sequence[Row] = (),
    seed: int = 0,
) -> list[Row]:
    """Choose openings: pieces of the first kind of text, of the others, and single tokens.

    Args:
        kinds: Rows of each kind, the most varied one first; kinds without any are left out.
        ordinary: Tokens to begin with.
        count: How many, with the prompts.
        prompts: Openings that are whole already, dealt among the others in turn.
        seed: The same one gives the same openings.
    """
    chance = random.Random(seed)
    filled = [kind for kind in kinds if kind]
    turns: list[Sequence[Row]] = [[]]  # an empty kind stands for single tokens
    if filled:
        turns = [kind for other in filled[1:] or [[]] for kind in (filled[0], [], other)]
    openings: list[Row] = []
    for turn in islice(cycle(turns), count - len(prompts)):
        if not turn:
            openings.append([chance.choice(ordinary)])
            continue
        row = chance.choice(turn)
        length = chance.randint(1, min(_OPENING, len(row)))
        start = chance.choice((0, chance.randint(0, len(row) - length)))
        openings.append(row[start : start + length])
    openings += prompts
    chance.shuffle(openings)
    return openings


@torch.no_grad()
def sample_rows(
    model: Any, openings: Sequence[Row], *, length: int, report: ReportProgress, seed: int = 0
) -> Tensor:
    """Let a model go on from openings, from its whole distribution; see `TEMPERATURES`.

    An end-of-text token ends nothing: what follows is another text.

    Args:
        model: A causal language model.
        openings: One for each row, none empty or longer than a row.
        length: Tokens of a row, with its opening.
        report: Is told what is being done.
        seed: Of the sampling.

    Returns:
        (openings, length) int64 on the host.
    """
    device = model.get_output_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    size = _rows_at_once(model, length, device)
    done = []
    for start in range(0, len(openings), size):
        part = openings[start : start + size]
        width = max(map(len, part))
        given = torch.full((len(part), length), -1)
        for row, opening in zip(given, part, strict=True):
            row[: len(opening)] = torch.tensor(opening)
        done.append(_sample(model, given.to(device), width, generator).cpu())
        rows = min(start + size, len(openings))
        report(f"The dense model has written {rows * length:,} tokens to tune on")
    return torch.cat(done)


def _sample(model: Any, given: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Fill what is -1 in (rows, length); no row is given more than `width` tokens."""
    cache: Any = roomy_cache(model.config, length=given.shape[1])
    heat = torch.tensor(list(islice(cycle(TEMPERATURES), len(given))), device=given.device)
    for at in range(1, given.shape[1]):
        # Not cuDNN's attention: the first rows, when every length is new to it, took three times
        # as long as later ones.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            output = model(input_ids=given[:, at - 1 : at], past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1].float().div_(heat[:, None])
        # The largest of log p + Gumbel noise is a sample; `multinomial` takes several passes more.
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        sampled = logits.sub_(noise).argmax(-1)
        known = given[:, at] if at < width else None
        given[:, at] = sampled if known is None else torch.where(known < 0, sampled, known)
    return given


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that has its memory from the start.

    One that grows by a token asks for new memory at every step and copies itself there.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._stores: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self._stores:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            shape = (rows, heads, self._length, width)
            self._stores = (key_states.new_empty(shape), value_states.new_empty(shape))
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values


class _RoomyNtkLayer(NtkLayer, _RoomyLayer):  # type: ignore[no-untyped-call]
    """The same for Qwen v1."""


def roomy_cache(config: Any, *, length: int) -> Cache:
    """Return an empty cache with room for so many tokens."""
    layers: list[Any] = [_RoomyNtkLayer(length) for _ in range(config.num_hidden_layers)]
    return Cache(layers=layers)


def _rows_at_once(model: Any, length: int, device: torch.device) -> int:
    """Return how many rows a third of the free memory holds, with their caches and logits."""
    if device.type != "cuda":
        return _CPU_ROWS
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * heads * width * length
    logits = 4 * 4 * config.vocab_size
    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(_MOST_ROWS, int(free / 3 / (cache + logits))))


def mix_rows(kinds: Sequence[Sequence[Row]], written: Tensor, *, count: int) -> TuningText:
    """Deal rows: some of the model's own, one of a kind of text, and so on in turn.

    Args:
        kinds: Rows of each kind of text.
        written: (rows, seq_len), by the dense model; more than `HELD_OUT` rows.
        count: Rows to be read; held-out ones come on top.
    """
    # An eighth of what a kind has at most: there is little of some.
    shares = [min(HELD_OUT // 6, len(kind) // 8) for kind in kinds]
    held_out = [row for kind, share in zip(kinds, shares, strict=True) for row in kind[:share]]
    own = written.tolist()
    spare = HELD_OUT - len(held_out)
    real = [
        _repeated(kind[share:], _PASSES) for kind, share in zip(kinds, shares, strict=True) if kind
    ]
    dealt = _dealt(real, _repeated(own[spare:], count))
    rows = list(islice(dealt, count))
    return TuningText(torch.tensor(rows), torch.tensor([*held_out, *own[:spare]]))


def _repeated(rows: Sequence[Row], times: int) -> Iterator[Row]:
    for number in range(times):
        order = list(rows)
        random.Random(number).shuffle(order)
        yield from order


def _dealt(kinds: Sequence[Iterator[Row]], own: Iterator[Row]) -> Iterator[Row]:
    waiting = list(kinds)
    for number, row in enumerate(own):
        yield row
        while waiting and number % OWN_ROWS == 0:
            kind = waiting[number // OWN_ROWS % len(waiting)]
            found = next(kind, None)
            if found is not None:
                yield found
                break
            waiting.remove(kind)

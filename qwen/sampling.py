"""Logits → token: repetition penalty, temperature, top-k, top-p, in Transformers' order and sense.

Knows logits and nothing of models, caches or text. Source of the semantics: the
logits processors of Transformers 5 (RepetitionPenalty, Temperature, TopK, TopP); the parity is
tested. A whole vocabulary is sorted only where nothing smaller will do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen.errors import BackendFailed
from qwen.messages import SamplingParams

#: With top_p alone, the likeliest tokens that are tried before the whole vocabulary is sorted.
_SHORTLIST = 1024

#: Beyond top_k, so many tokens at least are looked at for ties with the k-th.
_SPARE = 64

#: Tokens that were chosen since the seen ones were last put together on the device.
_SEEN_APART = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; the log-probabilities are those of `EngineStep`."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one reply; owns its random generator, so requests never interfere.

    Not for use from several threads at once.

    Args:
        params: How to choose.
        prompt_ids: What the repetition penalty counts as seen from the start.
        device: Of the logits.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], *, device: torch.device
    ) -> None:
        self._params = params
        self._counts_seen = params.repetition_penalty != 1.0
        self._seen_ids = set(prompt_ids) if self._counts_seen else set()
        self._seen = torch.tensor(sorted(self._seen_ids), dtype=torch.int64, device=device)
        self._seen_since: list[int] = []  # not in the tensor yet
        self._drawn: float | None = None
        # On the CPU whatever the device, so that a seed means the same draws everywhere.
        self._generator = torch.Generator("cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def key(self) -> Hashable:
        """Equal for samplers that `propose_rows` takes together."""
        params = self._params
        cuts = params.temperature, params.top_k, params.top_p
        return *cuts, params.repetition_penalty, params.top_logprobs

    def choose(self, logits: Tensor) -> Choice:
        """Choose the next token and remember it as seen.

        Args:
            logits: (vocab_size,), any float type; not changed.

        Raises:
            BackendFailed: The largest logit is NaN or infinite.
        """
        return self.accept(propose_rows([self], logits[None])[0].tolist())

    def accept(self, values: Sequence[float]) -> Choice:
        """Take what `propose_rows` computed and remember the token as seen.

        Raises:
            BackendFailed: As `choose`.
        """
        if not math.isfinite(values[0]):
            raise BackendFailed(
                "The model computed values that are not numbers, so no token can be chosen. "
                "Start the server with --dtype float32 or bfloat16, or try another checkpoint."
            )
        token_id, self._drawn = int(values[1]), None
        if self._counts_seen and token_id not in self._seen_ids:
            self._seen_ids.add(token_id)
            self._seen_since.append(token_id)
        if self._params.top_logprobs is None:
            return Choice(token_id)
        count = (len(values) - 3) // 2
        ids = [int(value) for value in values[3 : 3 + count]]
        return Choice(token_id, values[2], tuple(zip(ids, values[3 + count :], strict=True)))

    def seen(self) -> tuple[Tensor, list[int]]:
        """Return what the repetition penalty counts: distinct ids on the device, and the latest."""
        if len(self._seen_since) >= _SEEN_APART:
            self._seen = torch.cat([self._seen, self._seen.new_tensor(self._seen_since)])
            self._seen_since = []
        return self._seen, self._seen_since

    def draw(self) -> float:
        """Draw a uniform number from 0 to 1; the same until a token is accepted."""
        if self._drawn is None:
            self._drawn = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return self._drawn


def propose_rows(samplers: Sequence[Sampler], logits: Tensor) -> Tensor:
    """Compute the choices of several replies at once, without waiting for the device.

    Args:
        samplers: Of the rows, all with the same `key`.
        logits: (rows, vocab_size), any float type; not changed.

    Returns:
        (rows, n), float64, each row for its sampler's `accept`: so that all cross to the CPU at
        once.
    """
    params = samplers[0]._params
    scores = logits
    if params.repetition_penalty != 1.0:
        seen = [sampler.seen() for sampler in samplers]
        scores = penalize_seen(logits.float(), _places(seen, logits), params.repetition_penalty)
    if params.temperature == 0:
        largest, token = scores.max(1)  # a NaN is the largest
    else:
        largest, probabilities, ids = _candidates(scores.float(), params)
        uniform = torch.tensor([[sampler.draw()] for sampler in samplers], dtype=torch.float64)
        uniform = uniform.to(logits.device, non_blocking=True)
        token = ids.gather(1, _draw(probabilities, uniform))[:, 0]
    parts = [largest.double()[:, None], token.double()[:, None]]
    if params.top_logprobs is not None:
        logprobs = logits.double() - logits.double().logsumexp(1, keepdim=True)
        top = logprobs.topk(min(params.top_logprobs, logits.shape[1]))
        parts += [logprobs.gather(1, token[:, None]), top.indices.double(), top.values]
    return torch.cat(parts, dim=1)


def _places(seen: Sequence[tuple[Tensor, list[int]]], logits: Tensor) -> Tensor:
    """Return where in flattened logits the tokens lie that each row has seen."""
    rows, vocab_size = logits.shape
    latest = [row * vocab_size + token for row in range(rows) for token in seen[row][1]]
    earlier = [ids + row * vocab_size if row else ids for row, (ids, _) in enumerate(seen)]
    if latest:
        earlier.append(torch.tensor(latest).to(logits.device, non_blocking=True))
    return torch.cat(earlier)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index (rows, 1) of (rows, n) probabilities, by uniform numbers (rows, 1)."""
    cumulative = probabilities.cumsum(1, dtype=torch.float64)
    # Against the last sum instead of 1, so that rounding cannot lead past the end.
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform, right=True)
    return place.clamp(max=probabilities.shape[1] - 1)


def penalize_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (penalty > 1) or more.

    Args:
        logits: Float32, of any shape.
        seen: (n,), int64, distinct places in the flattened logits.
        penalty: Positive logits are divided by it, negative ones multiplied.

    Returns:
        A new tensor of the same shape.
    """
    flat = logits.reshape(-1)
    scores = flat[seen]
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return flat.index_copy(0, seen, scores).view(logits.shape)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be chosen, as Transformers' warpers leave them.

    Args:
        logits: (vocab_size,), float32, the largest one finite.
        params: Its temperature is above 0.

    Returns:
        Probabilities (n,), float32, likeliest first unless nothing is cut off, and ids (n,), int64.
        A token that is cut off may be among them, with a probability of 0.
    """
    _, probabilities, ids = _candidates(logits[None], params)
    return probabilities[0], ids[0]


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, which may be no number, and what `candidates` returns."""
    if params.top_k == 0:
        largest = logits.amax(1)
        scores = _scaled(logits, largest, params.temperature)
        if params.top_p == 1.0:
            ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            return largest, scores.softmax(1), ids
        return largest, *_nucleus_of_all(scores, params.top_p)
    k = min(params.top_k, logits.shape[1])
    top = logits.topk(min(k + max(k, _SPARE), logits.shape[1]))
    largest, scores, ids = top.values[:, 0], top.values, top.indices
    scores = _scaled(scores, largest, params.temperature)
    is_cut = scores.shape[1] < logits.shape[1]
    if not scores.is_cuda and is_cut and bool((scores[:, -1] >= scores[:, k - 1]).any()):
        # More ties than were looked at. A GPU would have to be waited for only to see this.
        scores, ids = _scaled(logits, largest, params.temperature).sort(
            descending=True, stable=True
        )
    # As in Transformers, tokens that tie with the k-th stay; ties are common in bfloat16.
    scores = scores.masked_fill(scores < scores[:, k - 1 : k], -torch.inf)
    return largest, _nucleus(scores.softmax(1), params.top_p), ids


def _scaled(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    # Shifted first, which a softmax does not see: a tiny temperature then leads towards -inf,
    # a probability of 0, and never to inf. Below 1e-6 a float32 would divide by zero.
    return (logits - largest[:, None]) / max(temperature, 1e-6)


def _nucleus_of_all(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    probabilities = scores.softmax(1)
    shortlist, ids = probabilities.topk(min(_SHORTLIST, scores.shape[1]))
    if bool((shortlist.sum(1) < top_p).any()):
        shortlist, ids = probabilities.sort(descending=True, stable=True)
    return _nucleus(shortlist, top_p), ids


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens that together have `top_p`; takes and returns descending order."""
    if top_p == 1.0:
        return probabilities
    before = probabilities.cumsum(1) - probabilities
    before[:, 0] = 0.0  # the likeliest one is always kept
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return kept / kept.sum(1, keepdim=True)

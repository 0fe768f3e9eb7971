"""Logits → token: repetition penalty, temperature, top-k, top-p, in Transformers' order and sense.

Knows one sequence's logits and nothing of models, caches or text. Source of the semantics: the
logits processors of Transformers 5 (RepetitionPenalty, Temperature, TopK, TopP); the parity is
tested. A whole vocabulary is sorted only where nothing smaller will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen.errors import BackendFailed
from qwen.messages import SamplingParams

#: With top_p alone, the likeliest tokens that are tried before the whole vocabulary is sorted.
_SHORTLIST = 1024

#: Beyond top_k, so many tokens at least are looked at for ties with the k-th.
_SPARE = 64


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
        # On the CPU whatever the device, so that a seed means the same draws everywhere.
        self._generator = torch.Generator("cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor) -> Choice:
        """Choose the next token and remember it as seen.

        Args:
            logits: (vocab_size,), any float type; not changed.

        Raises:
            BackendFailed: The largest logit is NaN or infinite.
        """
        return self.accept(self.propose(logits).tolist())

    def propose(self, logits: Tensor) -> Tensor:
        """Compute a choice without waiting for the device.

        Args:
            logits: See `choose`.

        Returns:
            (n,), float64, for `accept`: so that those of several replies cross to the CPU at once.
        """
        raw = logits.float()
        scores = raw
        if self._counts_seen:
            scores = penalize_seen(raw, self._seen, self._params.repetition_penalty)
        if self._params.temperature == 0:
            largest, token = scores.max(0)  # a NaN is the largest
        else:
            largest, probabilities, ids = _candidates(scores, self._params)
            token = ids[self._draw(probabilities)]
        parts = [largest.double().view(1), token.double().view(1)]
        if self._params.top_logprobs is not None:
            logprobs = raw.double() - raw.double().logsumexp(0)
            top = logprobs.topk(min(self._params.top_logprobs, len(logprobs)))
            parts += [logprobs[token].view(1), top.indices.double(), top.values]
        return torch.cat(parts)

    def accept(self, values: Sequence[float]) -> Choice:
        """Take what `propose` computed and remember the token as seen.

        Raises:
            BackendFailed: As `choose`.
        """
        if not math.isfinite(values[0]):
            raise BackendFailed(
                "The model computed values that are not numbers, so no token can be chosen. "
                "Start the server with --dtype float32 or bfloat16, or try another checkpoint."
            )
        token_id = int(values[1])
        if self._counts_seen and token_id not in self._seen_ids:
            self._seen_ids.add(token_id)
            self._seen = torch.cat([self._seen, self._seen.new_tensor([token_id])])
        if self._params.top_logprobs is None:
            return Choice(token_id)
        count = (len(values) - 3) // 2
        ids = [int(value) for value in values[3 : 3 + count]]
        return Choice(token_id, values[2], tuple(zip(ids, values[3 + count :], strict=True)))

    def _draw(self, probabilities: Tensor) -> Tensor:
        """Draw an index (1,) of (n,) probabilities with one uniform number."""
        cumulative = probabilities.cumsum(0, dtype=torch.float64)
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        # Against the last sum instead of 1, so that rounding cannot lead past the end.
        place = torch.searchsorted(cumulative, cumulative[-1:] * uniform, right=True)
        return place.clamp(max=len(probabilities) - 1)


def penalize_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (penalty > 1) or more.

    Args:
        logits: (vocab_size,), float32.
        seen: (n,), int64, distinct ids.
        penalty: Positive logits are divided by it, negative ones multiplied.

    Returns:
        A new tensor of the same shape.
    """
    scores = logits[seen]
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.index_copy(0, seen, scores)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be chosen, as Transformers' warpers leave them.

    Args:
        logits: (vocab_size,), float32, the largest one finite.
        params: Its temperature is above 0.

    Returns:
        Probabilities (n,), float32, likeliest first unless nothing is cut off, and ids (n,), int64.
        A token that is cut off may be among them, with a probability of 0.
    """
    return _candidates(logits, params)[1:]


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit, which may be no number, and what `candidates` returns."""
    if params.top_k == 0:
        largest = logits.max()
        scores = _scaled(logits, largest, params.temperature)
        if params.top_p == 1.0:
            return largest, scores.softmax(0), torch.arange(len(scores), device=scores.device)
        return largest, *_nucleus_of_all(scores, params.top_p)
    k = min(params.top_k, len(logits))
    top = logits.topk(min(k + max(k, _SPARE), len(logits)))
    largest, scores, ids = top.values[0], top.values, top.indices
    scores = _scaled(scores, largest, params.temperature)
    if not scores.is_cuda and len(scores) < len(logits) and bool(scores[-1] >= scores[k - 1]):
        # More ties than were looked at. A GPU would have to be waited for only to see this.
        every = _scaled(logits, largest, params.temperature)
        ids = (every >= scores[k - 1]).nonzero()[:, 0]
        scores, order = every[ids].sort(descending=True, stable=True)
        ids = ids[order]
    # As in Transformers, tokens that tie with the k-th stay; ties are common in bfloat16.
    scores = scores.masked_fill(scores < scores[k - 1], -torch.inf)
    return largest, _nucleus(scores.softmax(0), params.top_p), ids


def _scaled(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    # Shifted first, which a softmax does not see: a tiny temperature then leads towards -inf,
    # a probability of 0, and never to inf. Below 1e-6 a float32 would divide by zero.
    return (logits - largest) / max(temperature, 1e-6)


def _nucleus_of_all(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    probabilities = scores.softmax(0)
    shortlist, ids = probabilities.topk(min(_SHORTLIST, len(scores)))
    if float(shortlist.sum()) < top_p:
        shortlist, ids = probabilities.sort(descending=True, stable=True)
    return _nucleus(shortlist, top_p), ids


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens that together have `top_p`; takes and returns descending order."""
    if top_p == 1.0:
        return probabilities
    before = probabilities.cumsum(0) - probabilities
    before[0] = 0.0  # the likeliest one is always kept
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return kept / kept.sum()

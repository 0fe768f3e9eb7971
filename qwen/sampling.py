"""Logits → token: repetition penalty, temperature, top-k, top-p, in Transformers' order and sense.

Knows one sequence's logits and nothing of models, caches or text. Source of the semantics: the
logits processors of Transformers 5 (RepetitionPenalty, Temperature, TopK, TopP); the parity is
tested. A whole vocabulary is sorted only where nothing smaller will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen.errors import BackendFailed
from qwen.messages import SamplingParams

#: With top_p alone, the likeliest tokens that are tried before the whole vocabulary is sorted.
_SHORTLIST = 1024


class Sampler:
    """Chooses the tokens of one reply; owns its random generator, so requests never interfere.

    Not for use from several threads at once.

    Args:
        params: How to choose.
        prompt_ids: (prompt_len,), int64, on the logits' device: what the repetition penalty
            counts as seen from the start.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Tensor) -> None:
        self._params = params
        self._seen = torch.unique(prompt_ids) if params.repetition_penalty != 1.0 else None
        # On the CPU whatever the device, so that a seed means the same draws everywhere.
        self._generator = torch.Generator("cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor) -> int:
        """Choose the next token and remember it as seen.

        Args:
            logits: (vocab_size,), any float type; not changed.

        Raises:
            BackendFailed: The largest logit is NaN or infinite.
        """
        logits = logits.float()
        if self._seen is not None:
            logits = penalize_seen(logits, self._seen, self._params.repetition_penalty)
        if not bool(torch.isfinite(logits.max())):  # max() passes a NaN on
            raise BackendFailed(
                "The model computed values that are not numbers, so no token can be chosen. "
                "Start the server with --dtype float32 or bfloat16, or try another checkpoint."
            )
        if self._params.temperature == 0:
            token_id = int(logits.argmax())
        else:
            probabilities, ids = candidates(logits, self._params)
            token_id = int(ids[self._draw(probabilities)])
        if self._seen is not None and not bool((self._seen == token_id).any()):
            self._seen = torch.cat([self._seen, self._seen.new_tensor([token_id])])
        return token_id

    def _draw(self, probabilities: Tensor) -> int:
        """Draw an index of (n,) probabilities with one uniform number."""
        cumulative = probabilities.cumsum(0, dtype=torch.float64)
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        # Against the last sum instead of 1, so that rounding cannot lead past the end.
        place = torch.searchsorted(cumulative, cumulative[-1:] * uniform, right=True)
        return min(int(place), len(probabilities) - 1)


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
    """
    # Shifted first, which a softmax does not see: a tiny temperature then leads towards -inf,
    # a probability of 0, and never to inf. Below 1e-6 a float32 would divide by zero.
    scores = (logits - logits.max()) / max(params.temperature, 1e-6)
    if params.top_k == 0 and params.top_p == 1.0:
        return scores.softmax(0), torch.arange(len(scores), device=scores.device)
    if params.top_k == 0:
        return _nucleus_of_all(scores, params.top_p)
    kth = scores.topk(min(params.top_k, len(scores))).values[-1]
    # As in Transformers, tokens that tie with the k-th stay; ties are common in bfloat16.
    ids = (scores >= kth).nonzero()[:, 0]
    values, order = scores[ids].sort(descending=True, stable=True)
    return _nucleus(values.softmax(0), ids[order], params.top_p)


def _nucleus_of_all(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    probabilities = scores.softmax(0)
    shortlist, ids = probabilities.topk(min(_SHORTLIST, len(scores)))
    if float(shortlist.sum()) < top_p:
        shortlist, ids = probabilities.sort(descending=True, stable=True)
    return _nucleus(shortlist, ids, top_p)


def _nucleus(probabilities: Tensor, ids: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Keep the fewest tokens that together have `top_p`; takes and returns descending order."""
    if top_p == 1.0:
        return probabilities, ids
    before = probabilities.cumsum(0) - probabilities
    kept = max(int((before < top_p).sum()), 1)
    return probabilities[:kept] / probabilities[:kept].sum(), ids[:kept]

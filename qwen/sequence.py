"""One request's tokens, what of them was read, and how the next one is chosen.

Knows neither other requests nor threads; used in `torch.inference_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qwen.messages import SamplingParams
from qwen.readers import Readers, Reading, SequenceReader
from qwen.sampling import Sampler

#: Prompt tokens read between two looks at `cancel` while nobody else has a reply running. Measured
#: on 2 CPU cores with the embedded default: 256 take 0.4 s, at 0.94 of the speed of 1,024 at once;
#: 128 reach 0.8 of it, 64 0.6.
PREFILL_CHUNK = 256

#: The same on a GPU: 2,048 take 0.05 s of a 7B model on an H200, chunks of 256 nearly three times.
PREFILL_CHUNK_GPU = 2048


def prefill_chunk(device: torch.device) -> int:
    """Return how many tokens of a prompt are read at a time."""
    return PREFILL_CHUNK_GPU if device.type == "cuda" else PREFILL_CHUNK


class SequenceState:
    """A request's sequence while it runs.

    Attributes:
        sampler: Chooses its tokens.

    Args:
        readers: Begins it.
        ids: The prompt.
        params: How tokens are chosen.
        expected: Tokens that prompt and reply will have at most.
        ntk_alpha: For the `grow` policy; None keeps the prompt's alpha.
    """

    def __init__(
        self,
        readers: Readers,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        expected: int,
        ntk_alpha: Callable[[int], int] | None,
    ) -> None:
        self._ids = list(ids)
        self._expected, self._ntk_alpha = expected, ntk_alpha
        self.sampler = Sampler(params, ids, device=readers.device)
        self._reader: SequenceReader | None = None
        self.start(readers)

    def start(self, readers: Readers) -> None:
        """Have the model read all tokens there are, from the beginning."""
        self._alpha_length = len(self._ids)
        if self._reader is not None:  # freed before the next one grows
            self._reader.close(keep=True)
        self._reader = None
        chunk = prefill_chunk(readers.device)
        self._reader = readers.start(self._ids, chunk=chunk, expected=self._expected)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the reply so far."""
        return len(self._ids)

    @property
    def num_unread(self) -> int:
        """Tokens that have to be read before the next one can be chosen."""
        assert self._reader is not None
        return len(self._ids) - self._reader.num_read

    def reading(self, size: int, *, is_last: bool = False) -> Reading:
        """Return the next tokens to read, so many at most.

        Args:
            size: Tokens.
            is_last: No token is chosen after them.
        """
        assert self._reader is not None
        first = self._reader.num_read
        ids = self._ids[first : first + size]
        wants_logits = not is_last and first + len(ids) == len(self._ids)
        return Reading(self._reader, ids, wants_logits=wants_logits)

    @property
    def reader(self) -> SequenceReader:
        """What reads it."""
        assert self._reader is not None
        return self._reader

    def append(self, token_id: int) -> None:
        """Take a token into the sequence, as the one to be read next."""
        self._ids.append(token_id)

    @property
    def has_outgrown_alpha(self) -> bool:
        """Whether a prompt as long as the sequence now is would get another alpha: `start` anew."""
        alpha = self._ntk_alpha
        return alpha is not None and alpha(len(self._ids)) != alpha(self._alpha_length)

    def close(self, *, keep: bool = True) -> None:
        """Let go of the sequence's memory, or keep it for reuse where that may be."""
        if self._reader is not None:
            self._reader.close(keep=keep)
        self._reader = None

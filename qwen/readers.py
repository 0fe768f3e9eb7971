"""How a sequence is read: by the decoder, with reuse of prefixes, or by Transformers' forward.

The engine sees token ids and logits; what lies behind a sequence (cache, store, alpha) ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen.decoder import Decoder, DecoderSequence
from qwen.devices import input_device
from qwen.prefix_cache import KeptSequence, PrefixCache, common_prefix


class SequenceReader(Protocol):
    """Reads one sequence's tokens, in `torch.inference_mode`. Not for several threads at once."""

    @property
    def num_read(self) -> int:
        """Tokens that were read."""
        ...

    def read(self, ids: Tensor) -> Tensor:
        """Read the next tokens (tokens,), int64; return the logits (vocab_size,) after the last."""
        ...

    def close(self) -> None:
        """Let go of the sequence's memory, or keep it for a later prompt."""
        ...


class Readers(Protocol):
    """Begins sequences on one model."""

    device: torch.device

    def start(self, ids: Sequence[int], *, chunk: int) -> SequenceReader:
        """Begin a sequence; some of the prompt may have been read (`num_read`), never all of it.

        Args:
            ids: The whole prompt.
            chunk: Tokens that will be read at a time.
        """
        ...

    def clear(self) -> None:
        """Let go of what is kept from earlier sequences."""
        ...


class TransformersReaders:
    """Begins sequences that a Transformers model reads with its own forward.

    Args:
        model: A causal language model.
        new_cache: Makes its cache.
    """

    def __init__(self, model: Any, *, new_cache: Callable[[], Any]) -> None:
        self._model, self._new_cache = model, new_cache
        self.device = input_device(model)

    def start(self, ids: Sequence[int], *, chunk: int) -> SequenceReader:
        """See `Readers`."""
        # Qwen v1 scales its rotary base by the whole prompt's length, and here it comes in chunks.
        is_v1 = self._model.config.model_type == "qwen"
        options = {"prompt_length": len(ids)} if is_v1 else {}
        return _TransformersReader(self._model, self._new_cache(), options)

    def clear(self) -> None:
        """See `Readers`; nothing is kept."""


class _TransformersReader:
    def __init__(self, model: Any, cache: Any, options: dict[str, Any]) -> None:
        self._model, self._cache, self._options = model, cache, options
        self._num_read = 0

    @property
    def num_read(self) -> int:
        return self._num_read

    def read(self, ids: Tensor) -> Tensor:
        output = self._model(
            ids[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._options,
        )
        self._num_read += len(ids)
        logits: Tensor = output.logits[0, -1]
        return logits

    def close(self) -> None:
        self._model = self._cache = None


class DecoderReaders:
    """Begins sequences on the decoder, from what earlier ones have read where that is the same.

    Reuse gives the result of a cold run. Where the decoder is exact, any token that was read may
    be reused; else only whole chunks of prompts, which a cold run would read in the same form.

    Args:
        decoder: Reads.
        prefix_bytes: Memory for sequences that are kept.
        max_length: Positions that a sequence can have.
    """

    def __init__(self, decoder: Decoder, *, prefix_bytes: int, max_length: int) -> None:
        self._decoder = decoder
        self._kept: PrefixCache[_DecoderState] = PrefixCache(prefix_bytes)
        self._max_length = max_length
        self.device = decoder.device

    def start(self, ids: Sequence[int], *, chunk: int) -> SequenceReader:
        """See `Readers`."""
        alpha = self._decoder.alpha(len(ids))
        found = self._kept.take(ids, key=alpha)
        if found is None:
            state = _DecoderState(
                self._decoder.start(len(ids), max_capacity=self._max_length), num_aligned=0
            )
            return _DecoderReader(self._decoder, state, (), self._kept, chunk=chunk)
        # The last token is read in any case: its logits are wanted.
        num_reused = min(common_prefix(found.ids, ids), len(ids) - 1)
        state = found.state
        if not self._decoder.is_exact:
            num_reused = min(num_reused, state.num_aligned) // chunk * chunk
        state.sequence = self._decoder.resume(state.sequence, length=num_reused)
        state.num_aligned = min(state.num_aligned, num_reused)
        return _DecoderReader(self._decoder, state, found.ids[:num_reused], self._kept, chunk=chunk)

    def clear(self) -> None:
        """See `Readers`."""
        self._kept.clear()


class _DecoderState:
    """A sequence, and how many of its tokens were read in whole chunks from the beginning."""

    def __init__(self, sequence: DecoderSequence, *, num_aligned: int) -> None:
        self.sequence, self.num_aligned = sequence, num_aligned


class _DecoderReader:
    def __init__(
        self,
        decoder: Decoder,
        state: _DecoderState,
        ids: tuple[int, ...],
        kept: PrefixCache[_DecoderState],
        *,
        chunk: int,
    ) -> None:
        self._decoder: Decoder | None = decoder
        self._state: _DecoderState | None = state
        self._ids, self._kept, self._chunk = list(ids), kept, chunk

    @property
    def num_read(self) -> int:
        return len(self._ids)

    def read(self, ids: Tensor) -> Tensor:
        decoder, state = self._decoder, self._state
        assert decoder is not None and state is not None
        self._state = None  # a sequence in which a read failed is not kept
        logits = decoder.read(ids, state.sequence)
        if state.num_aligned == len(self._ids) and len(ids) == self._chunk:
            state.num_aligned += len(ids)
        self._ids += ids.tolist()
        self._state = state
        return logits

    def close(self) -> None:
        decoder, state = self._decoder, self._state
        self._decoder = self._state = None
        if decoder is None or state is None:
            return
        state.sequence = sequence = decoder.park(state.sequence)
        self._kept.put(KeptSequence(tuple(self._ids), sequence.alpha, sequence.store.nbytes, state))

"""How sequences are read: by the decoder, with reuse of prefixes, or by Transformers' forward.

The engine sees token ids and logits; what lies behind a sequence (cache, store, alpha) ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen.decoder import Decoder, DecoderSequence, Piece
from qwen.devices import input_device
from qwen.prefix_cache import KeptSequence, PrefixCache


class SequenceReader(Protocol):
    """One sequence that is being read. Not for several threads at once."""

    @property
    def num_read(self) -> int:
        """Tokens that were read."""
        ...

    def note(self, ids: Sequence[int]) -> None:
        """Take note of tokens that were read; of what was read ahead, once they are known."""
        ...

    def close(self, *, keep: bool) -> None:
        """Let go of the sequence's memory, or keep it for a later prompt where that may be."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """The next tokens of a sequence, and whether the logits after them are wanted."""

    reader: SequenceReader
    ids: Sequence[int]
    wants_logits: bool = True


#: See `Readers`.
ReadAhead = Callable[[Sequence[SequenceReader], Tensor, Sequence[int]], list[Tensor]]


class Readers(Protocol):
    """Begins and reads sequences on one model. Used on one thread, in `torch.inference_mode`.

    Attributes:
        device: Where logits are.
        is_exact: Whether a sequence's numbers are the same, bit for bit, with whatever others and
            in whatever pieces it is read.
        can_batch: Whether several sequences can be read at once.
        keeps_replies: Whether a later prompt need not read a reply again.
        position_bytes: What a token of context takes; 0 is unknown.
    """

    device: torch.device
    is_exact: bool
    can_batch: bool
    keeps_replies: bool
    position_bytes: int

    def start(self, ids: Sequence[int], *, chunk: int, expected: int) -> SequenceReader:
        """Begin a sequence; some of the prompt may have been read (`num_read`), never all of it.

        Args:
            ids: The whole prompt.
            chunk: Tokens that will be read at a time, unless others have to be served meanwhile.
            expected: Tokens that prompt and reply will have at most.
        """
        ...

    def read(self, readings: Sequence[Reading]) -> list[Tensor | None]:
        """Read the next tokens of sequences; several only if `can_batch`.

        Logits are good until the next call. After an error several sequences are as they were
        before, and a single one is not kept for later prompts unless it is read after all.

        Returns:
            For each the logits, (vocab_size,), or None where they are not wanted.
        """
        ...

    @property
    def read_ahead(self) -> ReadAhead | None:
        """What does as `qwen.decoder.ReadAhead`, with readers; None where the host knows first.

        Each of them is to `note` its token before anything else is done with it, unless it is
        closed without being kept.
        """
        ...

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept from earlier sequences."""
        ...

    def shrink(self, max_bytes: int) -> None:
        """Let go of kept sequences beyond so many bytes."""
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
        self.is_exact = self.can_batch = self.keeps_replies = False
        self.read_ahead: ReadAhead | None = None
        self.position_bytes = self.kept_bytes = 0

    def start(self, ids: Sequence[int], *, chunk: int, expected: int) -> SequenceReader:
        """See `Readers`."""
        # Qwen v1 scales its rotary base by the whole prompt's length, and here it comes in chunks.
        is_v1 = self._model.config.model_type == "qwen"
        options = {"prompt_length": len(ids)} if is_v1 else {}
        return _TransformersReader(self._new_cache(), options)

    def read(self, readings: Sequence[Reading]) -> list[Tensor | None]:
        """See `Readers`."""
        (reading,) = readings
        reader = reading.reader
        assert isinstance(reader, _TransformersReader)
        output = self._model(
            torch.tensor([list(reading.ids)], device=self.device),
            past_key_values=reader.cache,
            use_cache=True,
            logits_to_keep=1,
            **reader.options,
        )
        reader.note(reading.ids)
        return [output.logits[0, -1] if reading.wants_logits else None]

    def shrink(self, max_bytes: int) -> None:
        """See `Readers`; nothing is kept."""


class _TransformersReader:
    def __init__(self, cache: Any, options: dict[str, Any]) -> None:
        self.cache, self.options, self.num_read = cache, options, 0

    def note(self, ids: Sequence[int]) -> None:
        self.num_read += len(ids)

    def close(self, *, keep: bool) -> None:
        self.cache = None


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
        self.device, self.is_exact = decoder.device, decoder.is_exact
        self.can_batch, self.position_bytes = True, decoder.position_bytes
        self.keeps_replies = self.is_exact and prefix_bytes > 0

    @property
    def kept_bytes(self) -> int:
        """See `Readers`."""
        return self._kept.nbytes

    @property
    def read_ahead(self) -> ReadAhead | None:
        """See `Readers`."""
        return self._read_ahead if self._decoder.read_ahead else None

    def start(self, ids: Sequence[int], *, chunk: int, expected: int) -> SequenceReader:
        """See `Readers`."""
        state, num_reused = self._resume(ids, chunk=chunk) or (self._begin(len(ids)), 0)
        state.sequence.store.expected = expected
        return _DecoderReader(self._decoder, state, ids[:num_reused], self._kept, chunk=chunk)

    def _begin(self, prompt_length: int) -> _DecoderState:
        sequence = self._decoder.start(prompt_length, max_capacity=self._max_length)
        return _DecoderState(sequence, num_aligned=0)

    def _resume(self, ids: Sequence[int], *, chunk: int) -> tuple[_DecoderState, int] | None:
        """Go on from a kept sequence; returns its state and how many tokens it has read."""
        found = self._kept.take(ids, key=self._decoder.alpha(len(ids)))
        if found is None:
            return None
        state = found.kept.state
        # The last token is read in any case: its logits are wanted.
        num_reused = min(found.num_common, len(ids) - 1)
        if not self.is_exact:
            num_reused = min(num_reused, state.num_aligned) // chunk * chunk
        if not found.is_taken and num_reused == 0:
            return None
        go_on = self._decoder.resume if found.is_taken else self._decoder.fork
        sequence = go_on(state.sequence, length=num_reused)
        return _DecoderState(sequence, num_aligned=min(state.num_aligned, num_reused)), num_reused

    def read(self, readings: Sequence[Reading]) -> list[Tensor | None]:
        """See `Readers`."""
        readers = [_decoder_reader(reading.reader) for reading in readings]
        if len(readings) == 1:
            readers[0].is_sound = False
        logits = self._decoder.read_many(
            [
                Piece(reading.ids, reader.sequence, reading.wants_logits)
                for reader, reading in zip(readers, readings, strict=True)
            ]
        )
        for reader, reading in zip(readers, readings, strict=True):
            reader.note(reading.ids)
        return logits

    def _read_ahead(
        self, readers: Sequence[SequenceReader], tokens: Tensor, places: Sequence[int]
    ) -> list[Tensor]:
        assert self._decoder.read_ahead is not None
        sequences = [_decoder_reader(reader).sequence for reader in readers]
        return self._decoder.read_ahead(sequences, tokens, places)

    def shrink(self, max_bytes: int) -> None:
        """See `Readers`."""
        self._kept.shrink(max_bytes)


class _DecoderState:
    """A sequence, and how many of its tokens were read in whole chunks from the beginning."""

    def __init__(self, sequence: DecoderSequence, *, num_aligned: int) -> None:
        self.sequence, self.num_aligned = sequence, num_aligned


class _DecoderReader:
    def __init__(
        self,
        decoder: Decoder,
        state: _DecoderState,
        ids: Sequence[int],
        kept: PrefixCache[_DecoderState],
        *,
        chunk: int,
    ) -> None:
        self._decoder: Decoder | None = decoder
        self._state: _DecoderState | None = state
        self._ids, self._kept, self._chunk = list(ids), kept, chunk
        self.is_sound = True

    @property
    def num_read(self) -> int:
        return len(self._ids)

    @property
    def sequence(self) -> DecoderSequence:
        assert self._state is not None
        return self._state.sequence

    def note(self, ids: Sequence[int]) -> None:
        """See `SequenceReader`."""
        assert self._state is not None
        if self._state.num_aligned == len(self._ids) and len(ids) == self._chunk:
            self._state.num_aligned += len(ids)
        self._ids += ids
        self.is_sound = True

    def close(self, *, keep: bool) -> None:
        decoder, state = self._decoder, self._state
        self._decoder = self._state = None
        if decoder is None or state is None:
            return
        if not (keep and self.is_sound):
            decoder.discard(state.sequence)
            return
        state.sequence = sequence = decoder.park(state.sequence)
        self._kept.put(KeptSequence(tuple(self._ids), sequence.alpha, sequence.store.nbytes, state))


def _decoder_reader(reader: SequenceReader) -> _DecoderReader:
    assert isinstance(reader, _DecoderReader)
    return reader

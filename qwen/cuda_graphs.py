"""Decoding on a GPU with CUDA graphs: one launch a token instead of hundreds.

A graph repeats what was recorded, on the same memory. So running sequences lie side by side in one
memory, into which kept ones are copied; tokens, their positions and rotations are written to fixed
places before each launch. A graph serves all lengths up to its bucket, masked, and either one
sequence or a step of several. Prompts are read without graphs. Source: the CUDA graphs of torch
2.11 to 2.13.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwen.decoder import Decoder, DecoderSequence, ForwardParts, Piece, finish, project
from qwen.decoder_ops import Span, TorchOps, attend_rows, rotate_and_store, rows_mask
from qwen.kv_slots import KvSlot, KvSlots

logger = logging.getLogger(__name__)

#: Positions that each slot begins with; they double when a sequence needs more.
_FIRST_CAPACITY = 2048
#: Positions of the smallest bucket; each further one is twice as large.
_FIRST_BUCKET = 256
#: Inductor's search among kernels for one row: 5 % faster than its defaults on an H200.
_COMPILE_OPTIONS: Mapping[str, bool] = MappingProxyType({"coordinate_descent_tuning": True})

#: Does some work once, and returns what does it again and where the result then is.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class GraphedDecoder(Decoder):
    """A decoder whose single tokens are read by CUDA graphs.

    The layers' parts are compiled on a thread of their own; the first sequence that begins when
    they are ready uses them. Where they cannot be compiled, the log says so once.

    Args:
        model: See `Decoder`.
        record: Records a graph; a test on a CPU passes one that just repeats the work.
        compile_parts: Compiles the layers' parts; None leaves them as they are.
    """

    def __init__(
        self,
        model: Any,
        *,
        record: Record | None = None,
        compile_parts: Callable[[], ForwardParts] | None = None,
    ) -> None:
        super().__init__(model)
        self._record = record or record_cuda_graph
        self._slots: KvSlots | None = None
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._recorded_at = 0
        self._inputs: dict[int, _StepInputs] = {}
        self._step_parts = self._parts
        self._compiled: ForwardParts | None = None
        if compile_parts is not None:
            threading.Thread(
                target=self._compile, args=(compile_parts,), name="compile", daemon=True
            ).start()

    def start(
        self, prompt_length: int, *, capacity: int = 0, max_capacity: int | None = None
    ) -> DecoderSequence:
        """See `Decoder.start`; holds a slot until it is put aside or discarded."""
        slot = self._take_slot(max(capacity, prompt_length + 1), max_capacity)
        return DecoderSequence(slot, *self._table(prompt_length))

    def park(self, sequence: DecoderSequence) -> DecoderSequence:
        """See `Decoder.park`: copies the sequence out of its slot."""
        try:
            store = sequence.store.copy()
        finally:
            self.discard(sequence)
        return DecoderSequence(store, sequence.table, sequence.alpha)

    def discard(self, sequence: DecoderSequence) -> None:
        """See `Decoder.discard`: gives the slot back."""
        assert self._slots is not None and isinstance(sequence.store, KvSlot)
        self._slots.release(sequence.store)

    def resume(self, sequence: DecoderSequence, *, length: int) -> DecoderSequence:
        """See `Decoder.resume`: copies the sequence into a slot."""
        return self.fork(sequence, length=length)

    def fork(self, sequence: DecoderSequence, *, length: int) -> DecoderSequence:
        """See `Decoder.fork`: copies the sequence into a slot."""
        slot = self._take_slot(length + 1, None)
        slot.assign(sequence.store, length)
        return DecoderSequence(slot, sequence.table, sequence.alpha)

    def read(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """See `Decoder.read`; the logits of a single token are good until the next call."""
        if len(ids) > 1:
            return super().read(ids, sequence)
        (logits,) = self.read_many([Piece(ids, sequence)])
        assert logits is not None
        return logits

    def read_many(self, pieces: Sequence[Piece]) -> list[Tensor | None]:
        """See `Decoder.read_many`; prompts one by one, then all single tokens in one step."""
        before = [piece.sequence.store.length for piece in pieces]
        logits: dict[int, Tensor] = {}
        try:
            for place, piece in enumerate(pieces):
                if len(piece.ids) > 1:
                    logits[place] = super().read(piece.ids, piece.sequence)
            single = {i: piece for i, piece in enumerate(pieces) if len(piece.ids) == 1}
            if single:
                rows = self._step(list(single.values()))
                logits |= dict(zip(single, rows, strict=True))
        except BaseException:
            for piece, length in zip(pieces, before, strict=True):
                piece.sequence.store.length = length
            raise
        return [logits[i] if piece.wants_logits else None for i, piece in enumerate(pieces)]

    def _take_slot(self, capacity: int, max_capacity: int | None) -> KvSlot:
        if self._compiled is not None:
            self._step_parts, self._compiled = self._compiled, None
            self._graphs.clear()
        if self._slots is None:
            weights = self._weights
            self._slots = KvSlots(
                num_layers=len(weights.layers),
                num_kv_heads=weights.num_kv_heads,
                head_dim=weights.head_dim,
                dtype=self._dtype,
                device=self.device,
                capacity=min(_FIRST_CAPACITY, max_capacity or _FIRST_CAPACITY),
                max_capacity=max_capacity,
            )
        return self._slots.take(capacity)

    def _step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Read one token of each sequence by a graph; returns their logits, in order."""
        slots = self._slots
        assert slots is not None
        for slot in slots.used:  # also where nothing is read, see `_rows`
            slot.reserve(slot.length + 1)
        for piece in pieces:
            piece.sequence.table.reserve(slots.capacity)
        own = [_index(piece) for piece in pieces]
        rows = 1
        # Every slot before the last one that is read has a row, even if it has nothing to read.
        while rows <= max(own):
            rows *= 2
        slots.grow(rows, capacity=0)
        spans, ids = self._rows(pieces, rows)
        inputs = self._inputs.get(rows)
        if inputs is None:
            inputs = self._inputs[rows] = _StepInputs(ids, spans)
        inputs.write(ids, spans)
        furthest = max(piece.sequence.store.length for piece in pieces)
        replay, logits = self._graph(inputs, rows, furthest)
        replay()
        for piece in pieces:
            piece.sequence.store.length += 1
        return [logits[index] for index in own]

    def _rows(self, pieces: Sequence[Piece], rows: int) -> tuple[Span, Tensor]:
        """Gather where each row's token stands, and the tokens.

        A row without a token writes to the next free position of its slot, where it does no harm.
        """
        assert self._slots is not None
        used = self._slots.used
        places = [used[i].length if i < len(used) else 0 for i in range(rows)]
        by_row = {_index(piece): piece for piece in pieces}
        any_piece = pieces[0]
        ids, cos, sin, logn = [], [], [], []
        for row in range(rows):
            piece = by_row.get(row, any_piece)
            table, place = piece.sequence.table, piece.sequence.store.length
            ids.append(piece.ids)
            cos.append(table.cos[place])
            sin.append(table.sin[place])
            if table.logn is not None:
                logn.append(table.logn[place])
        span = Span(
            start=0,
            length=0,
            positions=torch.tensor(places, device=self.device),
            cos=torch.stack(cos),
            sin=torch.stack(sin),
            logn=torch.stack(logn) if logn else None,
        )
        return span, torch.cat(ids)

    def _graph(
        self, inputs: _StepInputs, rows: int, position: int
    ) -> tuple[Callable[[], None], Tensor]:
        """Return the graph for so many rows up to a position, recorded where there is none yet.

        Its result is (rows, vocab_size).
        """
        slots = self._slots
        assert slots is not None
        if slots.place != self._recorded_at:
            self._graphs.clear()
            self._recorded_at = slots.place
        bucket = _FIRST_BUCKET
        while bucket <= position:
            bucket *= 2
        bucket = min(bucket, slots.capacity)
        if (rows, bucket) not in self._graphs:
            span = inputs.span(bucket)
            work = self._one_row if rows == 1 else self._many_rows
            self._graphs[rows, bucket] = self._record(lambda: work(slots, inputs.ids, span))
        return self._graphs[rows, bucket]

    def _one_row(self, slots: KvSlots, ids: Tensor, span: Span) -> Tensor:
        store = KvSlot(slots, 0)
        return self.logits(self.forward(ids, span, store, parts=self._step_parts))

    def _many_rows(self, slots: KvSlots, ids: Tensor, span: Span) -> Tensor:
        mask, scale, rows = rows_mask(span), self._weights.scale, len(ids)

        def attend(index: int, qkv: Tensor) -> Tensor:
            return attend_rows(qkv, *slots.layer(index, rows), span, mask, scale=scale)

        return self.logits(self._layers(ids, attend, self._parts))

    def _compile(self, compile_parts: Callable[[], ForwardParts]) -> None:
        """Compile on this thread, by running the parts on memory of their own."""
        try:
            with torch.inference_mode():
                parts = compile_parts()
                store = self._new_store(_FIRST_BUCKET, None, is_blank=True)
                table, _ = self._table(1)
                table.reserve(store.capacity)
                ids = torch.zeros(1, dtype=torch.int64, device=self.device)
                self.forward(ids, table.span(0, 1, length=_FIRST_BUCKET), store, parts=parts)
        except Exception as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            logger.warning("Decoding without compiled layers, which is slower: %s", reason)
            return
        self._compiled = parts
        logger.info("The decoder's layers are compiled")


def compile_layer_parts() -> ForwardParts:
    """Compile what comes before and after attention; attention itself has its kernels."""

    def compiled(
        function: Callable[..., Tensor], *, dynamic: bool = False
    ) -> Callable[..., Tensor]:
        options: dict[str, Any] = dict(_COMPILE_OPTIONS)
        result: Callable[..., Tensor] = torch.compile(
            function, fullgraph=True, dynamic=dynamic, options=options
        )
        return result

    # The store's size differs from call to call: compiled for one, each other one would take
    # seconds in the middle of a reply.
    ops = TorchOps(rotate=compiled(rotate_and_store, dynamic=True))
    return ForwardParts(ops, project=compiled(project), finish=compiled(finish))


class _StepInputs:
    """The fixed places of what differs from token to token."""

    def __init__(self, ids: Tensor, span: Span) -> None:
        self.ids = ids.clone()
        self._span = span
        self._positions = span.positions.clone()
        self._cos, self._sin = span.cos.clone(), span.sin.clone()
        self._logn = None if span.logn is None else span.logn.clone()

    def write(self, ids: Tensor, span: Span) -> None:
        """Write the next token's."""
        self.ids.copy_(ids)
        self._positions.copy_(span.positions)
        self._cos.copy_(span.cos)
        self._sin.copy_(span.sin)
        if self._logn is not None and span.logn is not None:
            self._logn.copy_(span.logn)

    def span(self, bucket: int) -> Span:
        """Return a span on these places that looks at the whole bucket."""
        return Span(
            start=0,
            length=bucket,
            positions=self._positions,
            cos=self._cos,
            sin=self._sin,
            logn=self._logn,
        )


def _index(piece: Piece) -> int:
    store = piece.sequence.store
    assert isinstance(store, KvSlot)
    return store.index


def record_cuda_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a CUDA graph; see `Record`."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # sets up what must not be set up while recording
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads (the compiler's) go on with their own work meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result

"""Decoding on a GPU with CUDA graphs: one launch a token instead of hundreds.

A graph repeats what was recorded, on the same memory. So the running sequence lies in one store,
into which others are copied; a token, its position and its rotation are written to fixed places
before each launch. A graph serves all lengths up to its bucket, masked. Prompts are read without
graphs. Source: the CUDA graphs of torch 2.11 to 2.13.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwen.decoder import Decoder, DecoderSequence, ForwardParts, finish, project
from qwen.decoder_ops import Span, TorchOps, rotate_and_store
from qwen.kv_store import KvStore

logger = logging.getLogger(__name__)

#: Positions that the one store begins with; it doubles when a sequence needs more.
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
        self._store: KvStore | None = None
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self._recorded_at = 0
        self._inputs: _StepInputs | None = None
        self._step_parts = self._parts
        self._compiled: ForwardParts | None = None
        if compile_parts is not None:
            threading.Thread(
                target=self._compile, args=(compile_parts,), name="compile", daemon=True
            ).start()

    def start(
        self, prompt_length: int, *, capacity: int = 0, max_capacity: int | None = None
    ) -> DecoderSequence:
        """See `Decoder.start`; the sequence that ran before is lost unless it was put aside."""
        if self._compiled is not None:
            self._step_parts, self._compiled = self._compiled, None
            self._graphs.clear()
        if self._store is None:
            first = min(_FIRST_CAPACITY, max_capacity or _FIRST_CAPACITY)
            self._store = self._new_store(first, max_capacity, is_blank=True)
        self._store.truncate(0)
        self._store.reserve(max(capacity, prompt_length + 1))
        return DecoderSequence(self._store, *self._table(prompt_length))

    def park(self, sequence: DecoderSequence) -> DecoderSequence:
        """See `Decoder.park`: copies the sequence out of the one store."""
        return DecoderSequence(sequence.store.copy(), sequence.table, sequence.alpha)

    def resume(self, sequence: DecoderSequence, *, length: int) -> DecoderSequence:
        """See `Decoder.resume`: copies the sequence into the one store."""
        assert self._store is not None
        self._store.assign(sequence.store, length)
        return DecoderSequence(self._store, sequence.table, sequence.alpha)

    def read(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """See `Decoder.read`; the logits of a single token are good until the next call."""
        if len(ids) > 1:
            return super().read(ids, sequence)
        store = sequence.store
        assert store is self._store
        position = store.length
        store.reserve(position + 1)
        sequence.table.reserve(store.capacity)
        span = sequence.table.span(position, 1, length=position + 1)
        inputs = self._inputs = self._inputs or _StepInputs(ids, span)
        inputs.write(ids, span)
        replay, logits = self._graph(inputs, position)
        replay()
        store.length = position + 1
        return logits

    def _graph(self, inputs: _StepInputs, position: int) -> tuple[Callable[[], None], Tensor]:
        """Return the graph for a position, recorded where there is none yet."""
        store = self._store
        assert store is not None
        if store.place != self._recorded_at:
            self._graphs.clear()
            self._recorded_at = store.place
        bucket = _FIRST_BUCKET
        while bucket <= position:
            bucket *= 2
        bucket = min(bucket, store.capacity)
        if bucket not in self._graphs:
            span = inputs.span(bucket)
            self._graphs[bucket] = self._record(
                lambda: self.logits(self.forward(inputs.ids, span, store, parts=self._step_parts))[
                    0
                ]
            )
        return self._graphs[bucket]

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

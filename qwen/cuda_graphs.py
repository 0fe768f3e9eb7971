"""Decoding on a GPU with CUDA graphs: one launch a token instead of hundreds.

A graph repeats what was recorded, on the same memory. So running sequences lie side by side in one
memory, into which kept ones are copied; tokens, their positions and rotations are written to fixed
places before each launch. A graph serves all lengths up to its bucket, masked, and either one
sequence or a step of several. Prompts are read without graphs. Source: the CUDA graphs of torch
2.11 to 2.13.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen.decoder import (
    Decoder,
    DecoderSequence,
    Piece,
    ReadAhead,
    finish,
    project,
)
from qwen.decoder_ops import (
    Attend,
    DecoderOps,
    PromptRows,
    Rotation,
    Span,
    attend_masked,
    has_flash_attention,
)
from qwen.decoder_weights import LayerWeights
from qwen.kv_slots import KvSlot, KvSlots
from qwen.kv_store import KvStore
from qwen.step_inputs import ComputeRotation, StepInputs, compute_rotation

logger = logging.getLogger(__name__)

#: Positions that each slot begins with; they double when a sequence needs more.
_FIRST_CAPACITY = 2048
#: Positions of the smallest bucket; each further one is twice as large.
_FIRST_BUCKET = 256
#: From there on attention is as for so many positions.
_LONGEST_TRIED = 65536
#: Rows whose kernels are compiled ahead: the powers of two that graphs have, and a prompt's.
_ROWS_TRIED = (1, 2, 4, 8, 16, 32, 64)
#: Positions of all rows before those that are read while kernels are tried; less than a bucket.
_POSITIONS_TRIED = 240
#: By how much a layer of our kernels may differ from torch's, relatively, in 16 bits and in 32.
_LIMITS = {2: 3e-2, 4: 1e-3}


#: Prepares the attention of prompts by their rotation, and the factor of the scores.
AttendPrompts = Callable[[Rotation, Sequence[PromptRows], float], Attend]


@dataclass(frozen=True, slots=True)
class StepParts:
    """What steps and prompts are computed with.

    Attributes:
        ops: Of what comes before and after attention.
        rotation: See `compute_rotation`.
        attend: See `attend_masked`.
        attend_prompts: Prepares the attention of several prompts at once, see
            `qwen.gpu_attention.attend_prompts`; None where there is none.
    """

    ops: DecoderOps
    rotation: ComputeRotation = compute_rotation
    attend: Callable[[Rotation, int, float], Attend] = attend_masked
    attend_prompts: AttendPrompts | None = None


#: Does some work once, and returns what does it again and where the result then is.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class GraphedDecoder(Decoder):
    """A decoder whose single tokens are read by CUDA graphs.

    Kernels of our own are compiled on a thread of their own; the first sequence that begins when
    they are ready uses them. Where they cannot be compiled, the log says so once.

    Args:
        model: See `Decoder`.
        record: Records a graph; a test on a CPU passes one that just repeats the work.
        make_parts: Makes what a step is computed with by kernels that are compiled when they first
            run; None computes with torch's.
    """

    def __init__(
        self,
        model: Any,
        *,
        record: Record | None = None,
        make_parts: Callable[[], StepParts] | None = None,
    ) -> None:
        super().__init__(model)
        # cuDNN's attention is compiled anew for each length of a prompt: 1.1 s (H200, torch 2.11).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._record = record or record_cuda_graph
        self._slots: KvSlots | None = None
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._recorded_for: tuple[int, torch.Size] | None = None
        self._inputs: dict[int, StepInputs] = {}
        self._step_parts = StepParts(self._ops)
        self._compiled: deque[StepParts] = deque()
        self._compiler: threading.Thread | None = None
        if make_parts is not None:
            self._compiler = threading.Thread(
                target=self._compile, args=(make_parts,), name="compile", daemon=True
            )
            self._compiler.start()

    def settle(self) -> None:
        """See `Decoder.settle`: waits until our kernels are compiled."""
        if self._compiler is not None:
            self._compiler.join()

    def start(
        self, prompt_length: int, *, capacity: int = 0, max_capacity: int | None = None
    ) -> DecoderSequence:
        """See `Decoder.start`; holds a slot until it is put aside or discarded."""
        table, alpha = self._table(prompt_length)  # before there is a slot to lose
        slot = self._take_slot(max(capacity, prompt_length + 1), max_capacity)
        return DecoderSequence(slot, table, alpha)

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
        slot.assign(sequence.store, length)  # needs no memory: the slot has room
        return DecoderSequence(slot, sequence.table, sequence.alpha)

    def read(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """See `Decoder.read`; the logits of a single token are good until the next call."""
        if len(ids) > 1:
            return super().read(ids, sequence)
        (logits,) = self.read_many([Piece(ids.tolist(), sequence)])
        assert logits is not None
        return logits

    def read_many(self, pieces: Sequence[Piece]) -> list[Tensor | None]:
        """See `Decoder.read_many`; all prompts at once, then all single tokens in one step."""
        logits: dict[int, Tensor | None] = {}
        prompts = {i: piece for i, piece in enumerate(pieces) if len(piece.ids) > 1}
        single = {i: piece for i, piece in enumerate(pieces) if len(piece.ids) == 1}
        with _all_or_none([piece.sequence for piece in pieces]):
            if prompts:
                rows = super().read_many(list(prompts.values()))
                logits |= dict(zip(prompts, rows, strict=True))
            if single:
                logits |= dict(zip(single, self._step(list(single.values())), strict=True))
        return [logits[i] if piece.wants_logits else None for i, piece in enumerate(pieces)]

    @property
    def has_own_kernels(self) -> bool:
        """Whether the next sequence is read by kernels of our own."""
        return bool(self._compiled) or self._step_parts.ops is not self._ops

    @property
    def read_ahead(self) -> ReadAhead:
        """See `Decoder.read_ahead`."""
        return self._read_ahead

    def _read_ahead(
        self, sequences: Sequence[DecoderSequence], tokens: Tensor, places: Sequence[int]
    ) -> list[Tensor]:
        with _all_or_none(sequences):
            pieces = [Piece([place], own) for place, own in zip(places, sequences, strict=True)]
            # Apart from the graph's, which others may use meanwhile.
            return list(torch.stack(self._step(pieces, tokens)))

    def forward(self, ids: Tensor, spans: Sequence[Span], stores: Sequence[KvStore]) -> Tensor:
        """See `Decoder.forward`; all prompts attend at once as soon as there is what does it."""
        prepare, slots = self._step_parts.attend_prompts, self._slots
        if prepare is None or slots is None:
            return super().forward(ids, spans, stores)
        own = [store for store in stores if isinstance(store, KvSlot)]
        offsets = [slots.offset(slot) for slot in own]
        places = [span.positions + at for span, at in zip(spans, offsets, strict=True)]
        cos, sin = (torch.cat([getattr(span, name) for span in spans]) for name in ("cos", "sin"))
        logn = [span.logn for span in spans if span.logn is not None]
        attend_layer = prepare(
            Rotation(torch.cat(places), cos, sin, torch.cat(logn) if logn else None),
            [
                PromptRows(len(span.positions), span.length, at)
                for span, at in zip(spans, offsets, strict=True)
            ],
            self._weights.scale,
        )

        def attend(index: int, qkv: Tensor) -> Tensor:
            return attend_layer(qkv, *slots.layer(index))

        return self._layers(ids, attend, self._step_parts.ops)

    def _take_slot(self, capacity: int, max_capacity: int | None) -> KvSlot:
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
        if self._compiled:
            self._step_parts = self._compiled.popleft()
            self._drop_graphs()
        return self._slots.take(capacity)

    def _step(self, pieces: Sequence[Piece], tokens: Tensor | None = None) -> list[Tensor]:
        """Read one token of each sequence by a graph; returns their logits, in order.

        Args:
            pieces: Of one token each.
            tokens: See `StepInputs.write`.
        """
        slots = self._slots
        assert slots is not None
        for slot in slots.used:  # also where nothing is read, see `StepInputs.write`
            slot.reserve(slot.length + 1)
        own = [_index(piece) for piece in pieces]
        rows = 1
        # Every slot before the last one that is read has a row, even if it has nothing to read.
        while rows <= max(own):
            rows *= 2
        slots.grow(rows, capacity=0)
        if rows not in self._inputs:
            self._inputs[rows] = StepInputs(rows, pieces[0].sequence.table)
        inputs = self._inputs[rows]
        inputs.write(dict(zip(own, pieces, strict=True)), slots.used, tokens)
        furthest = max(piece.sequence.store.length for piece in pieces)
        replay, logits = self._graph(inputs, rows, furthest)
        replay()
        for piece in pieces:
            piece.sequence.store.length += 1
        return [logits[index] for index in own]

    def _graph(
        self, inputs: StepInputs, rows: int, position: int
    ) -> tuple[Callable[[], None], Tensor]:
        """Return the graph for so many rows up to a position, recorded where there is none yet.

        Its result is (rows, vocab_size).
        """
        slots = self._slots
        assert slots is not None
        memory = slots.place, slots.data.shape
        if memory != self._recorded_for:
            self._drop_graphs()
            self._recorded_for = memory
        bucket = _FIRST_BUCKET
        while bucket <= position:
            bucket *= 2
        if (rows, bucket) not in self._graphs:
            self._graphs[rows, bucket] = self._record(
                lambda: self._read_rows(slots, inputs, bucket)
            )
        return self._graphs[rows, bucket]

    def _drop_graphs(self) -> None:
        """Let go of all graphs, once none of them runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._graphs.clear()

    def _read_rows(self, slots: KvSlots, inputs: StepInputs, bucket: int) -> Tensor:
        """Compute a step: (rows, vocab_size), from what lies in `inputs`."""
        parts = self._step_parts
        attend_layer = parts.attend(inputs.rotation(parts.rotation), bucket, self._weights.scale)

        def attend(index: int, qkv: Tensor) -> Tensor:
            return attend_layer(qkv, *slots.layer(index, len(inputs.ids)))

        return self.logits(self._layers(inputs.ids, attend, parts.ops), parts.ops)

    def _compile(self, make_parts: Callable[[], StepParts]) -> None:
        """Compile kernels on this thread, by running them on memory of their own."""
        try:
            with torch.inference_mode():
                parts = make_parts()
                for rows in _ROWS_TRIED:
                    for layer in self._kinds_of_layers():
                        self._try_parts(parts, layer, rows)
        except Exception as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            logger.warning("Decoding without kernels of our own, which is slower: %s", reason)
            return
        if not has_flash_attention(self._weights.embedding.new_empty(0, self._weights.head_dim)):
            parts = replace(parts, attend_prompts=None)
        self._compiled.append(parts)
        logger.info("The kernels of the decode loop are compiled")

    def _kinds_of_layers(self) -> list[LayerWeights]:
        """Return a layer of each kind that the model has: a quantised one's may differ."""
        layers = self._weights.layers
        return list({tuple(map(type, layer.linears)): layer for layer in layers}.values())

    def _try_parts(self, parts: StepParts, layer: LayerWeights, rows: int) -> None:
        """Run each part, and attention in all forms that it has for longer sequences.

        Raises:
            RuntimeError: A kernel computes something else than torch.
        """
        weights, ops = self._weights, parts.ops
        inputs = StepInputs(rows, self._table(1)[0])
        before = _POSITIONS_TRIED // rows
        inputs.positions += before
        rotation = inputs.rotation(parts.rotation)
        hidden = self._waves(rows, weights.embedding.shape[1])
        memory = self._waves(2, rows, weights.num_kv_heads, before + 1, weights.head_dim)
        qkv = project(ops, layer, hidden, weights.eps)
        _check("a product", qkv, project(self._ops, layer, hidden, weights.eps))
        longest = _FIRST_BUCKET
        while longest <= before:
            longest *= 2
        while longest <= _LONGEST_TRIED:
            # No more is read than there is.
            attended = parts.attend(rotation, longest, weights.scale)(qkv, *memory)
            expected = attend_masked(rotation, longest, weights.scale)(qkv, *memory.clone())
            _check("attention", attended, expected)
            longest *= 2
        actual = finish(ops, layer, hidden.clone(), attended, weights.eps)
        _check("a product", actual, finish(self._ops, layer, hidden, attended, weights.eps))
        if parts.attend_prompts is not None and has_flash_attention(memory):
            offsets = torch.arange(rows, device=self.device) * memory[0, 0, :, :, 0].numel()
            prompts = [PromptRows(1, before + 1, offset) for offset in offsets.tolist()]
            rotation = replace(rotation, positions=rotation.positions + offsets)
            together = parts.attend_prompts(rotation, prompts, weights.scale)(qkv, *memory)
            _check("attention of prompts", together, attended)

    def _waves(self, *shape: int) -> Tensor:
        """Return numbers of the model's dtype without a pattern."""
        numbers = torch.arange(math.prod(shape), dtype=torch.float32, device=self.device)
        return (numbers * 12.9898).sin().to(self._dtype).view(shape)


def _check(name: str, actual: Tensor, expected: Tensor) -> None:
    """Refuse numbers that are not torch's: a form that a compiler or torch has changed."""
    error = (actual.float() - expected.float()).norm() / (expected.float().norm() + 1e-6)
    if not error <= _LIMITS[actual.itemsize]:
        raise RuntimeError(
            f"{name}, rows: {len(actual)}, is off by {float(error):.2g} when compiled here"
        )


@contextmanager
def _all_or_none(sequences: Sequence[DecoderSequence]) -> Iterator[None]:
    """After an error have sequences be as they were; what was written is written again."""
    before = [sequence.store.length for sequence in sequences]
    try:
        yield
    except BaseException:
        for sequence, length in zip(sequences, before, strict=True):
            sequence.store.length = length
        raise


def make_step_parts() -> StepParts:
    """Make what a step is computed with of our kernels."""
    from qwen import gpu_attention
    from qwen.gpu_ops import GpuOps

    return StepParts(
        GpuOps(),
        rotation=gpu_attention.compute_rotation,
        attend=gpu_attention.attend_rows,
        attend_prompts=gpu_attention.attend_prompts,
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
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result

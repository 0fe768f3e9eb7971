"""One lean forward for Qwen v1 and the Qwen2 layout, on a CPU and a GPU.

Works on the rows of one sequence: (tokens, hidden_size), no batch, no mask to build, no cache
classes; keys and values lie in a `KvStore`. Semantics and results are those of the Transformers
classes, by test. Knows neither sampling nor requests. Its weights are those of a loaded model; see
`qwen.decoder_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen.cpu_kernels import CpuKernels
from qwen.decoder_ops import CpuOps, DecoderOps, Span, TorchOps
from qwen.decoder_weights import LayerWeights, collect_weights
from qwen.int8_layers import Int8Layers, is_int8
from qwen.int8_linear import Int8Linear
from qwen.kv_store import KvStore
from qwen.rope import logn_factor, ntk_alpha, rotary_tables, scaled_inv_freq


class RotaryTable:
    """Cosines, sines and log-n factors of one sequence, computed ahead as it grows.

    Args:
        inv_freq: (rotary_dim / 2,), float32.
        scale: Factor of cosines and sines.
        logn_length: Trained length of a model with log-n attention, else None.
    """

    def __init__(self, inv_freq: Tensor, *, scale: float, logn_length: int | None) -> None:
        self.inv_freq, self.scale, self.logn_length = inv_freq, scale, logn_length
        empty = inv_freq.new_empty(0, 2 * inv_freq.shape[0])
        self.cos, self.sin = empty, empty
        self.logn: Tensor | None = None

    def reserve(self, length: int) -> None:
        """Have rows for so many positions."""
        if length <= len(self.cos):
            return
        positions = torch.arange(length, device=self.inv_freq.device)[None]
        cos, sin = rotary_tables(positions, self.inv_freq[None])
        self.cos, self.sin = cos[0] * self.scale, sin[0] * self.scale
        if self.logn_length is not None:
            self.logn = logn_factor(positions, self.logn_length)[0].contiguous()

    def span(self, start: int, tokens: int, *, length: int) -> Span:
        """Return the rows of new tokens; `length` as in `Span`."""
        stop = start + tokens
        return Span(
            start=start,
            length=length,
            positions=torch.arange(start, stop, device=self.inv_freq.device),
            cos=self.cos[start:stop],
            sin=self.sin[start:stop],
            logn=None if self.logn is None else self.logn[start:stop],
        )


class DecoderSequence:
    """What the decoder knows of one sequence: its store and its rotary table.

    Attributes:
        store: Keys and values; its `length` is how many tokens were read.
        alpha: Of dynamic NTK, fixed by the prompt's length; 1 where there is none.
    """

    def __init__(self, store: KvStore, table: RotaryTable, alpha: float) -> None:
        self.store, self.table, self.alpha = store, table, alpha


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of one sequence in a call that reads several.

    Attributes:
        ids: The tokens.
        wants_logits: Whether those after the last token are asked for.
    """

    ids: Sequence[int]
    sequence: DecoderSequence
    wants_logits: bool = True


#: Reads one token of each of several sequences, which the device knows first: takes the sequences,
#: which all differ, tokens (n,), int64, on the device, and for each sequence the place of its token
#: there. Changes all sequences or, on an error, none; returns the logits of each, (vocab_size,).
ReadAhead = Callable[[Sequence[DecoderSequence], Tensor, Sequence[int]], list[Tensor]]


def project(ops: DecoderOps, layer: LayerWeights, hidden: Tensor, eps: float) -> Tensor:
    """Compute what comes before a layer's attention: queries, keys and values."""
    return ops.linear(layer.qkv, ops.rms_norm(hidden, layer.input_norm, eps))


def finish(
    ops: DecoderOps, layer: LayerWeights, hidden: Tensor, attended: Tensor, eps: float
) -> Tensor:
    """Compute what comes after a layer's attention: its output and the MLP, beside residuals."""
    hidden = ops.linear(layer.attention_output, attended, add=hidden)
    gated = ops.gated(layer.gate_up, ops.rms_norm(hidden, layer.mlp_norm, eps))
    return ops.linear(layer.down, gated, add=hidden)


class Decoder:
    """The forward of one model. Not for several threads at once.

    Args:
        model: A loaded model that `check_model` passes. Changed: projections of the same input
            are joined in memory, and with `kernels` all linear layers become `Int8Linear`.
        kernels: Compute with these on the CPU; None computes with torch in the model's dtype.
    """

    def __init__(self, model: Any, *, kernels: CpuKernels | None = None) -> None:
        self._weights = collect_weights(model, kernels=kernels)
        self._ops: DecoderOps = TorchOps() if kernels is None else CpuOps(kernels)
        self._int8_layers = (
            Int8Layers(self._weights, kernels) if kernels and is_int8(self._weights) else None
        )
        self._dtype = torch.float32 if kernels else model.dtype
        self._store_dtype = torch.int16 if kernels else model.dtype
        head_dim = self._weights.head_dim
        self._store_dim = kernels.position_room(head_dim) if kernels else head_dim
        self._config = model.config
        self.device: torch.device = self._weights.embedding.device
        #: Whether a token's numbers are the same, bit for bit, with whatever others it is read.
        self.is_exact = all(isinstance(linear, Int8Linear) for linear in self._weights.linears)

    @property
    def read_ahead(self) -> ReadAhead | None:
        """What reads tokens that the device knows first; None where the host does."""
        return None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._weights.embedding.shape[0]

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights in each form that they are held in."""
        weights = self._weights
        sizes = {f"embedding in {_name(weights.embedding)}": weights.embedding.nbytes}
        for linear in weights.linears:
            tensors = [*linear.parameters(), *linear.buffers()]  # type: ignore[attr-defined]
            packed = isinstance(linear, Int8Linear)
            name = "6 bits" if packed else _name(max(tensors, key=lambda t: t.nbytes))
            form = f"linear layers in {name}"
            if tensors[0].data_ptr() != weights.embedding.data_ptr():  # tied: held once
                sizes[form] = sizes.get(form, 0) + sum(tensor.nbytes for tensor in tensors)
        return sizes

    def settle(self) -> None:
        """Wait until nothing will be computed in another way later on."""

    def park(self, sequence: DecoderSequence) -> DecoderSequence:
        """Put a sequence aside for a later `resume` or `fork`, and nothing else."""
        return sequence

    def discard(self, sequence: DecoderSequence) -> None:
        """Let go of a sequence that nobody will go on with."""

    def resume(self, sequence: DecoderSequence, *, length: int) -> DecoderSequence:
        """Go on with the first `length` tokens of a sequence that was put aside."""
        sequence.store.truncate(length)
        return sequence

    def fork(self, sequence: DecoderSequence, *, length: int) -> DecoderSequence:
        """Go on with a copy of the first `length` tokens of a sequence that stays put aside."""
        store = sequence.store.copy(length)
        return DecoderSequence(store, sequence.table, sequence.alpha)

    @property
    def position_bytes(self) -> int:
        """Bytes that the keys and values of one position take."""
        weights = self._weights
        heads = 2 * len(weights.layers) * weights.num_kv_heads
        return heads * self._store_dim * self._store_dtype.itemsize

    def alpha(self, prompt_length: int) -> float:
        """Return the alpha of dynamic NTK for a prompt of so many tokens."""
        config = self._config
        if self._weights.inv_freq is not None or not config.use_dynamic_ntk:
            return 1.0
        return float(ntk_alpha(torch.tensor([prompt_length]), config.seq_length))

    def start(
        self, prompt_length: int, *, capacity: int = 0, max_capacity: int | None = None
    ) -> DecoderSequence:
        """Begin a sequence.

        Args:
            prompt_length: Tokens of its whole prompt, which fix its alpha.
            capacity: Positions to have room for from the start; at least the prompt's.
            max_capacity: See `KvStore`.
        """
        store = self._new_store(max(capacity, prompt_length + 1), max_capacity)
        return DecoderSequence(store, *self._table(prompt_length))

    def read(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """Read the next tokens of a sequence.

        Args:
            ids: (tokens,), int64, on the CPU or the decoder's device.
            sequence: Changed: the tokens are appended.

        Returns:
            (vocab_size,), logits of the token after the last one.
        """
        return self.logits(self.advance(ids, sequence)[-1:])[0]

    def read_many(self, pieces: Sequence[Piece]) -> list[Tensor | None]:
        """Read the next tokens of several sequences in one pass over the weights.

        Args:
            pieces: Of sequences that all differ; changed as by `read`, all or, on an error, none.

        Returns:
            For each its logits, (vocab_size,), or None where it wants none.
        """
        spans = [_place(len(piece.ids), piece.sequence) for piece in pieces]
        stores = [piece.sequence.store for piece in pieces]
        ids = torch.tensor([token for piece in pieces for token in piece.ids])
        hidden = self.forward(ids, spans, stores)
        ends = [-1]
        for piece in pieces:
            ends.append(ends[-1] + len(piece.ids))
        wanted = [i for i, piece in enumerate(pieces) if piece.wants_logits]
        logits: list[Tensor | None] = [None] * len(pieces)
        if wanted:
            rows = self.logits(hidden[[ends[i + 1] for i in wanted]])
            for row, i in zip(rows, wanted, strict=True):
                logits[i] = row
        for store, span in zip(stores, spans, strict=True):
            store.length = span.length
        return logits

    def advance(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """Read as `read`; return the hidden states (tokens, hidden_size) that `logits` takes."""
        span = _place(len(ids), sequence)
        hidden = self.forward(ids, [span], [sequence.store])
        sequence.store.length = span.length
        return hidden

    def forward(self, ids: Tensor, spans: Sequence[Span], stores: Sequence[KvStore]) -> Tensor:
        """Compute the last hidden states of new tokens, and write their keys and values.

        Args:
            ids: (tokens of all spans,), int64, those of one sequence after those of another.
            spans: Where they stand in each sequence, which attends by itself.
            stores: The sequences' own; have room for them. Their `length` is not looked at.

        Returns:
            (tokens, hidden_size), before the last norm.
        """
        if self._int8_layers is not None:
            hidden = self._embed(ids)
            self._int8_layers.run(hidden, spans, stores)
            return hidden
        ops, scale = self._ops, self._weights.scale
        masks = [ops.build_mask(span) for span in spans]
        sizes = [len(span.positions) for span in spans]

        def attend(index: int, qkv: Tensor) -> Tensor:
            rows = zip(torch.split(qkv, sizes), stores, spans, masks, strict=True)
            attended = [
                ops.attend(own, *store.layer(index), span, mask, scale=scale)
                for own, store, span, mask in rows
            ]
            return attended[0] if len(attended) == 1 else torch.cat(attended)

        return self._layers(ids, attend, ops)

    def _embed(self, ids: Tensor) -> Tensor:
        return self._weights.embedding[ids.to(self.device)].to(self._dtype)

    def _layers(
        self, ids: Tensor, attend: Callable[[int, Tensor], Tensor], ops: DecoderOps
    ) -> Tensor:
        """Run all layers; `attend` takes a layer's index and its queries, keys and values."""
        weights, eps = self._weights, self._weights.eps
        hidden = self._embed(ids)
        for index, layer in enumerate(weights.layers):
            attended = attend(index, project(ops, layer, hidden, eps))
            hidden = finish(ops, layer, hidden, attended, eps)
        return hidden

    def logits(self, hidden: Tensor, ops: DecoderOps | None = None) -> Tensor:
        """Map hidden states of `forward` to (tokens, vocab_size), by the decoder's or other ops."""
        weights = self._weights
        return weights.head((ops or self._ops).rms_norm(hidden, weights.norm, weights.eps))

    def _new_store(
        self, capacity: int, max_capacity: int | None, *, is_blank: bool = False
    ) -> KvStore:
        weights = self._weights
        return KvStore(
            num_layers=len(weights.layers),
            num_kv_heads=weights.num_kv_heads,
            head_dim=self._store_dim,
            dtype=self._store_dtype,
            device=self.device,
            capacity=capacity,
            max_capacity=max_capacity,
            is_blank=is_blank,
        )

    def _table(self, prompt_length: int) -> tuple[RotaryTable, float]:
        weights, config = self._weights, self._config
        if weights.inv_freq is not None:
            table = RotaryTable(weights.inv_freq, scale=weights.rotary_scale, logn_length=None)
            return table, 1.0
        alpha = self.alpha(prompt_length)
        inv_freq = scaled_inv_freq(
            torch.tensor([alpha], device=self.device),
            dim=config.rotary_dim,
            base=config.rotary_emb_base,
        )[0]
        logn_length = config.seq_length if config.use_logn_attn else None
        return RotaryTable(inv_freq, scale=1.0, logn_length=logn_length), alpha


def _place(tokens: int, sequence: DecoderSequence) -> Span:
    """Make room for the next tokens of a sequence; return where they stand."""
    store = sequence.store
    stop = store.length + tokens
    store.reserve(stop)
    sequence.table.reserve(store.capacity)
    return sequence.table.span(store.length, tokens, length=stop)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

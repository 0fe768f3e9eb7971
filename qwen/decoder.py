"""One lean forward for Qwen v1 and the Qwen2 layout, on a CPU and a GPU.

Works on the rows of one sequence: (tokens, hidden_size), no batch, no mask to build, no cache
classes; keys and values lie in a `KvStore`. Semantics and results are those of the Transformers
classes, by test. Knows neither sampling nor requests. Its weights are those of a loaded model; see
`qwen.decoder_weights`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen.cpu_kernels import CpuKernels, KernelsUnavailable, load_kernels
from qwen.decoder_ops import CpuOps, DecoderOps, Span, TorchOps
from qwen.decoder_weights import DecoderUnsupported, check_model, collect_weights
from qwen.kv_store import KvStore
from qwen.rope import logn_factor, ntk_alpha, rotary_tables, scaled_inv_freq

logger = logging.getLogger(__name__)


class RotaryTable:
    """Cosines, sines and log-n factors of one sequence, computed ahead as it grows.

    Args:
        inv_freq: (rotary_dim / 2,), float32.
        scale: Factor of cosines and sines.
        logn_length: Trained length of a model with log-n attention, else None.
    """

    def __init__(self, inv_freq: Tensor, *, scale: float, logn_length: int | None) -> None:
        self._inv_freq, self._scale, self._logn_length = inv_freq, scale, logn_length
        empty = inv_freq.new_empty(0, 2 * inv_freq.shape[0])
        self.cos, self.sin = empty, empty
        self.logn: Tensor | None = None

    def reserve(self, length: int) -> None:
        """Have rows for so many positions."""
        if length <= len(self.cos):
            return
        positions = torch.arange(length, device=self._inv_freq.device)[None]
        cos, sin = rotary_tables(positions, self._inv_freq[None])
        self.cos, self.sin = cos[0] * self._scale, sin[0] * self._scale
        if self._logn_length is not None:
            self.logn = logn_factor(positions, self._logn_length)[0].contiguous()

    def span(self, start: int, tokens: int, *, length: int) -> Span:
        """Return the rows of new tokens; `length` as in `Span`."""
        stop = start + tokens
        return Span(
            start=start,
            length=length,
            positions=torch.arange(start, stop, device=self._inv_freq.device),
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


class Decoder:
    """The forward of one model. Not for several threads at once.

    Args:
        model: A loaded model that `check_model` passes. Changed: projections of the same input
            are joined in memory, and with `kernels` all linear layers become int8.
        kernels: Compute with these on the CPU; None computes with torch in the model's dtype.
    """

    def __init__(self, model: Any, *, kernels: CpuKernels | None = None) -> None:
        self._weights = collect_weights(model, kernels=kernels)
        self._ops: DecoderOps = TorchOps() if kernels is None else CpuOps(kernels)
        self._dtype = torch.float32 if kernels else model.dtype
        self._config = model.config
        self.device: torch.device = self._weights.embedding.device
        #: Whether a token's numbers are the same, bit for bit, with whatever others it is read.
        self.is_exact = kernels is not None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._weights.embedding.shape[0]

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
        weights = self._weights
        store = KvStore(
            num_layers=len(weights.layers),
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            dtype=self._dtype,
            device=self.device,
            capacity=max(capacity, prompt_length + 1),
            max_capacity=max_capacity,
        )
        return DecoderSequence(store, *self._table(prompt_length))

    def read(self, ids: Tensor, sequence: DecoderSequence) -> Tensor:
        """Read the next tokens of a sequence.

        Args:
            ids: (tokens,), int64, on the decoder's device.
            sequence: Changed: the tokens are appended.

        Returns:
            (vocab_size,), logits of the token after the last one.
        """
        store, tokens = sequence.store, len(ids)
        stop = store.length + tokens
        store.reserve(stop)
        sequence.table.reserve(store.capacity)
        span = sequence.table.span(store.length, tokens, length=stop)
        hidden = self.forward(ids, span, store)
        store.length = stop
        return self.logits(hidden[-1:])[0]

    def forward(self, ids: Tensor, span: Span, store: KvStore) -> Tensor:
        """Compute the last hidden states of new tokens, and write their keys and values.

        Args:
            ids: (tokens,), int64.
            span: Where they stand.
            store: Has room for them; its `length` is not looked at.

        Returns:
            (tokens, hidden_size), before the last norm.
        """
        weights, ops, eps = self._weights, self._ops, self._weights.eps
        hidden = weights.embedding[ids].to(self._dtype)
        for index, layer in enumerate(weights.layers):
            keys, values = store.layer(index)
            qkv = layer.qkv(ops.rms_norm(hidden, layer.input_norm, eps))
            attended = ops.attend(qkv, keys, values, span, scale=weights.scale)
            hidden = ops.add_linear(hidden, layer.attention_output, attended)
            gate_up = layer.gate_up(ops.rms_norm(hidden, layer.mlp_norm, eps))
            hidden = ops.add_linear(hidden, layer.down, ops.silu_mul(gate_up))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states of `forward` to (tokens, vocab_size)."""
        weights = self._weights
        return weights.head(self._ops.rms_norm(hidden, weights.norm, weights.eps))

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


def build_decoder(model: Any, *, kernels_folder: Path | None = None) -> Decoder | None:
    """Build the fastest decoder that runs a model here, and say in the log which one.

    Args:
        model: See `Decoder`; not changed if None is returned.
        kernels_folder: Where compiled kernels are kept; None computes in the model's own dtype.

    Returns:
        None if the model needs Transformers' own forward.
    """
    try:
        check_model(model)
    except DecoderUnsupported as reason:
        logger.warning("Decoding with Transformers' forward, which is slower: %s.", reason)
        return None
    kernels = None
    if kernels_folder is not None and next(model.parameters()).device.type == "cpu":
        try:
            kernels = load_kernels(kernels_folder)
        except KernelsUnavailable as reason:
            logger.warning(
                "Decoding with dense %s weights, which is slower than int8: %s.",
                str(model.dtype).removeprefix("torch."),
                reason,
            )
    decoder = Decoder(model, kernels=kernels)
    if kernels is not None:
        logger.info("Decoding with int8 weights on the CPU")
    return decoder

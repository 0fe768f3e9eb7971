"""Keys and values of a sequence kept in int8: half the memory of bfloat16.

Pure functions between dense states and codes with scales, and a cache of Transformers on them.
Knows no model; the alpha of Qwen v1's dynamic NTK lives with the cache (`qwen.ntk_cache`).

The form of one layer, which a decoder may hold in tensors of its own: codes (kv_heads, capacity,
head_dim) int8 and scales (kv_heads, capacity) bfloat16, for keys and for values, and for keys
factors (kv_heads, head_dim) bfloat16. A key is codes * scale * factors, so that its product with a
query is scale * sum(codes * (factors * query)). Some channels of Qwen's keys are a hundred times
larger than the others (a bias); the factors keep them from coarsening the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from qwen.errors import InvalidRequest, InvalidSetting
from qwen.ntk_cache import NtkLayer

KvCacheChoice = Literal["auto", "int8"]

#: Tokens by which the storage grows: what is kept in reserve stays small beside what is stored.
GROWTH = 256

#: Tokens that the factors of keys are taken from: the first ones, so that they are the same for a
#: prompt in chunks.
FACTOR_TOKENS = 16

#: 0 gives each channel the same step, 1 one in proportion to its size.
_FACTOR_POWER = 0.75
_LARGEST = 127
_TINY = torch.finfo(torch.bfloat16).tiny


@torch.no_grad()
def key_factors(keys: Tensor) -> Tensor:
    """Measure by how much the channels of each head are to be scaled down before rounding.

    The two channels that rotate into each other share a factor: together their size does not
    depend on a token's position.

    Args:
        keys: (..., tokens, head_dim), float, rotated; the first tokens of a sequence.

    Returns:
        (..., head_dim), bfloat16: powers of two, with which multiplying is exact.
    """
    first, second = keys[..., :FACTOR_TOKENS, :].float().chunk(2, dim=-1)
    size = torch.hypot(first, second).amax(-2).clamp(min=_TINY)
    factors = torch.exp2((size.log2() * _FACTOR_POWER).round())
    return torch.cat([factors, factors], dim=-1).to(torch.bfloat16)


@torch.no_grad()
def quantize_kv(states: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round keys or values to int8, each token and head with a scale of its own.

    Args:
        states: (..., tokens, head_dim), float.
        factors: (..., head_dim): of keys, see `key_factors`.

    Returns:
        Codes (..., tokens, head_dim), int8 from -127 to 127, and scales (..., tokens), bfloat16.
    """
    exact = states.float() if factors is None else states.float() / factors.float()[..., None, :]
    scales = (exact.abs().amax(-1) / _LARGEST).clamp(min=_TINY).to(torch.bfloat16)
    codes = (exact / scales.float()[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales


@torch.no_grad()
def dequantize_kv(
    codes: Tensor, scales: Tensor, factors: Tensor | None = None, *, out: Tensor
) -> Tensor:
    """Write the dense states of `quantize_kv`'s codes and scales into `out`, and return it.

    Args:
        codes: (..., tokens, head_dim), int8.
        scales: (..., tokens).
        factors: (..., head_dim), as given to `quantize_kv`.
        out: (..., tokens, head_dim), float; the product is rounded to its precision.
    """
    out.copy_(codes).mul_(scales[..., None].to(out.dtype))
    return out if factors is None else out.mul_(factors[..., None, :].to(out.dtype))


class _Store:
    """Keys or values of one layer, with room to grow in place.

    Attributes:
        codes: (batch, kv_heads, capacity, head_dim), int8.
        scales: (batch, kv_heads, capacity), bfloat16.
        factors: (batch, kv_heads, head_dim), bfloat16; None for values.
    """

    def __init__(self, states: Tensor, factors: Tensor | None) -> None:
        batch, heads, _, head_dim = states.shape
        self.codes = states.new_empty((batch, heads, 0, head_dim), dtype=torch.int8)
        self.scales = states.new_empty((batch, heads, 0), dtype=torch.bfloat16)
        self.factors = factors

    def append(self, states: Tensor, length: int) -> Tensor:
        """Store new states behind the first `length`; return all of them dense.

        The new ones are returned as they are: only what a later call reads has been rounded.
        """
        batch, heads, head_dim = (self.codes.shape[i] for i in (0, 1, 3))
        if states.shape[:2] != (batch, heads) or states.shape[3] != head_dim:
            raise InvalidRequest(
                f"The cache holds {batch} sequences of {heads} heads of size {head_dim}, not "
                f"{tuple(states.shape)}. Pass the cache to the model and batch that filled it."
            )
        end = length + states.shape[2]
        self._reserve(end)
        dense = states.new_empty((batch, heads, end, head_dim))
        dequantize_kv(
            self.codes[:, :, :length],
            self.scales[:, :, :length],
            self.factors,
            out=dense[:, :, :length],
        )
        dense[:, :, length:] = states
        codes, scales = quantize_kv(states, self.factors)
        self.codes[:, :, length:end], self.scales[:, :, length:end] = codes, scales
        return dense

    def change(self, work: Callable[[Tensor], Tensor]) -> None:
        """Replace what is stored by what `work` makes of each tensor."""
        self.codes, self.scales = work(self.codes), work(self.scales)
        self.factors = None if self.factors is None else work(self.factors)

    def tensors(self) -> list[Tensor]:
        """Return all that takes memory."""
        return [t for t in (self.codes, self.scales, self.factors) if t is not None]

    def _reserve(self, length: int) -> None:
        if self.codes.is_inference() and not torch.is_inference_mode_enabled():
            self.change(torch.clone)  # torch forbids to write into such tensors out of that mode
        missing = length - self.codes.shape[2]
        if missing > 0:
            more = -(-missing // GROWTH) * GROWTH
            pad = torch.nn.functional.pad
            self.codes, self.scales = pad(self.codes, (0, 0, 0, more)), pad(self.scales, (0, more))


class _Int8Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer whose `update` takes and gives dense states and stores int8."""

    supports_early_init = False  # the factors need keys

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stores: tuple[_Store, ...] = ()
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._stores = (_Store(key_states, key_factors(key_states)), _Store(value_states, None))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._stores
        dense = keys.append(key_states, self._length), values.append(value_states, self._length)
        self._length += key_states.shape[-2]
        return dense

    def stored(self) -> list[Tensor]:
        """Return all tensors that the layer keeps between two calls."""
        return [tensor for store in self._stores for tensor in store.tensors()]

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        self._stores, self._length, self.is_initialized = (), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        # In older versions of Transformers a positive number is the length that is to be left.
        left = self._length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._length = max(min(left, self._length), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda stored: stored.index_select(0, beam_idx.to(stored.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda stored: stored.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda stored: stored[indices.to(stored.device)])

    def offload(self) -> None:
        raise InvalidSetting("The int8 cache is not offloaded. Leave out cache_implementation.")

    def _change(self, work: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores:
            store.change(work)


class Int8Layer(NtkLayer, _Int8Layer):  # type: ignore[no-untyped-call]
    """An int8 layer that knows the alpha of its sequences."""


class Int8Cache(Cache):
    """A cache of Transformers that stores int8; used like a `DynamicCache`.

    Args:
        config: Of the model.

    Raises:
        InvalidSetting: The model has layers without plain attention.
    """

    def __init__(self, config: Any) -> None:
        _check_layers(config)
        layers: list[Any] = [Int8Layer() for _ in range(_text_config(config).num_hidden_layers)]
        super().__init__(layers=layers)


def choose_kv_cache(config: Any, *, kv_cache: KvCacheChoice = "auto") -> Callable[[], Cache]:
    """Choose how a model's sequences are cached.

    Args:
        config: Of the model.
        kv_cache: "int8", or "auto": in the model's precision, unless its config asks for int8
            (Qwen v1's `use_cache_quantization`).

    Returns:
        What makes the empty cache of a sequence.

    Raises:
        InvalidSetting: There is no such choice, or the model cannot be cached so.
    """
    if kv_cache not in get_args(KvCacheChoice):
        raise InvalidSetting(f"kv_cache must be auto or int8, not {kv_cache!r}.")
    if kv_cache == "int8" or wants_int8(config):
        _check_layers(config)
        return partial(Int8Cache, config)
    return partial(DynamicCache, config=config)


def wants_int8(config: Any) -> bool:
    """Tell whether a checkpoint asks for the int8 cache (Qwen v1's `use_cache_quantization`)."""
    return config.model_type == "qwen" and bool(config.use_cache_quantization)


def check_model_cache(cache: Any, config: Any) -> None:
    """Refuse a cache in the model's precision where the configuration asks for int8.

    An `Int8Cache` that is passed to another model was asked for and says itself what it holds.

    Raises:
        InvalidRequest: With what to pass instead.
    """
    if cache is not None and wants_int8(config):
        check_cache_kind(cache, int8=True)


def check_cache_kind(cache: Any, *, int8: bool) -> None:
    """Refuse a cache that is not of the kind that its user keeps.

    Raises:
        InvalidRequest: With what to pass instead.
    """
    if isinstance(cache, Int8Cache) == int8:
        return
    given = type(cache).__name__
    raise InvalidRequest(
        f"Keys and values are cached in int8 here, and a {given} does not. Pass an Int8Cache, or "
        "no cache, or set use_cache_quantization (kv_cache) back."
        if int8
        else f"Keys and values are cached in the model's precision here, and an {given} does not. "
        "Pass a DynamicCache, or choose kv_cache='int8'."
    )


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _check_layers(config: Any) -> None:
    kinds = getattr(_text_config(config), "layer_types", None) or []
    other = sorted(set(kinds) - {"full_attention"})
    if other:
        raise InvalidSetting(
            f"The int8 cache is for layers of full attention, and this model has {other[0]} "
            "layers. Leave out kv_cache (--kv-cache)."
        )

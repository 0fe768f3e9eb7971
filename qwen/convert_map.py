"""Which tensor of Qwen v1 is which of the Qwen2 layout.

A plan is made from names and shapes alone, so that everything that does not fit is refused before
a byte is written. Values are split, joined, repeated or copied, never computed; packed GPTQ tensors
go the same way. Knows no files, no tokenizer and no config.json.
Source of the map: the published tensor names of both; `docs/conversion.md` has the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qwen.errors import CheckpointDamaged, CheckpointUnsupported

Layout = Literal["qwen1", "qwen2"]
Build = Callable[[Sequence[Tensor]], Tensor]

#: Modules that differ in their names alone, first Qwen v1's: around the layers and in each layer.
_EMBEDDING = ("transformer.wte", "model.embed_tokens")
_FINAL_NORM = ("transformer.ln_f", "model.norm")
_HEAD = ("lm_head", "lm_head")
_NORMS = (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"))
#: Likewise, with the widths of outputs and inputs by their names in `ModelSizes`.
_LINEARS = (
    ("attn.c_proj", "self_attn.o_proj", "hidden", "hidden"),
    ("mlp.w1", "mlp.up_proj", "mlp", "hidden"),
    ("mlp.w2", "mlp.gate_proj", "mlp", "hidden"),
    ("mlp.c_proj", "mlp.down_proj", "hidden", "mlp"),
)
#: The fused module and, in the order of its outputs, the three that it becomes.
_FUSED = "attn.c_attn"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_PACKED = ("qweight", "qzeros", "scales")
_GROUPS = "g_idx"
#: Buffers that old files of either layout hold; models compute them.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq|attn\.(masked_bias|logn_tensor)$")

#: Bytes of a value in the dtypes that are converted, as safetensors spells them, and torch's names.
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the map must know of a model.

    Attributes:
        kv_heads: Of the source; a Qwen v1 checkpoint has as many as `heads`.
        mlp: Width of the MLP, half of Qwen v1's `intermediate_size`.
        packed_bits: Bits of a GPTQ weight; None when the weights are not quantised.
        is_tied: Whether the source's output matrix is its embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    packed_bits: int | None = None
    is_tied: bool = False

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values, over all heads of the source."""
        return self.hidden // self.heads * self.kv_heads


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a source's file, as the header tells."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write.

    Attributes:
        sources: Names of the tensors that it is made from.
        dtype: As safetensors spells it.
        build: Makes it from its sources, in their order.
    """

    name: str
    sources: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    build: Build

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


def plan_weights(
    stored: Mapping[str, StoredTensor], sizes: ModelSizes, *, to: Layout
) -> list[PlannedTensor]:
    """Plan all tensors of the target, in the order in which a model runs.

    Raises:
        CheckpointDamaged: A tensor is missing or has another shape than the sizes ask for.
        CheckpointUnsupported: The target has no place for a tensor.
    """
    planner = _Planner(stored, sizes, to)
    plan = list(planner.plan())
    for name in sorted(set(stored) - planner.used):
        if not _BUFFERS.search(name):
            raise CheckpointUnsupported(
                f"The tensor {name} has no place in the other layout. Only plain Qwen v1 and "
                "Qwen2 models are converted; choose the checkpoint without additions."
            )
    return plan


class _Planner:
    def __init__(self, stored: Mapping[str, StoredTensor], sizes: ModelSizes, to: Layout) -> None:
        self._stored = stored
        self._sizes = sizes
        self._to = to
        self.used: set[str] = set()

    def plan(self) -> Iterator[PlannedTensor]:
        sizes = self._sizes
        matrix = (sizes.vocabulary, sizes.hidden)
        yield self._plain(_EMBEDDING, matrix)
        for index in range(sizes.layers):
            yield from self._layer(f"transformer.h.{index}.", f"model.layers.{index}.")
        yield self._plain(_FINAL_NORM, (sizes.hidden,))
        if sizes.is_tied:  # what is stored as the head is not what the model uses
            head = f"{_HEAD[0]}.weight"
            self.used.add(head)
            yield replace(self._plain(_EMBEDDING, matrix), name=head, build=_clone)
        else:
            yield self._plain(_HEAD, matrix)

    def _layer(self, v1: str, v2: str) -> Iterator[PlannedTensor]:
        sizes = self._sizes
        for name, other in _NORMS:
            yield self._plain((v1 + name, v2 + other), (sizes.hidden,))
        parts = [v2 + name for name in _QKV]
        yield from (self._split if self._to == "qwen2" else self._fuse)(v1 + _FUSED, parts)
        for name, other, outputs, inputs in _LINEARS:
            widths = getattr(sizes, outputs), getattr(sizes, inputs)
            yield from self._linear((v1 + name, v2 + other), *widths)

    def _plain(self, modules: tuple[str, str], shape: tuple[int, ...]) -> PlannedTensor:
        source, target = self._directed(modules)
        found = self._find(f"{source}.weight", shape)
        return PlannedTensor(
            f"{target}.weight", (f"{source}.weight",), found.dtype, found.shape, _first
        )

    def _directed(self, modules: tuple[str, str]) -> tuple[str, str]:
        return modules if self._to == "qwen2" else modules[::-1]

    def _linear(
        self, modules: tuple[str, str], outputs: int, inputs: int
    ) -> Iterator[PlannedTensor]:
        source, target = self._directed(modules)
        for part, found in self._parts(source, outputs, inputs).items():
            # GPTQ files of both layouts give every linear a bias; without meaning if it is zero.
            build: Build = partial(_zero_only, name=source) if part == "bias" else _first
            sources = (f"{source}.{part}",)
            yield PlannedTensor(f"{target}.{part}", sources, found.dtype, found.shape, build)

    def _split(self, source: str, targets: Sequence[str]) -> Iterator[PlannedTensor]:
        hidden = self._sizes.hidden
        parts = self._parts(source, 3 * hidden, hidden, bias="needed")
        for index, target in enumerate(targets):
            for part, found in parts.items():
                build: Build = partial(_third, index=index, dim=_outputs_dim(part))
                if part == _GROUPS:
                    build = _clone
                shape = _resized(found.shape, part, lambda width: width // 3)
                sources = (f"{source}.{part}",)
                yield PlannedTensor(f"{target}.{part}", sources, found.dtype, shape, build)

    def _fuse(self, target: str, sources: Sequence[str]) -> Iterator[PlannedTensor]:
        sizes = self._sizes
        widths = (sizes.hidden, sizes.kv_width, sizes.kv_width)
        has_bias = any(f"{source}.bias" in self._stored for source in sources)
        bias: Literal["needed", "zero"] = "needed" if has_bias else "zero"
        found = [
            self._parts(source, width, sizes.hidden, bias=bias)
            for source, width in zip(sources, widths, strict=True)
        ]
        for part, first in found[0].items():
            names = tuple(f"{source}.{part}" for source in sources)
            if any(part not in others or others[part].dtype != first.dtype for others in found):
                raise CheckpointUnsupported(
                    f"{', '.join(names)} are not stored alike, so they cannot become one tensor. "
                    "Choose a checkpoint whose layers are all of one kind."
                )
            build: Build = partial(_joined, sizes=sizes, dim=_outputs_dim(part))
            if part == _GROUPS:
                build = partial(_same, names=names)
            shape = _resized(first.shape, part, lambda width: 3 * width)
            yield PlannedTensor(f"{target}.{part}", names, first.dtype, shape, build)
        if not has_bias:
            dtype = found[0].get("weight", found[0].get("scales"))
            assert dtype is not None
            width = 3 * sizes.hidden
            yield PlannedTensor(
                f"{target}.bias", (), dtype.dtype, (width,), partial(_zeros, width, dtype.dtype)
            )

    def _parts(
        self,
        module: str,
        outputs: int,
        inputs: int,
        *,
        bias: Literal["needed", "packed", "zero"] = "packed",
    ) -> dict[str, StoredTensor]:
        """Find the tensors of a linear module by the last part of their names.

        Args:
            module: Its name in the source.
            outputs: Its width.
            inputs: Width of what it reads.
            bias: "packed" takes one along only with packed weights; "zero": there is none.
        """
        bits = self._sizes.packed_bits
        is_packed = bits is not None and f"{module}.weight" not in self._stored
        shapes: dict[str, tuple[int | None, ...]] = {"weight": (outputs, inputs)}
        if is_packed:
            assert bits is not None
            packed = (inputs * bits // 32, outputs), (None, outputs * bits // 32), (None, outputs)
            shapes = dict(zip(_PACKED, packed, strict=True))
            if f"{module}.{_GROUPS}" in self._stored:
                shapes[_GROUPS] = (inputs,)
        if bias == "needed" or (
            bias == "packed" and is_packed and f"{module}.bias" in self._stored
        ):
            shapes["bias"] = (outputs,)
        return {part: self._find(f"{module}.{part}", shape) for part, shape in shapes.items()}

    def _find(self, name: str, shape: Sequence[int | None]) -> StoredTensor:
        found = self._stored.get(name)
        if found is None:
            raise CheckpointDamaged(
                f"The weights are incomplete: the tensor {name} is not there. Fetch the "
                "checkpoint's safetensors files again."
            )
        if len(found.shape) != len(shape) or any(
            wanted not in (None, is_) for wanted, is_ in zip(shape, found.shape, strict=True)
        ):
            wanted_shape = tuple("any" if wanted is None else wanted for wanted in shape)
            raise CheckpointDamaged(
                f"The tensor {name} has the shape {found.shape}, but config.json asks for "
                f"{wanted_shape}. Fetch both from the same checkpoint."
            )
        self.used.add(name)
        return found


def _outputs_dim(part: str) -> int:
    """Return along which dimension the outputs of a linear module lie."""
    return 0 if part == "weight" else -1


def _resized(shape: tuple[int, ...], part: str, change: Callable[[int], int]) -> tuple[int, ...]:
    if part == _GROUPS:
        return shape
    dim = _outputs_dim(part) % len(shape)
    return (*shape[:dim], change(shape[dim]), *shape[dim + 1 :])


def _first(sources: Sequence[Tensor]) -> Tensor:
    return sources[0]


def _clone(sources: Sequence[Tensor]) -> Tensor:
    # One source twice in a file would share memory, which safetensors refuses.
    return sources[0].clone()


def _third(sources: Sequence[Tensor], *, index: int, dim: int) -> Tensor:
    return sources[0].chunk(3, dim)[index].clone()


def _joined(sources: Sequence[Tensor], *, sizes: ModelSizes, dim: int) -> Tensor:
    query, key, value = sources
    repeated = [_repeat_heads(part, sizes, dim) for part in (key, value)]
    return torch.cat([query, *repeated], dim)


def _repeat_heads(tensor: Tensor, sizes: ModelSizes, dim: int) -> Tensor:
    """Repeat each head in place, as grouped attention does it while it runs."""
    groups = sizes.heads // sizes.kv_heads
    if groups == 1:
        return tensor
    dim %= tensor.ndim
    shape = tensor.shape
    heads = tensor.reshape(*shape[:dim], sizes.kv_heads, -1, *shape[dim + 1 :])
    return heads.repeat_interleave(groups, dim).flatten(dim, dim + 1)


def _same(sources: Sequence[Tensor], *, names: Sequence[str]) -> Tensor:
    if any(not torch.equal(sources[0], other) for other in sources[1:]):
        raise CheckpointUnsupported(
            f"{', '.join(names)} differ: with desc_act each projection groups its inputs in an "
            "order of its own, and one fused projection has only one. Choose a checkpoint "
            "quantised without desc_act, or the unquantised one."
        )
    return sources[0]


def _zero_only(sources: Sequence[Tensor], *, name: str) -> Tensor:
    if sources[0].any():
        raise CheckpointUnsupported(
            f"{name}.bias is not zero, and the other layout has no bias there. Choose a checkpoint "
            "without this bias."
        )
    return sources[0]


def _zeros(width: int, dtype: str, sources: Sequence[Tensor]) -> Tensor:
    return torch.zeros(width, dtype=FLOATS[dtype])

"""How GPTQ checkpoints store a linear layer: settings, packed codes, zeros, scales.

Pure functions on values and tensors; knows no files, no models and no kernels. The format is that
of AutoGPTQ and of GPTQModel's `checkpoint_format` "gptq" (version 1). Of a layer with `in` inputs
and `out` outputs, bits b and group size G it stores

    qweight  (in * b / 32, out)   int32  codes along the inputs, the first in the lowest bits
    qzeros   (groups, out * b / 32)  int32  zero - 1 along the outputs, likewise
    scales   (groups, out)        float16
    g_idx    (in,)                int32  the group of each input; here always i // G

and means w[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = i // G. Layers may have
other bits or groups than the rest: GPTQModel's `dynamic` names them by regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qwen.errors import CheckpointDamaged, CheckpointUnsupported

Bits = Literal[4, 8]

#: Inputs that share a scale; -1 is all of them.
GROUP_SIZES = (32, 64, 128, -1)
#: The tensors that replace a layer's `weight`, and the one that only repeats the group size.
PACKED_PARTS = ("qweight", "qzeros", "scales")
GROUP_INDEX = "g_idx"

_FORMAT = "gptq"
#: Bits of a packed word.
_WORD = 32
_OTHER = "Choose a checkpoint in that format, the unquantised one, or a .gguf file."


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """The settings of a GPTQ checkpoint that decide how its tensors are read.

    Attributes:
        bits: Of a code.
        group_size: Inputs that share a scale; -1 is all of them.
        sym: Whether every zero is the middle code.
        quantizes_head: Whether `lm_head` is quantised too.
        rules: Layers that differ from the rest.
    """

    bits: Bits = 4
    group_size: int = 128
    sym: bool = True
    quantizes_head: bool = False
    rules: tuple[LayerRule, ...] = ()

    def for_layer(self, name: str) -> GptqConfig | None:
        """Return the settings of one layer, by its name in the checkpoint; None if it is dense."""
        for rule in self.rules:
            if rule.pattern.match(name):
                return rule.config
        return replace(self, rules=())

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says as `quantization_config`, in AutoGPTQ's words."""
        rules: dict[str, dict[str, Any]] = {}
        for rule in self.rules:
            own = rule.config
            sign, keys = ("-:", ()) if own is None else ("+:", ("bits", "group_size", "sym"))
            rules[f"{sign}{rule.pattern.pattern}"] = {key: getattr(own, key) for key in keys}
        return {
            "quant_method": _FORMAT,
            "checkpoint_format": _FORMAT,
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": False,
            "lm_head": self.quantizes_head,
            **({"dynamic": rules} if rules else {}),
        }

    def groups(self, in_features: int) -> int:
        """Return into how many groups so many inputs fall; the last may be smaller."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def group_index(self, in_features: int) -> Tensor:
        """Return the `g_idx` of a layer: (in,) int32."""
        size = in_features if self.group_size == -1 else self.group_size
        return torch.arange(in_features, dtype=torch.int32) // size


@dataclass(frozen=True, slots=True)
class LayerRule:
    """How some layers differ from the rest; of several rules for a layer the first counts.

    Attributes:
        pattern: Matches the beginning of a layer's name.
        config: Their settings; None leaves them dense.
    """

    pattern: re.Pattern[str]
    config: GptqConfig | None


@dataclass(frozen=True, slots=True)
class GptqTensors:
    """The tensors of one layer, as the module describes them; `bias` is (out,), float."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None
    bias: Tensor | None = None


def parse_gptq_config(settings: object, *, name: str) -> GptqConfig:
    """Read `quantization_config` of a config.json, or a whole quantize_config.json.

    Args:
        settings: The parsed JSON.
        name: The checkpoint's folder or name, for messages.

    Raises:
        CheckpointDamaged: A setting is missing or has a value that no writer gives it.
        CheckpointUnsupported: A method or variant that is not run, by its name.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointDamaged(
            f"The quantization settings of {name} are no JSON object. Fetch config.json again."
        )
    _check_method(settings, name)
    bits, group_size = (
        _read_number(settings, "bits", name),
        _read_number(settings, "group_size", name),
    )
    if bits not in (4, 8):
        raise CheckpointUnsupported(
            f"{name} is quantised to {bits} bits; GPTQ is run with 4 or 8 bits. {_OTHER}"
        )
    if group_size not in GROUP_SIZES:
        raise CheckpointUnsupported(
            f"{name} is quantised in groups of {group_size}; GPTQ is run with group_size 32, 64, "
            f"128 or -1 (whole rows). {_OTHER}"
        )
    if _read_flag(settings, "desc_act", name, default=False):
        raise CheckpointUnsupported(
            f"{name} is quantised with desc_act, which groups the inputs in another order for "
            "every layer and is not run here. Choose a checkpoint quantised without desc_act, the "
            "unquantised one, or a .gguf file."
        )
    return GptqConfig(
        bits=4 if bits == 4 else 8,
        group_size=group_size,
        sym=_read_flag(settings, "sym", name, default=True),
        quantizes_head=_read_flag(settings, "lm_head", name, default=False),
        rules=_read_rules(settings, name),
    )


def _read_rules(settings: Mapping[str, Any], name: str) -> tuple[LayerRule, ...]:
    """Read GPTQModel's `dynamic`.

    "-:PATTERN" leaves layers dense, "+:PATTERN" or a bare one gives them settings of their own.
    """
    dynamic = settings.get("dynamic") or {}
    common = {key: value for key, value in settings.items() if key != "dynamic"}
    rules = []
    try:
        for key, own in dynamic.items():
            config = None
            if not key.startswith("-:"):
                config = parse_gptq_config(common | dict(own), name=name)
            rules.append(LayerRule(re.compile(re.sub(r"^[+-]:", "", key)), config))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointDamaged(
            f"The quantization settings of {name} name layers in a way that cannot be read "
            "(dynamic). Fetch config.json again."
        ) from error
    return tuple(rules)


def _check_method(settings: Mapping[str, Any], name: str) -> None:
    method = settings.get("quant_method") or settings.get("method")
    if method is None:  # quantize_config.json of AutoGPTQ names none
        is_other = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit", "w_bit"))
        method = "another method" if is_other or "bits" not in settings else _FORMAT
    if method != _FORMAT:
        raise CheckpointUnsupported(
            f"{name} is quantised by {method}; of quantised checkpoints only GPTQ ones are run. "
            f"{_OTHER}"
        )
    stored = settings.get("checkpoint_format") or settings.get("format") or _FORMAT
    if settings.get("is_marlin_format"):
        stored = "marlin"
    if stored != _FORMAT:
        raise CheckpointUnsupported(
            f"{name} stores its GPTQ tensors in the format '{stored}'; only version 1 "
            f"(checkpoint_format 'gptq') is run. {_OTHER}"
        )
    if settings.get("pack_dtype", "int32") != "int32":
        raise CheckpointUnsupported(
            f"{name} packs its codes into {settings['pack_dtype']}; only int32 is run. {_OTHER}"
        )


def _read_number(settings: Mapping[str, Any], key: str, name: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointDamaged(
            f"The quantization settings of {name} say {key} = {value!r} instead of a whole "
            "number. Fetch config.json again."
        )
    return value


def _read_flag(settings: Mapping[str, Any], key: str, name: str, *, default: bool) -> bool:
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointDamaged(
            f"The quantization settings of {name} say {key} = {value!r} instead of true or false. "
            "Fetch config.json again."
        )
    return value


def check_layer(tensors: GptqTensors, config: GptqConfig, *, name: str) -> None:
    """Refuse tensors that do not mean what the settings say.

    Args:
        tensors: Of one layer.
        config: Of the checkpoint.
        name: The layer's name, for messages.

    Raises:
        CheckpointDamaged: Shapes or dtypes that contradict the settings.
        CheckpointUnsupported: Zeros of format version 2, or inputs grouped in another order.
    """
    per_word = _WORD // config.bits
    in_features, out_features = tensors.qweight.shape[0] * per_word, tensors.qweight.shape[-1]
    groups = config.groups(in_features)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "qzeros": (tensors.qzeros, (groups, out_features // per_word)),
        "scales": (tensors.scales, (groups, out_features)),
        GROUP_INDEX: (tensors.g_idx, (in_features,)),
        "bias": (tensors.bias, (out_features,)),
    }
    for part, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise CheckpointDamaged(
                f"The tensor {name}.{part} has the shape {tuple(tensor.shape)}, but {config.bits} "
                f"bits and group_size {config.group_size} ask for {shape}. Fetch config.json and "
                "the safetensors files from the same checkpoint."
            )
    for part, tensor in (("qweight", tensors.qweight), ("qzeros", tensors.qzeros)):
        if tensor.dtype != torch.int32:
            raise CheckpointDamaged(
                f"The tensor {name}.{part} has the dtype {tensor.dtype} instead of int32. Fetch "
                "the safetensors files again."
            )
    if not tensors.scales.isfinite().all():
        raise CheckpointDamaged(
            f"The tensor {name}.scales holds values that are no numbers. Fetch the safetensors "
            "files again."
        )
    _check_group_index(tensors.g_idx, config, name)
    _check_zeros(tensors.qzeros, config, name)


def _check_group_index(g_idx: Tensor | None, config: GptqConfig, name: str) -> None:
    if g_idx is None:
        return
    if not torch.equal(g_idx.cpu().int(), config.group_index(len(g_idx))):
        raise CheckpointUnsupported(
            f"{name}.g_idx groups the inputs in an order of its own, as desc_act does, which is "
            "not run here. Choose a checkpoint quantised without desc_act, the unquantised one, "
            "or a .gguf file."
        )


def _check_zeros(qzeros: Tensor, config: GptqConfig, name: str) -> None:
    """Refuse version 2, which stores the zero itself; only symmetric files give that away."""
    middle = 1 << (config.bits - 1)
    if config.sym and bool((_unpack_last(qzeros, config.bits) == middle).all()):
        raise CheckpointUnsupported(
            f"{name}.qzeros stores {middle} everywhere where version 1 of the GPTQ format stores "
            f"{middle - 1}: these are tensors of version 2 (gptq_v2), which is not run. {_OTHER}"
        )


def unpack_codes(qweight: Tensor, *, bits: int = 4) -> Tensor:
    """Unpack `qweight` to the codes.

    Args:
        qweight: (in * bits / 32, out) int32.
        bits: Of a code.

    Returns:
        (in, out) uint8.
    """
    return _unpack_last(qweight.t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, *, bits: int = 4) -> Tensor:
    """Unpack `qzeros` to the codes that mean zero.

    Args:
        qzeros: (groups, out * bits / 32) int32, holding zero - 1.
        bits: Of a code.

    Returns:
        (groups, out) uint8. What is stored for a zero of 0 wraps around to the highest code.
    """
    return (_unpack_last(qzeros, bits) + 1) & ((1 << bits) - 1)


def pack_codes(codes: Tensor, *, bits: int = 4) -> Tensor:
    """Pack codes to `qweight`, the inverse of `unpack_codes`; `in` is a multiple of 32 / bits."""
    return _pack_last(codes.t(), bits).t().contiguous()


def pack_zeros(zeros: Tensor, *, bits: int = 4) -> Tensor:
    """Pack zeros to `qzeros`, the inverse of `unpack_zeros`; `out` as `in` in `pack_codes`."""
    return _pack_last((zeros.int() - 1) & ((1 << bits) - 1), bits)


def dequantize(
    tensors: GptqTensors, config: GptqConfig, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight that packed tensors mean, computed in float32.

    Args:
        tensors: Of one layer; checked by `check_layer`.
        config: Of the checkpoint.
        dtype: Of the result.

    Returns:
        (out, in), as `nn.Linear.weight`.
    """
    codes = unpack_codes(tensors.qweight, bits=config.bits)
    group = config.group_index(len(codes)).long().to(codes.device)
    zeros = unpack_zeros(tensors.qzeros, bits=config.bits)
    weight = (codes.float() - zeros.float()[group]) * tensors.scales.float()[group]
    return weight.t().contiguous().to(dtype)


def _unpack_last(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 words along the last dimension to uint8 codes.

    Goes over bytes, a quarter of the memory of words; torch runs on little-endian machines only.
    """
    codes = packed.contiguous().unsqueeze(-1).view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return codes.flatten(-2)


def _pack_last(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension to int32 words."""
    codes = codes.to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    words = codes.reshape(-1).view(torch.int32)  # flat: strides of sizes of 1 confuse `view`
    return words.reshape(*codes.shape[:-1], -1)

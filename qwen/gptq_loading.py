"""GPTQ checkpoints in Transformers' own loading, without another package.

`register_gptq` puts `GptqLoader` where Transformers has a loader that needs GPTQModel and optimum:
placing, shards and checks stay Transformers'. Which layers are quantised is read from the names of
the stored tensors; each becomes an `Int4Linear`, or with GPTQModel installed one of its kernels;
8 bits, and sizes that no kernel takes, become dense again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
from transformers.utils.quantization_config import GPTQConfig

from qwen.checkpoint_files import load_json, weight_files
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.gptq_format import (
    GROUP_INDEX,
    PACKED_PARTS,
    GptqConfig,
    GptqTensors,
    check_layer,
    dequantize,
    parse_gptq_config,
)
from qwen.gptqmodel_kernels import GptqModelKernels, find_kernels
from qwen.quantized import Int4Linear

logger = logging.getLogger(__name__)

_DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_PACKED = PACKED_PARTS[0]
#: Of AutoGPTQ, from the time before config.json had the settings.
_OLDER_SETTINGS = "quantize_config.json"


def register_gptq() -> None:
    """Make Transformers load GPTQ checkpoints by `GptqLoader`. May be called again."""
    loaders: dict[str, Any] = quantizers.AUTO_QUANTIZER_MAPPING
    loaders["gptq"] = _choose_loader
    configs: dict[str, Any] = quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING
    configs["gptq"] = _Settings


class _Settings(GPTQConfig):
    """Transformers' settings, which by themselves forget the layers that differ from the rest."""

    def __init__(self, *args: Any, dynamic: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dynamic = dynamic


def _choose_loader(config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> HfQuantizer:
    """Leave it to Transformers to quantise a dense checkpoint while it is loaded."""
    kind = GptqLoader if pre_quantized else GptqHfQuantizer
    return kind(config, pre_quantized=pre_quantized, **kwargs)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Read the GPTQ settings of a folder and compare them with its tensors.

    Args:
        folder: Of a checkpoint whose files are whole.

    Returns:
        What config.json has, or should have, as `quantization_config`; None for dense weights.

    Raises:
        CheckpointDamaged: Settings without quantised tensors, or the other way round.
        CheckpointUnsupported: A method or variant that is not run.
    """
    settings = load_json(folder / "config.json").get("quantization_config")
    if not settings and (folder / _OLDER_SETTINGS).exists():
        settings = {"quant_method": "gptq"} | load_json(folder / _OLDER_SETTINGS)
    config = parse_gptq_config(settings, name=str(folder)) if settings else None
    packed = _first_packed(folder / name for name in weight_files(folder))
    if packed is not None and config is None:
        raise CheckpointDamaged(
            f"{folder} holds quantised weights ({packed}), but its config.json says nothing of it "
            "(quantization_config). Fetch config.json again from the same checkpoint."
        )
    if packed is None and config is not None:
        raise CheckpointDamaged(
            f"{folder / 'config.json'} says that the weights are quantised (quantization_config), "
            "but they are not. Fetch config.json and the weights from the same checkpoint."
        )
    return config.to_dict() if config is not None else None


def _first_packed(files: Iterable[Path]) -> str | None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(f".{_PACKED}"):
                    return str(name)
    return None


def quantization_notices(model: Any) -> tuple[str, ...]:
    """Return what a user should know of how a model's quantised weights are run."""
    loader = getattr(model, "hf_quantizer", None)
    return tuple(loader.notices) if isinstance(loader, GptqLoader) else ()


def describe_weights(model: Any) -> str:
    """Return the dtype of a model's weights and computation: "float32", "int4 (bfloat16)"."""
    dtype = str(model.dtype).removeprefix("torch.")
    loader = getattr(model, "hf_quantizer", None)
    if not isinstance(loader, GptqLoader) or not loader.kernel:
        return dtype
    return f"{loader.kernel} ({dtype})"


class StoredLayer(nn.Module):
    """A layer's GPTQ tensors while they are loaded; replaced by the layer that runs."""

    def __init__(
        self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: GptqConfig
    ) -> None:
        super().__init__()
        self.config = config
        for part, (dtype, shape) in shapes.items():
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device="meta"))

    def tensors(self) -> GptqTensors:
        """Return what was loaded."""
        return GptqTensors(**dict(self.named_buffers()))


class GptqLoader(HfQuantizer):
    """Loads GPTQ tensors as Transformers asks a quantizer to.

    Attributes:
        kernel: What runs the layers, for people ("int4"); "" when all are dense again.
        notices: Sentences for the user.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kernel = ""
        self.notices: list[str] = []
        self._config: GptqConfig | None = None
        self._dtype = torch.float32

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Refuse to save: the packed form is good for one machine only."""
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Take notice of the dtype of everything that is not quantised."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a `StoredLayer` where the files have the tensors of one."""
        name = str(model.config.name_or_path)
        self._config = parse_gptq_config(self.quantization_config.to_dict(), name=name)
        layers = read_layers(checkpoint_files or (), name=name)
        prefix = f"{model.base_model_prefix}."
        for path, parts in layers.items():
            found = _find(model, path) or _find(model, path.removeprefix(prefix))
            if found is None and model.get_output_embeddings() is None:
                continue  # the bare model has no place for the head
            if found is None:
                raise CheckpointDamaged(
                    f"The tensor {path}.{_PACKED} of {name} belongs to no linear layer of the "
                    "model. Fetch config.json and the weights from the same checkpoint."
                )
            own_path, linear = found
            config = self._config.for_layer(path) or self._config  # what is packed is not dense
            _check_sizes(linear, parts, config, name=path)
            model.set_submodule(own_path, StoredLayer(parts, config))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Replace each `StoredLayer` by the layer that runs, and free its tensors at once."""
        assert self._config is not None
        paths = [path for path, module in model.named_modules() if isinstance(module, StoredLayer)]
        config = replace(self._config, rules=())
        usual = [path for path in paths if model.get_submodule(path).config == config]
        kernels = self._find_kernels(model.get_submodule(usual[0]), usual[0]) if usual else None
        dense = 0
        for path in paths:
            layer = self._build(model.get_submodule(path), path, kernels)
            dense += isinstance(layer, nn.Linear)
            _replace(model, path, layer)
        if kernels is not None:
            kernels.finish(model)
        self._describe(kernels, dense=dense, total=len(paths))

    def _find_kernels(self, first: StoredLayer, path: str) -> GptqModelKernels | None:
        _check_present(first, path)
        kernels, problem = find_kernels(first.tensors(), first.config, dtype=self._dtype)
        if problem:
            self.notices.append(problem)
        return kernels

    def _build(self, stored: StoredLayer, path: str, kernels: GptqModelKernels | None) -> nn.Module:
        config = stored.config
        _check_present(stored, path)
        tensors = stored.tensors()
        check_layer(tensors, config, name=path)
        if tensors.bias is not None and not tensors.bias.any():
            tensors = replace(tensors, bias=None)  # AutoGPTQ writes one for every layer
        if kernels is not None and kernels.config == config:
            return kernels.build(tensors)
        out_features, in_features = (
            tensors.scales.shape[1],
            len(tensors.qweight) * 32 // config.bits,
        )
        if config.bits == 4 and Int4Linear.fits(
            out_features=out_features, in_features=in_features, group_size=config.group_size
        ):
            return Int4Linear.from_gptq(tensors, config, dtype=self._dtype)
        if config.bits == 4:
            logger.warning(
                "%s has %d inputs and %d outputs, which no 4-bit kernel takes; it is unpacked to "
                "%s.",
                path,
                in_features,
                out_features,
                self._dtype,
            )
        return _dense(tensors, config, self._dtype)

    def _describe(self, kernels: GptqModelKernels | None, *, dense: int, total: int) -> None:
        assert self._config is not None
        bits = self._config.bits
        if kernels is not None:
            self.kernel = f"int{bits}, GPTQModel {kernels.name}"
            self.notices.append(f"The int{bits} weights run on GPTQModel's {kernels.name}.")
        elif bits == 8:
            dtype = str(self._dtype).removeprefix("torch.")
            self.notices.append(
                f"The int8 weights of this checkpoint were unpacked to {dtype} while loading: it "
                "answers as usual, but takes the memory of the unquantised one."
            )
        elif dense < total:
            self.kernel = "int4"
        if bits == 4 and dense and self._config.rules:
            self.notices.append(
                f"{dense} of the {total} quantised layers have 8 bits; they were unpacked to "
                f"{str(self._dtype).removeprefix('torch.')} while loading."
            )
        logger.info(
            "GPTQ: %d layers of %d bits, %d of them unpacked; run by %s",
            total,
            bits,
            dense,
            self.kernel or "dense layers",
        )


def read_layers(
    files: Iterable[str | Path], *, name: str
) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Find the quantised layers of a checkpoint.

    Args:
        files: Its safetensors files.
        name: Of the checkpoint, for messages.

    Returns:
        For each layer's name, dtype and shape of its tensors by the last part of their names.

    Raises:
        CheckpointDamaged: A layer lacks a tensor, or has a dense weight too.
        CheckpointUnsupported: The files are of another format, or a tensor of another dtype.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointUnsupported(
                f"The quantised weights of {name} are no safetensors files ({Path(file).name}). "
                "Choose a checkpoint with safetensors files."
            )
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(key)
                stored[key] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    paths = [key.removesuffix(f".{_PACKED}") for key in stored if key.endswith(f".{_PACKED}")]
    return {path: _parts(stored, path, name) for path in paths}


def _parts(
    stored: Mapping[str, tuple[str, tuple[int, ...]]], path: str, name: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if f"{path}.weight" in stored:
        raise CheckpointDamaged(
            f"{name} holds {path} twice, quantised and as a dense weight. Fetch the safetensors "
            "files again."
        )
    parts = {}
    for part in (*PACKED_PARTS, GROUP_INDEX, "bias"):
        found = stored.get(f"{path}.{part}")
        if found is None and part in PACKED_PARTS:
            raise CheckpointDamaged(
                f"The weights of {name} are incomplete: the tensor {path}.{part} is not there. "
                "Fetch the safetensors files again."
            )
        if found is None:
            continue
        if found[0] not in _DTYPES:
            raise CheckpointUnsupported(
                f"The tensor {path}.{part} of {name} has the dtype {found[0]}, which GPTQ "
                "checkpoints do not have. Choose another checkpoint."
            )
        parts[part] = (_DTYPES[found[0]], found[1])
    return parts


def _find(model: nn.Module, path: str) -> tuple[str, nn.Linear] | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (path, module) if isinstance(module, nn.Linear) else None


def _check_sizes(
    linear: nn.Linear,
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    config: GptqConfig,
    *,
    name: str,
) -> None:
    expected = (linear.in_features * config.bits // 32, linear.out_features)
    stored = parts[_PACKED][1]
    if stored != expected:
        raise CheckpointDamaged(
            f"The tensor {name}.{_PACKED} has the shape {stored}, but config.json and "
            f"{config.bits} bits ask for {expected}. Fetch config.json and the safetensors files "
            "from the same checkpoint."
        )
    if linear.bias is not None and "bias" not in parts:
        raise CheckpointDamaged(
            f"The weights are incomplete: the tensor {name}.bias is not there. Fetch the "
            "safetensors files again."
        )


def _check_present(stored: StoredLayer, path: str) -> None:
    if any(tensor.is_meta for tensor in stored.buffers()):
        raise CheckpointUnsupported(
            f"There is no room for {path}: it was left on disk or in memory to be fetched while "
            "the model runs, which quantised weights cannot. Choose a smaller checkpoint, or "
            "device cpu."
        )


def _dense(tensors: GptqTensors, config: GptqConfig, dtype: torch.dtype) -> nn.Linear:
    weight = dequantize(tensors, config, dtype=dtype)
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=tensors.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if tensors.bias is not None:
        linear.bias = nn.Parameter(tensors.bias.to(dtype), requires_grad=False)
    return linear


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, with what accelerate hung on that for its device."""
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    model.set_submodule(path, layer.eval())

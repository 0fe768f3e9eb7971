"""The kernels of GPTQModel for GPTQ tensors, where that package is installed (an optional extra).

Uses what the package offers to Transformers (`hf_*`), version 7.6; neither optimum nor its own
loading. Knows no files. Whatever goes wrong in the package leaves the work to `Int4Linear`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen.gptq_format import GptqConfig, GptqTensors

logger = logging.getLogger(__name__)


class GptqModelLinear(nn.Module):
    """A layer of GPTQModel that takes and returns any floating dtype.

    Args:
        kernel: The package's layer.
        dtype: In which it computes.
    """

    def __init__(self, kernel: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel = kernel
        self.in_features: int = kernel.in_features
        self.out_features: int = kernel.out_features
        self._dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the last dimension: (..., in) → (..., out)."""
        outputs: Tensor = self.kernel(inputs.to(self._dtype))
        return outputs.to(inputs.dtype)


@dataclass(frozen=True, slots=True)
class GptqModelKernels:
    """The kind of layer that GPTQModel chose for a checkpoint on a device.

    Attributes:
        kind: Its class.
        config: Of the checkpoint.
        dtype: In which it computes.
    """

    kind: type[Any]
    config: GptqConfig
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name of the kind of layer, as the package has it: "MarlinLinear"."""
        return self.kind.__name__

    def build(self, tensors: GptqTensors) -> GptqModelLinear:
        """Build the layer of some tensors; `finish` makes it ready."""
        config = self.config
        layer = self.kind(
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=False,
            in_features=len(tensors.qweight) * 32 // config.bits,
            out_features=tensors.scales.shape[1],
            bias=tensors.bias is not None,
            pack_dtype=torch.int32,
        )
        layer.to(tensors.qweight.device)
        groups = config.group_index(layer.in_features).to(tensors.qweight.device)
        layer.qweight = tensors.qweight
        layer.qzeros = tensors.qzeros
        layer.scales = tensors.scales.to(self.dtype)
        layer.g_idx = groups if tensors.g_idx is None else tensors.g_idx
        if tensors.bias is not None:
            layer.bias = tensors.bias.to(self.dtype)
        return GptqModelLinear(layer.eval(), self.dtype)

    def finish(self, model: nn.Module) -> None:
        """Make all the package's layers in a model ready; once."""
        from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

        hf_convert_gptq_v1_to_v2_format(model, self.config.bits, self.kind, "gptq", None)
        hf_gptqmodel_post_init(model, use_act_order=False)


def find_kernels(
    tensors: GptqTensors, config: GptqConfig, *, dtype: torch.dtype
) -> tuple[GptqModelKernels | None, str]:
    """Choose GPTQModel's kernels and try them on one layer.

    Args:
        tensors: Of a layer, on the device where it will run; not changed.
        config: Of the checkpoint.
        dtype: Of the model.

    Returns:
        None if the package is not installed, has no kernel for this or fails; and in the last case
        a sentence for the user.
    """
    device = tensors.qweight.device
    if not _is_installed() or (config.bits == 8 and device.type == "cpu"):
        return None, ""
    # On a CPU its kernels compute in bfloat16 only: float16 never ends, float32 is unpacked anew
    # for every token (version 7.6).
    chosen = dtype if dtype == torch.float16 and device.type != "cpu" else torch.bfloat16
    try:
        kernels = GptqModelKernels(_select(config, device, chosen), config, chosen)
        _try(kernels, tensors)
    except Exception as error:  # a missing compiler, another version: all ways of a foreign package
        logger.warning("GPTQModel is installed but cannot be used", exc_info=error)
        return None, (
            "GPTQModel is installed but cannot be used here; torch's own kernels run the int"
            f"{config.bits} weights. The log has the reason."
        )
    logger.info("GPTQModel's %s runs the quantised layers", kernels.name)
    return kernels, ""


def _is_installed() -> bool:
    return importlib.util.find_spec("gptqmodel") is not None


def _select(config: GptqConfig, device: torch.device, dtype: torch.dtype) -> type[Any]:
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    kind: type[Any] = hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=False,
        sym=config.sym,
        format="gptq",
        quant_method="gptq",
        dtype=dtype,
        pack=False,
        device_map={"": str(device)},
        backend="auto",
    )
    return kind


def _try(kernels: GptqModelKernels, tensors: GptqTensors) -> None:
    """Run one layer on copies of its tensors; raise what the package raises."""
    layer = kernels.build(
        GptqTensors(
            qweight=tensors.qweight.clone(),
            qzeros=tensors.qzeros.clone(),
            scales=tensors.scales.clone(),
            g_idx=None if tensors.g_idx is None else tensors.g_idx.clone(),
            bias=None if tensors.bias is None else tensors.bias.clone(),
        )
    )
    kernels.finish(layer)
    device = tensors.qweight.device
    with torch.inference_mode():
        layer(torch.ones(1, layer.in_features, dtype=kernels.dtype, device=device))

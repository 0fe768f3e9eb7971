"""`Int4Linear`: a linear layer that keeps its weight in 4 bits, on torch's own kernels.

Built from GPTQ tensors, without another package. Knows no files and no models.
`qwen.int4_kernels` knows the packed forms, `qwen.gptq_format` the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen import int4_kernels
from qwen.errors import CheckpointUnsupported
from qwen.gptq_format import GptqConfig, GptqTensors, unpack_codes, unpack_zeros
from qwen.int4_kernels import COMPUTE_DTYPE, MIDDLE, kernel_group

#: Rows from which the weight is unpacked once for all of them, because the 4-bit kernel unpacks it
#: anew for every few rows.
DENSE_ROWS_CPU = 128
DENSE_ROWS_GPU = 64
#: Outputs whose weights are unpacked at a time: 16 to 64 MB on a CPU; on a GPU no more than the
#: widest layer of a 7B model, since layers may be joined.
_OUTPUTS_AT_ONCE = {"cpu": 1024, "cuda": 8192}


class Int4Linear(nn.Module):
    """A linear layer on 4-bit weights; inference only.

    Takes and returns any floating dtype; multiplies few rows in bfloat16 and many rows in the
    dtype that it is given. `to` and `cuda` re-pack the weights for the new device. The state dict
    does not hold the packed weights: their form is good for one kind of CPU or GPU.

    Args:
        codes: (in, out) uint8, 0 to 15, on the device where the layer will run.
        scales: (groups, out), float.
        zeros: (groups, out) uint8: the code that means 0.
        group_size: Inputs that share a scale; -1 is all of them.
        bias: (out,), float.

    Raises:
        CheckpointUnsupported: The kernels cannot run these sizes or this device; see `fits`.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        *,
        group_size: int,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = codes.shape
        group = kernel_group(
            out_features=self.out_features, in_features=self.in_features, group_size=group_size
        )
        if group is None:
            raise CheckpointUnsupported(
                f"A layer of {self.in_features} inputs and {self.out_features} outputs in groups "
                f"of {group_size} cannot be run in 4 bits. Choose the unquantised checkpoint."
            )
        _check_device(codes.device)
        self.group = group
        whole = self.in_features if group_size == -1 else group_size
        rows = torch.arange(0, self.in_features, group, device=codes.device) // whole
        exact = scales.float()[rows]
        offsets = (MIDDLE - zeros.float()[rows]) * exact
        pairs = torch.stack((exact, offsets), dim=-1).to(COMPUTE_DTYPE).contiguous()
        packed = int4_kernels.pack(codes.t().contiguous(), group=group)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", pairs, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def fits(*, out_features: int, in_features: int, group_size: int) -> bool:
        """Tell whether the kernels can run a layer of these sizes."""
        return (
            kernel_group(out_features=out_features, in_features=in_features, group_size=group_size)
            is not None
        )

    @classmethod
    def from_gptq(
        cls, tensors: GptqTensors, config: GptqConfig, *, dtype: torch.dtype
    ) -> Int4Linear:
        """Build from a layer's GPTQ tensors of 4 bits, checked, on the device where it will run.

        Args:
            tensors: Of the layer.
            config: Of the checkpoint.
            dtype: Of the bias.
        """
        assert config.bits == 4
        return cls(
            unpack_codes(tensors.qweight),
            tensors.scales,
            unpack_zeros(tensors.qzeros),
            group_size=config.group_size,
            bias=None if tensors.bias is None else tensors.bias.to(dtype),
        )

    @classmethod
    def joined(cls, layers: Sequence[Int4Linear]) -> Int4Linear:
        """Join layers of the same input on a GPU, whose packed weights become views of the whole.

        Args:
            layers: That `can_join`.
        """
        first = layers[0]
        whole = cls.__new__(cls)
        nn.Module.__init__(whole)
        whole.in_features, whole.group = first.in_features, first.group
        whole.out_features = sum(layer.out_features for layer in layers)
        packed = torch.cat([layer.packed for layer in layers])
        scales = torch.cat([layer.scales for layer in layers], dim=1)
        whole.register_buffer("packed", packed, persistent=False)
        whole.register_buffer("scales", scales, persistent=False)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        views = torch.split(packed, [len(layer.packed) for layer in layers])
        for layer, view in zip(layers, views, strict=True):
            layer.packed = view
        return whole

    @staticmethod
    def can_join(layers: Sequence[nn.Module]) -> bool:
        """Tell whether `joined` takes layers: all in 4 bits alike, in a GPU's packed form."""
        first = layers[0]
        return isinstance(first, Int4Linear) and all(
            isinstance(layer, Int4Linear)
            and layer.packed.device == first.packed.device
            and layer.packed.device.type != "cpu"
            and layer.group == first.group
            and (layer.bias is None) == (first.bias is None)
            for layer in layers
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the last dimension: (..., in) → (..., out), in the dtype of the inputs."""
        rows = inputs.reshape(-1, self.in_features)
        needs_gradient = torch.is_grad_enabled() and rows.requires_grad  # the kernels have none
        use_dense = needs_gradient or self._unpacks_for(len(rows))
        outputs = self._many(rows) if use_dense else self._few(rows)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the kernels multiply by: (out, in), as `nn.Linear.weight`."""
        return self._dense(dtype).t().contiguous()

    def extra_repr(self) -> str:
        """Return what `print` says of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, group={self.group}"

    def _unpacks_for(self, rows: int) -> bool:
        limit = DENSE_ROWS_CPU if self.packed.device.type == "cpu" else DENSE_ROWS_GPU
        return rows > limit and self._can_unpack()

    def _can_unpack(self) -> bool:
        return int4_kernels.can_unpack(self.packed.device, self.in_features, group=self.group)

    def _few(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_empty(0, self.out_features)
        inputs = rows.to(COMPUTE_DTYPE).contiguous()
        outputs = int4_kernels.multiply(inputs, self.packed, self.scales, group=self.group)
        return outputs.to(rows.dtype)

    def _many(self, rows: Tensor) -> Tensor:
        step = _OUTPUTS_AT_ONCE[self.packed.device.type]
        parts = range(0, self.out_features, step)
        return torch.cat([rows @ self._dense(rows.dtype, at, at + step) for at in parts], dim=-1)

    def _dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the weights of some outputs, (in, outputs), from and to whole tiles."""
        if not self._can_unpack():
            rows = torch.eye(self.in_features, dtype=COMPUTE_DTYPE, device=self.packed.device)
            return self._few(rows)[:, start:stop].to(dtype)
        tile = int4_kernels.outputs_of_a_row(self.packed.device)
        packed = self.packed[start // tile : None if stop is None else stop // tile]
        codes = int4_kernels.unpack(packed, in_features=self.in_features, group=self.group)
        scale, offset = self.scales[:, None, start:stop].to(dtype).unbind(-1)
        groups = codes.view(-1, self.group, codes.shape[1]).to(dtype)
        return groups.sub_(MIDDLE).mul_(scale).add_(offset).flatten(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device; of a change of dtype only the bias takes notice."""
        packed, scales = self.packed, self.scales
        del self.packed, self.scales
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            device = fn(torch.empty(0, device=packed.device)).device
            if device != packed.device:
                packed, scales = self._moved(packed, device), scales.to(device)
        finally:
            self.register_buffer("packed", packed, persistent=False)
            self.register_buffer("scales", scales, persistent=False)
        return self

    def _moved(self, packed: Tensor, device: torch.device) -> Tensor:
        _check_device(device)
        if device.type == packed.device.type:
            return packed.to(device)
        if not int4_kernels.can_unpack(packed.device, self.in_features, group=self.group):
            raise CheckpointUnsupported(
                f"Int4 weights cannot be moved from {packed.device} to {device} on this machine. "
                "Load the checkpoint on the device where it will run."
            )
        codes = int4_kernels.unpack(packed, in_features=self.in_features, group=self.group).to(
            device
        )
        return int4_kernels.pack(codes.t().contiguous(), group=self.group)


def _check_device(device: torch.device) -> None:
    """Refuse devices without the kernels.

    Raises:
        CheckpointUnsupported: With what to do.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise CheckpointUnsupported(
            f"Int4 weights run on a CPU or a CUDA GPU, not on '{device}'. Choose device cpu, or "
            "the unquantised checkpoint."
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise CheckpointUnsupported(
            f"Int4 weights need a GPU of compute capability 8.0 or later; {device} has "
            f"{major}.{minor}. Install gptqmodel (requirements-gpu.txt), choose device cpu, or "
            "the unquantised checkpoint."
        )

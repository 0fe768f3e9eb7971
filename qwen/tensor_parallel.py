"""Tensor parallelism for Qwen v1: each process of a group holds some heads of every layer.

Adds to Transformers' styles the one that `c_attn` needs: queries, keys and values lie in one
matrix, so each third is cut by itself, weight and bias alike. Everything else (which matrix is cut
how, reading only one's own part of a file, the sums between processes) is Transformers' own;
`QWenConfig.base_model_tp_plan` has the plan. Knows no model.
"""

from __future__ import annotations

import os
from typing import Any

from qwen.errors import InvalidSetting

#: Name of our style in the plan.
QKV_STYLE = "packed_qkv_colwise"

#: Arguments of `from_pretrained` that ask for tensor parallelism.
_OPTIONS = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def prepare_tensor_parallelism(num_heads: int, options: dict[str, Any]) -> None:
    """Make our style known to Transformers when a model is to be spread over processes.

    Args:
        num_heads: Attention heads of the model.
        options: Keyword arguments of `from_pretrained`; not changed.

    Raises:
        InvalidSetting: The heads cannot be dealt out evenly.
    """
    if all(options.get(name) is None for name in _OPTIONS):
        return
    num_processes = _count_processes(options)
    if num_heads % num_processes:
        fitting = [str(n) for n in range(1, min(num_heads, 64) + 1) if num_heads % n == 0]
        raise InvalidSetting(
            f"The model's {num_heads} attention heads cannot be dealt out evenly to "
            f"{num_processes} processes. Start {', '.join(fitting[:-1])} or {fitting[-1]} of them "
            "(torchrun --nproc-per-node)."
        )
    _register_qkv_style()


def _count_processes(options: dict[str, Any]) -> int:
    """Tell how many processes share each layer; without a statement all that were started do."""
    asked = options.get("distributed_config")
    size = asked.get("tp_size") if isinstance(asked, dict) else getattr(asked, "tp_size", None)
    return int(size or options.get("tp_size") or os.environ.get("WORLD_SIZE") or 1)


def _register_qkv_style() -> None:
    """Add the style to Transformers' table; safe to repeat."""
    import torch
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import PackedColwiseParallel
    from transformers.integrations import tensor_parallel

    class PackedQkvParallel(PackedColwiseParallel):
        """As `PackedColwiseParallel`, for three parts; that one cuts a bias as if it were one."""

        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            """Replace a parameter by the placeholder of this process's part."""
            whole = module._parameters.get(param)
            if whole is None:
                return
            third = _StridedShard(dim=0, split_factor=self.split_factor)
            module._parameters[param] = torch.nn.Parameter(
                distribute_tensor(whole, mesh, [third], src_data_rank=None),
                requires_grad=whole.requires_grad,
            )

    styles: Any = tensor_parallel.ALL_PARALLEL_STYLES
    styles.register(QKV_STYLE, PackedQkvParallel(split_factor=3))

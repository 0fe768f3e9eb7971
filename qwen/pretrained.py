"""How a published Qwen v1 checkpoint is loaded: precision, attention, refusal of damaged files.

Sits between Transformers' `from_pretrained` and the models: a checkpoint's own code is never run,
the published switches (`bf16`, `fp16`, `fp32`, `use_flash_attn`) are obeyed, and weights that do
not fit the configuration are refused by name, where Transformers would go on with random numbers.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any

import torch
from safetensors import SafetensorError

from qwen.configuration_qwen import QWenConfig
from qwen.errors import CheckpointDamaged
from qwen.tensor_parallel import prepare_tensor_parallelism

logger = logging.getLogger(__name__)

#: What finds the files, and is wanted again after the configuration was read.
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
#: What is raised while files are read that are cut short, altered or not there.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    JSONDecodeError,
    FileNotFoundError,
    EOFError,
    KeyError,
)
#: torch raises a plain RuntimeError, as it does for a device that is not there.
_UNREADABLE_SIGN = "PytorchStreamReader"


class PublishedLoading:
    """Mixed into the models before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model as Transformers does, with the published switches.

        Without `dtype` the precision is that of the flag given here, else in `config.json`, else
        what the device computes best in: bfloat16 or float16 on a GPU, float32 on a CPU.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hugging Face hub.
            *model_args: As Transformers.
            config: The configuration; by default the checkpoint's own.
            **kwargs: As Transformers, and `bf16`, `fp16`, `fp32`, `use_flash_attn`.
                `trust_remote_code` is accepted and changes nothing: no remote code is run.

        Raises:
            CheckpointDamaged: Tensors are cut short, missing, unknown or of another shape.
            InvalidSetting: Two precisions are asked for, or more processes than share the heads.
        """
        # Transformers would run `custom_generate/generate.py` of the checkpoint.
        kwargs.pop("trust_remote_code", None)
        kwargs.pop("resume_download", None)  # of the published demos; downloads always resume now
        asked_dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if not isinstance(config, QWenConfig):
            config, kwargs = _load_config(config or pretrained_model_name_or_path, kwargs)
        prepare_tensor_parallelism(config.num_attention_heads, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["dtype"] = asked_dtype or _choose_dtype(config, kwargs.get("device_map"))
        if config.use_flash_attn is True:
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        is_lenient = wants_info or kwargs.get("ignore_mismatched_sizes", False)

        def load(**options: Any) -> Any:
            return super(PublishedLoading, cls).from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                output_loading_info=True,
                **options,
            )

        if is_lenient:
            model, info = load(**kwargs)
        else:
            model, info = _load_whole(load, pretrained_model_name_or_path, kwargs)
        return (model, info) if wants_info else model

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Take torch's own attention when FlashAttention is asked for and cannot run."""
        adjust = super()._check_and_adjust_attn_implementation  # type: ignore[misc]
        if not (attn_implementation or "").startswith("flash_attention"):
            return str(adjust(attn_implementation, *args, **kwargs))
        dtype = self.config.dtype  # type: ignore[attr-defined]
        try:
            if dtype not in (torch.float16, torch.bfloat16):
                raise ValueError(f"it computes in float16 and bfloat16 only, not in {dtype}.")
            return str(adjust(attn_implementation, *args, **kwargs))
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            logger.warning(
                "%s cannot be used, sdpa is used instead: %s To use it, install flash-attn on a "
                "machine with a CUDA GPU and load the model there in bfloat16.",
                attn_implementation,
                str(error).strip().splitlines()[0],
            )
            return str(adjust("sdpa", *args, **kwargs))


def _load_config(source: Any, kwargs: dict[str, Any]) -> tuple[QWenConfig, dict[str, Any]]:
    hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    config, rest = QWenConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    return config, rest | hub


def _choose_dtype(config: QWenConfig, device_map: Any) -> Any:
    if config.flagged_dtype is not None:
        return getattr(torch, config.flagged_dtype)
    if getattr(config, "quantization_config", None) is not None:
        return "auto"
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if not torch.cuda.is_available() or all(str(place) == "cpu" for place in places):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _load_whole(load: Callable[..., Any], name: Any, kwargs: dict[str, Any]) -> Any:
    """Load and refuse what is not exactly the model's tensors."""
    try:
        # Transformers' own refusal of other shapes names none of them.
        model, info = load(**kwargs | {"ignore_mismatched_sizes": True})
    except (*_UNREADABLE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _UNREADABLE_SIGN not in str(error):
            raise
        raise CheckpointDamaged(
            f"The weights of {name} cannot be read: {_reason(error)}. Fetch their files again."
        ) from error
    _check_shapes(info["mismatched_keys"], name)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointDamaged(
            f"The weights of {name} are incomplete: {_listed(missing)} not there"
            f"{_also(info['unexpected_keys'])}. Fetch the files again, or give the tensors "
            "their published names."
        )
    if (extra := sorted(info["unexpected_keys"])) and not hasattr(model, "hf_quantizer"):
        raise CheckpointDamaged(
            f"The weights of {name} hold tensors that its config.json has no place for: "
            f"{_listed(extra)} too many. Fetch both from the same checkpoint."
        )
    return model, info


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run the file as code
        return "a file does not hold tensors, or more than tensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_shapes(mismatched: Any, name: Any) -> None:
    for key, stored, wanted in sorted(mismatched, key=lambda entry: entry[0]):
        advice = (
            f"Set vocab_size in config.json to {stored[0]}, or fetch both files again."
            if key.endswith(("wte.weight", "lm_head.weight"))
            else "config.json and the weights do not belong together; fetch both again."
        )
        raise CheckpointDamaged(
            f"The tensor {key} of {name} has the shape {tuple(stored)}, but its config.json asks "
            f"for {tuple(wanted)}. {advice}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return names[0] + more


def _also(names: Any) -> str:
    return f", while {sorted(names)[0]} is of no use" if names else ""

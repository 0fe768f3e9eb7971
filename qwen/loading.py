"""A checkpoint's name → a model and its tokenizer, ready to run.

Decides device, dtype and attention implementation. Never runs a checkpoint's own code, and refuses
damaged or unsupported ones by name, where Transformers would only warn and go on with random
weights. Knows no prompt and no decoding.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen.auto import register_qwen
from qwen.backend import ReportProgress, ignore_progress
from qwen.checkpoint import parse_checkpoint, resolve_checkpoint
from qwen.checkpoint_files import check_weight_files, load_json
from qwen.errors import (
    CheckpointDamaged,
    CheckpointUnsupported,
    OutOfMemory,
    QwenError,
    is_out_of_memory,
)
from qwen.gguf import WeightsDtype, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DeviceChoice = Literal["auto", "cpu"]
DtypeChoice = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, and what belongs to it.

    Attributes:
        name: As a user knows it.
        notices: Sentences about choices made while loading that a user should know.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    notices: tuple[str, ...] = ()


def load_model(
    checkpoint: str,
    *,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    cache: Path | None = None,
    report: ReportProgress = ignore_progress,
) -> LoadedModel:
    """Load a checkpoint by its name.

    Args:
        checkpoint: See `qwen.checkpoint`.
        device: "auto" is the first GPU if CUDA finds one.
        dtype: "auto" is bfloat16 where the hardware computes in it, else float32.
        cache: Where downloads and conversions are kept; None is the user's cache folder.
        report: Is told what is being done.

    Raises:
        CheckpointError: The checkpoint cannot be had, read or run.
        OutOfMemory: It does not fit; what had been loaded is freed.
    """
    parse_checkpoint(checkpoint)  # a misspelt name fails before seconds of imports
    report("Starting PyTorch")
    import torch

    use_cuda = device == "auto" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if use_cuda else None
    chosen = choose_dtype(
        dtype, has_cuda=use_cuda, cpu_has_bfloat16=not use_cuda and _cpu_has_bfloat16()
    )
    resolved = resolve_checkpoint(
        checkpoint, gguf_dtype=chosen, cuda_memory=memory, cache=cache, report=report
    )
    place = "cuda:0" if use_cuda else "cpu"
    model, tokenizer = load_folder(resolved.folder, device=place, dtype=chosen, report=report)
    return LoadedModel(model, tokenizer, resolved.name, resolved.notices)


def choose_dtype(choice: DtypeChoice, *, has_cuda: bool, cpu_has_bfloat16: bool) -> WeightsDtype:
    """Choose the dtype of weights and computation.

    On a CPU with bf16 instructions bf16 decodes 1.6 times as fast as fp32; without them it is
    emulated and slower.
    """
    if choice != "auto":
        return choice
    return "bfloat16" if has_cuda or cpu_has_bfloat16 else "float32"


def _cpu_has_bfloat16() -> bool:
    """Tell whether the CPU multiplies in bf16 (AVX-512 BF16 or AMX on x86, BF16 on ARM)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def load_folder(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: WeightsDtype = "float32",
    report: ReportProgress = ignore_progress,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint in a folder.

    Args:
        folder: Configuration, tokenizer and safetensors.
        device: As torch spells it.
        dtype: Of weights and computation.
        report: Is told what is being done.

    Raises:
        CheckpointDamaged: A file is cut short or altered; the message names file or tensor.
        CheckpointUnsupported: The model's kind or its quantisation is not run by this version.
        OutOfMemory: It does not fit; what had been loaded is freed.
    """
    check_supported(load_json(folder / "config.json"), folder)
    check_weight_files(folder)
    if (folder / "generation_config.json").exists():
        load_json(folder / "generation_config.json")  # Transformers would go on without it
    failure: QwenError | None = None
    try:
        with quiet_transformers():
            register_qwen()
            report("Loading the tokenizer")
            tokenizer = _load_tokenizer(folder)
            report("Loading the weights")
            model = _load_weights(folder, device, dtype)
            _check_vocabulary(tokenizer, model, folder)
    except Exception as error:
        logger.warning("Loading %s failed", folder, exc_info=error)
        failure = _explained(error, folder)
    if failure is not None:  # raised out here, where no traceback holds the weights any more
        _free_memory()
        raise failure
    return model, tokenizer


def check_supported(config: dict[str, Any], folder: Path) -> None:
    """Refuse by name the kinds of checkpoints that this version does not run.

    Raises:
        CheckpointUnsupported: With what to choose instead.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointDamaged(
            f"{folder / 'config.json'} names no model_type. Fetch this file again."
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointUnsupported(
            f"{folder} is quantised ({method or 'by an unknown method'}), which this version "
            "cannot run yet. Choose the unquantised checkpoint, or a .gguf file."
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointUnsupported(
            f"{folder} holds an adapter (adapter_config.json), which this version cannot apply. "
            "Merge it into its base model and name the merged folder."
        )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ImportError):
            raise
        raise CheckpointDamaged(
            f"The tokenizer in {folder} (tokenizer.json or qwen.tiktoken) cannot be read: "
            f"{_first_line(error)} Fetch these files again."
        ) from error


def _load_weights(folder: Path, device: str, dtype: WeightsDtype) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointUnsupported(
            f"{folder} is no language model that continues text (model_type "
            f"'{config.model_type}'). Choose a chat or base model."
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        device_map=None if device == "cpu" else {"": device},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointDamaged(
            f"The weights in {folder} are damaged: the tensor {missing[0]}{more} is not there. "
            "Fetch the safetensors files again."
        )
    runnable: Any = model
    runnable.eval()
    return model


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path
) -> None:
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointDamaged(
            f"The tokenizer in {folder} knows {len(tokenizer):,} tokens, but the model only "
            f"{rows:,}: they do not belong together. Fetch both from the same checkpoint."
        )


def _explained(error: Exception, folder: Path) -> QwenError:
    """Return an exception of torch, Transformers or safetensors as one of ours."""
    if isinstance(error, QwenError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            f"There is not enough memory to load {folder.name}. Close other programs, choose a "
            "smaller checkpoint, or a dtype of half the size (bfloat16)."
        )
    if isinstance(error, ImportError):
        return CheckpointUnsupported(
            f"{folder} needs a package that is not installed: {_first_line(error)}"
        )
    text = str(error)
    if "does not recognize this architecture" in text or "trust_remote_code" in text:
        return CheckpointUnsupported(
            f"{folder} is of a kind that this version does not know (model_type in its "
            "config.json), and a checkpoint's own code is never run. Choose another checkpoint."
        )
    return CheckpointDamaged(
        f"The checkpoint in {folder} cannot be read: {_first_line(error)} Fetch its files again."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") + "." if lines else f"{type(error).__name__}."


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

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

from qwen.adapters import check_dense, merge_adapter, tokenizer_folder
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
from qwen.placement import Placement, check_num_gpus, place_model, place_on, placement_notices

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
    num_gpus: int | None = None,
    offload_folder: Path | None = None,
    cache: Path | None = None,
    report: ReportProgress = ignore_progress,
) -> LoadedModel:
    """Load a checkpoint by its name.

    Args:
        checkpoint: See `qwen.checkpoint`.
        device: "auto" is a GPU if CUDA finds one, or several where one has too little room.
        dtype: "auto" is bfloat16 where the hardware computes in it, else float32.
        num_gpus: Spread the model over so many GPUs; None is as few as needed.
        offload_folder: Where weights may wait on disk that fit neither GPUs nor memory.
        cache: Where downloads and conversions are kept; None is the user's cache folder.
        report: Is told what is being done.

    Raises:
        CheckpointError: The checkpoint cannot be had, read or run.
        InvalidSetting: There are not so many GPUs.
        OutOfMemory: It does not fit; what had been loaded is freed.
    """
    parse_checkpoint(checkpoint)  # a misspelt name fails before seconds of imports
    report("Starting PyTorch")
    import torch

    use_cuda = runs_on_gpu(device)
    if num_gpus is not None:
        check_num_gpus(num_gpus, available=torch.cuda.device_count() if use_cuda else 0)
    memory = torch.cuda.get_device_properties(0).total_memory if use_cuda else None
    chosen = choose_dtype(
        dtype, has_cuda=use_cuda, cpu_has_bfloat16=not use_cuda and cpu_has_bfloat16()
    )
    resolved = resolve_checkpoint(
        checkpoint, gguf_dtype=chosen, cuda_memory=memory, cache=cache, report=report
    )
    placement = place_model(
        resolved.folder,
        dtype=chosen,
        use_cuda=use_cuda,
        num_gpus=num_gpus,
        offload_folder=offload_folder,
    )
    model, tokenizer = load_folder(
        resolved.folder,
        placement=placement,
        adapter=resolved.adapter,
        dtype=chosen,
        report=report,
    )
    from qwen.gptq_loading import quantization_notices

    notices = (*resolved.notices, *placement_notices(model), *quantization_notices(model))
    return LoadedModel(model, tokenizer, resolved.name, notices)


def load_model_on_gpus(
    checkpoint: str, num_gpus: int = 2, *, dtype: DtypeChoice = "auto"
) -> PreTrainedModel:
    """Load a model spread over several GPUs, layer by layer, ready to run.

    Args:
        checkpoint: See `qwen.checkpoint`.
        num_gpus: GPUs 0 to num_gpus - 1 are used.
        dtype: See `load_model`.

    Raises:
        InvalidSetting: There are not so many GPUs.
        CheckpointError: As `load_model`; likewise `OutOfMemory`.
    """
    return load_model(checkpoint, num_gpus=num_gpus, dtype=dtype).model


def runs_on_gpu(device: DeviceChoice) -> bool:
    """Tell whether a model would be loaded on a GPU."""
    import torch

    return device == "auto" and torch.cuda.is_available()


def choose_dtype(choice: DtypeChoice, *, has_cuda: bool, cpu_has_bfloat16: bool) -> WeightsDtype:
    """Choose the dtype of weights and computation.

    On a CPU with bf16 instructions bf16 decodes 1.6 times as fast as fp32; without them it is
    emulated and slower.
    """
    if choice != "auto":
        return choice
    return "bfloat16" if has_cuda or cpu_has_bfloat16 else "float32"


def cpu_has_bfloat16() -> bool:
    """Tell whether the CPU multiplies in bf16 (AVX-512 BF16 or AMX on x86, BF16 on ARM)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def load_folder(
    folder: Path,
    *,
    device: str = "cpu",
    placement: Placement | None = None,
    adapter: Path | None = None,
    dtype: WeightsDtype = "float32",
    report: ReportProgress = ignore_progress,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint in a folder.

    Args:
        folder: Configuration, tokenizer and safetensors.
        device: As torch spells it; where the whole model goes.
        placement: Where its parts go, instead of `device`.
        adapter: Folder of a LoRA adapter that is merged into the model; its tokenizer, if it has
            one, replaces the model's.
        dtype: Of weights and computation.
        report: Is told what is being done.

    Raises:
        CheckpointDamaged: A file is cut short or altered; the message names file or tensor.
        CheckpointUnsupported: The model's kind or its quantisation is not run by this version.
        OutOfMemory: It does not fit; what had been loaded is freed.
    """
    if adapter is not None:
        check_dense(folder, adapter)
    check_supported(load_json(folder / "config.json"), folder)
    check_weight_files(folder)
    if (folder / "generation_config.json").exists():
        load_json(folder / "generation_config.json")  # Transformers would go on without it
    failure: QwenError | None = None
    try:
        with quiet_transformers():
            register_qwen()
            report("Loading the tokenizer")
            tokenizer = _load_tokenizer(tokenizer_folder(folder, adapter))
            report("Loading the weights")
            model = _load_weights(folder, placement or place_on(device), dtype)
            if adapter is not None:
                report("Merging the adapter")
                model = merge_adapter(model, adapter)
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
        from qwen.gptq_format import parse_gptq_config

        parse_gptq_config(quantization, name=str(folder))
    if (folder / "adapter_config.json").exists():
        raise CheckpointUnsupported(
            f"{folder} holds an adapter (adapter_config.json) beside a whole model. Move the "
            "adapter's files to a folder of their own and name that, or remove adapter_config.json."
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


def _load_weights(folder: Path, placement: Placement, dtype: WeightsDtype) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen.gptq_loading import read_settings

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointUnsupported(
            f"{folder} is no language model that continues text (model_type "
            f"'{config.model_type}'). Choose a chat or base model."
        )
    if settings := read_settings(folder):
        config.quantization_config = settings
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **placement.options,
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
    if "offload_folder" in str(error):
        return OutOfMemory(
            f"The memory has no room for all of {folder.name}. Choose a smaller checkpoint, or "
            "name a folder to keep the rest on disk (--offload-folder), which is very slow."
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

"""How a checkpoint is quantised: the options, what they write into config.json, what they refuse.

Knows no weights and no solver. Source of the fields: AutoGPTQ, as published with
Qwen-7B-Chat-Int4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qwen.errors import InvalidSetting

#: Counts up when the same options give other weights, so that no run goes on from older work.
QUANTIZER_VERSION = 3
GROUP_SIZES = (128, 64, 32)

DenseDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a checkpoint is quantised; see `python -m qwen.quantize --help`.

    Attributes:
        group_size: Inputs that share a scale: 128, 64 or 32.
        rtn: Round to nearest, without calibration.
        calibration: A UTF-8 text; None is the default text.
        samples: Rows of calibration text.
        sequence_length: Tokens of a row; at most the model's context.
        dtype: Of what stays dense.
        damp_percent: See `SolverOptions`.
        rounds: Likewise.
        max_loss: Nats a token that what has 4 bits may cost, by an estimate for rounded weights;
            the layers that cost most get 8 bits until it is met. With the default, perplexity rose
            by 1 to 3 % where it was measured (docs/quantisation.md). None leaves 4 bits everywhere,
            which every reader of GPTQ takes; so does rounding without calibration.
        tune_tokens: Tokens that the whole model is tuned on after its layers; 0 is none, None the
            device's default.
        tune_codes: Tune the codes too.
    """

    group_size: int = 128
    rtn: bool = False
    calibration: Path | None = None
    samples: int = 24
    sequence_length: int = 512
    dtype: DenseDtype = "float16"
    damp_percent: float = 0.3
    rounds: int = 1
    max_loss: float | None = 0.015
    tune_tokens: int | None = None
    tune_codes: bool = False


def check_options(options: QuantizeOptions) -> None:
    """Refuse options outside their ranges.

    Raises:
        InvalidSetting: With what to choose.
    """
    if options.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InvalidSetting(f"The group size {options.group_size} is not one of {sizes}.")
    if options.rtn and options.calibration is not None:
        raise InvalidSetting(
            "Rounding to nearest looks at no text. Leave out either --rtn or --calibration."
        )
    if not 0 < options.damp_percent <= 1:
        raise InvalidSetting("The damping must be more than 0 and at most 1.")
    if options.rounds < 0:
        raise InvalidSetting("The number of rounds must be 0 or more.")
    if options.max_loss is not None and not options.max_loss >= 0:
        raise InvalidSetting("The loss that 4 bits may cost must be 0 or more.")
    if options.tune_tokens is not None and options.tune_tokens < 0:
        raise InvalidSetting("The number of tokens to tune on must be 0 or more.")


def build_recipe(options: QuantizeOptions, *, calibration: str | None) -> dict[str, Any]:
    """Return all that decides the layers; of the text a sum, which tells nothing about it."""
    recipe = asdict(options) | {"calibration": calibration, "version": QUANTIZER_VERSION}
    # Layers that are done are good for any tuning.
    return {key: value for key, value in recipe.items() if not key.startswith("tune_")}


def build_papers(
    raw_config: Mapping[str, Any], options: QuantizeOptions, *, rules: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Build the configurations; the fields are those of the published Int4 checkpoints.

    Args:
        raw_config: Of the source.
        options: How it was quantised.
        rules: GPTQModel's `dynamic`: layers that have other bits.
    """
    settings: dict[str, Any] = {
        "bits": 4,
        "group_size": options.group_size,
        "damp_percent": options.damp_percent,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    if rules:
        settings["dynamic"] = dict(rules)
    config = {key: value for key, value in raw_config.items() if key != "dtype"}
    config |= {"torch_dtype": options.dtype}
    if config.get("model_type") == "qwen":  # switches that overrule the dtype while loading
        config |= {"bf16": options.dtype == "bfloat16", "fp16": options.dtype == "float16"}
        config |= {"fp32": False}
    config["quantization_config"] = settings | {"quant_method": "gptq"}
    return {"config.json": config, "quantize_config.json": settings}

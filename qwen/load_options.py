"""How a model is to be loaded and run: one frozen value, and the command-line flags that say it.

Shared by every program that loads a backend. Knows no torch: a wrong flag fails at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen.serving_limits import DEFAULT_LIMITS, ServingLimits

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_CACHES = ("auto", "int8")
NTK_POLICIES = ("published", "grow")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a checkpoint and run it.

    Attributes:
        device: "auto" takes a GPU where there is one.
        dtype: Precision of the weights; "auto" leaves the choice to the device.
        num_gpus: GPUs to spread the model over; None is as few as needed.
        offload_folder: Where weights may wait on disk that fit neither GPUs nor memory.
        max_input_tokens: Budget for the prompt; None is the model's whole context.
        kv_cache: How keys and values of a conversation are kept; "auto" is as the model computes.
        ntk_policy: What a Qwen v1 model does when a reply outgrows its rotary base.
        skip_preflight: Load a model even if it does not seem to fit into memory.
        limits: How much is served at once.
        strict_reproducible: Give the same reply alone or beside others on any device; slower.
    """

    device: Literal["auto", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    num_gpus: int | None = None
    offload_folder: Path | None = None
    max_input_tokens: int | None = None
    kv_cache: Literal["auto", "int8"] = "auto"
    ntk_policy: Literal["published", "grow"] = "published"
    skip_preflight: bool = False
    limits: ServingLimits = DEFAULT_LIMITS
    strict_reproducible: bool = False


DEFAULT_OPTIONS = LoadOptions()

#: Flags, as argparse stores them, that mean nothing where the model runs on another server.
_OF_A_MODEL_HERE = (
    "cpu_only",
    "dtype",
    "num_gpus",
    "offload_folder",
    "kv_cache",
    "ntk_policy",
    "skip_preflight",
    "max_running",
    "max_waiting",
    "cache_mb",
    "strict_reproducible",
)


def add_load_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that `read_checkpoint` and `read_load_options` read; returns their group."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help="checkpoint to load, see below (default: auto)",
    )
    model.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    model.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision of the weights (default: auto)"
    )
    model.add_argument(
        "--num-gpus",
        type=positive_int,
        metavar="N",
        help="spread the model over the first N GPUs (default: one if it fits, else all)",
    )
    model.add_argument(
        "--offload-folder",
        type=_folder,
        metavar="DIR",
        help="a model may be larger than the memory: the rest is kept on disk, which is very "
        "slow (default: refuse it)",
    )
    model.add_argument(
        "--max-input-tokens",
        type=positive_int,
        metavar="N",
        help="longest prompt in tokens; older turns beyond it are dropped (default: the whole "
        "context of the model)",
    )
    model.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default="auto",
        help="how keys and values of a conversation are kept: int8 takes half the memory of "
        "bfloat16 (default: auto, as the model computes)",
    )
    model.add_argument(
        "--ntk-policy",
        choices=NTK_POLICIES,
        default="published",
        help="when a reply outgrows its rotary base (Qwen v1, dynamic NTK): published keeps the "
        "prompt's base, grow reads the sequence again with a wider one (default: published)",
    )
    model.add_argument(
        "--skip-preflight",
        action="store_true",
        help="load the model even if it does not seem to fit into memory, with its whole context",
    )
    _add_serving_arguments(parser)
    return model


def _add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("many users")
    serving.add_argument(
        "--max-running",
        type=positive_int,
        metavar="N",
        help="replies that are written at the same time (default: 8 on a CPU, 32 on a GPU)",
    )
    serving.add_argument(
        "--max-waiting",
        type=positive_int,
        metavar="N",
        default=DEFAULT_LIMITS.max_waiting,
        help="requests that may wait behind them; more are refused (default: %(default)s)",
    )
    serving.add_argument(
        "--cache-mb",
        type=positive_int,
        metavar="MB",
        help="memory for keys and values of all conversations together (default: enough for one "
        "whole context and 512 MB more; on a GPU at least half of what is free)",
    )
    serving.add_argument(
        "--strict-reproducible",
        action="store_true",
        help="same seed, same reply, alone or beside others, also where that is slower: on a GPU "
        "and with dense weights",
    )


def read_checkpoint(given: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """Return the checkpoint that was asked for: flag, QWEN_CHECKPOINT, "auto"."""
    return given.checkpoint_path or environ.get("QWEN_CHECKPOINT") or "auto"


def read_load_options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> LoadOptions:
    """Return what the flags of `add_load_arguments` say.

    Raises:
        SystemExit: With code 2 and a message, on flags that contradict each other.
    """
    if given.cpu_only and given.num_gpus:
        parser.error("--cpu-only and --num-gpus contradict each other; leave one out")
    return LoadOptions(
        device="cpu" if given.cpu_only else "auto",
        dtype=given.dtype,
        num_gpus=given.num_gpus,
        offload_folder=given.offload_folder,
        max_input_tokens=given.max_input_tokens,
        kv_cache=given.kv_cache,
        ntk_policy=given.ntk_policy,
        skip_preflight=given.skip_preflight,
        limits=ServingLimits(
            max_running=given.max_running,
            max_waiting=given.max_waiting,
            cache_bytes=None if given.cache_mb is None else given.cache_mb * 10**6,
        ),
        strict_reproducible=given.strict_reproducible,
    )


def given_for_a_model_here(
    parser: argparse.ArgumentParser, given: argparse.Namespace
) -> tuple[str, ...]:
    """Return those flags of `add_load_arguments` that a remote engine would not know of."""
    changed = (n for n in _OF_A_MODEL_HERE if getattr(given, n) != parser.get_default(n))
    return tuple("--" + name.replace("_", "-") for name in changed)


def positive_int(text: str) -> int:
    """Read a flag's value as a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path

"""What fits, before anything is fetched or loaded: `python -m qwen.preflight NAME`.

Joins a checkpoint's sizes, the machine's free memory and the decision. At a server's start it
refuses what cannot fit and shortens the context to what does; where it cannot know, it steps aside.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qwen.backend import MemoryUse, ReportProgress, ignore_progress
from qwen.checkpoint_shape import size_checkpoint
from qwen.errors import DoesNotFit, HubUnreachable, QwenError
from qwen.fast_decoder import can_pack, kernels_folder
from qwen.free_memory import FreeMemory, read_free_memory
from qwen.load_options import DTYPES, KV_CACHES, positive_int
from qwen.loading import choose_dtype, cpu_has_bfloat16, runs_on_gpu
from qwen.memory_model import MemoryItem
from qwen.placement import check_num_gpus
from qwen.preflight_decision import Plan, Preflight, decide
from qwen.preflight_text import advise, context_notice, refusal, render_table, summarize
from qwen.sequence import PREFILL_CHUNK

logger = logging.getLogger(__name__)

#: Tokens without which a chat is none: a system prompt, a question and a reply.
LEAST_CONTEXT = 1024

FITS, DOES_NOT_FIT, BAD_ARGUMENTS, NOT_CHECKED = 0, 1, 2, 3

_EPILOG = """\
exit codes: 0 it fits, 1 it does not, 2 bad arguments or no such checkpoint, 3 it could not be
checked (no hub answered)"""


@dataclass(frozen=True, slots=True)
class Wish:
    """How a user wants to run a checkpoint; the words are those of `LoadOptions`.

    Attributes:
        packs: Whether weights are packed into 6 bits, as on a CPU where no dtype is asked for.
    """

    device: Literal["auto", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kv_cache: Literal["auto", "int8"] = "auto"
    num_gpus: int | None = None
    can_offload: bool = False
    packs: bool = False


@dataclass(frozen=True, slots=True)
class StartCheck:
    """What the check at a start found.

    Attributes:
        context_limit: Tokens of prompt and reply to be offered at most; None is no limit.
        memory: What to tell about memory; None if it could not be checked.
        notices: Sentences that a user should know.
    """

    context_limit: int | None = None
    memory: MemoryUse | None = None
    notices: tuple[str, ...] = ()


def check_memory(
    checkpoint: str,
    wish: Wish,
    *,
    context: int | None = None,
    free: FreeMemory | None = None,
    further: tuple[MemoryItem, ...] = (),
) -> Preflight:
    """Compare what a checkpoint needs with what is free.

    Args:
        checkpoint: See `qwen.checkpoint`.
        wish: How it is to be run.
        context: Tokens of prompt and reply; None is the model's whole context.
        free: What is free; None looks at this machine.
        further: Rows for whatever else is kept.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged or not run here.
        HubUnreachable: It is on no disk here, and no hub answered.
        InvalidSetting: There are not so many GPUs.
    """
    import torch

    on_gpu = wish.device == "auto" and (
        bool(free.gpus) if free is not None else torch.cuda.is_available()
    )
    if wish.num_gpus is not None and free is None:
        available = torch.cuda.device_count() if on_gpu else 0
        check_num_gpus(wish.num_gpus, available=available)
    dtype = choose_dtype(
        wish.dtype, has_cuda=on_gpu, cpu_has_bfloat16=not on_gpu and cpu_has_bfloat16()
    )
    plan = Plan(
        dtype=dtype,
        chunk=PREFILL_CHUNK,
        kv_cache=wish.kv_cache,
        packs=wish.packs and not on_gpu,
        on_gpu=on_gpu,
        num_gpus=wish.num_gpus,
        can_offload=wish.can_offload,
    )
    cuda_memory = None
    if on_gpu:
        cuda_memory = free.gpus[0] if free else torch.cuda.get_device_properties(0).total_memory
    sized = size_checkpoint(checkpoint, dtype=dtype, cuda_memory=cuda_memory)
    further += sized.unpacking

    def judge(free: FreeMemory) -> Preflight:
        return decide(
            sized.name, sized.shape, plan=plan, free=free, context=context, further=further
        )

    if free is not None:
        return judge(free)
    result = judge(read_free_memory(gpus=int(on_gpu)))
    if on_gpu and (wish.num_gpus or result.verdict not in ("fits", "tight")):
        return judge(read_free_memory(gpus=wish.num_gpus))  # the other GPUs, now that it matters
    return result


def check_start(
    checkpoint: str,
    wish: Wish,
    *,
    enforce: bool = True,
    free: FreeMemory | None = None,
    report: ReportProgress = ignore_progress,
) -> StartCheck:
    """Check before a server loads a model; what cannot be known stops nobody.

    Args:
        checkpoint: See `qwen.checkpoint`.
        wish: How it is to be run.
        enforce: False tells, but neither refuses nor shortens.
        free: What is free; None looks at this machine.
        report: Is told the result in one line.

    Raises:
        DoesNotFit: Not even `LEAST_CONTEXT` tokens fit; the message has the figures.
    """
    try:
        result = check_memory(checkpoint, wish, free=free)
    except Exception as error:
        reason = str(error) if isinstance(error, QwenError) else type(error).__name__
        logger.info("Whether %s fits could not be checked: %s", checkpoint, reason)
        return StartCheck()
    whole = result.shape.context_length
    if result.fits or not enforce:
        limit = None
    elif result.largest_context < min(LEAST_CONTEXT, whole):
        raise DoesNotFit(refusal(result))
    else:
        limit = result.largest_context
    notices = (context_notice(result),) if limit else ()
    if limit:
        result = decide(
            result.name,
            result.shape,
            plan=result.plan,
            free=result.free,
            context=limit,
            further=result.further,
        )
    logger.info("%s", summarize(result))
    report(summarize(result))
    return StartCheck(context_limit=limit, memory=memory_use(result), notices=notices)


def memory_use(result: Preflight) -> MemoryUse:
    """Return a preflight's sums for the page."""
    estimate = result.estimate
    return MemoryUse(
        weights=estimate.of_kind("weights"),
        cache=estimate.of_kind("cache"),
        activations=estimate.of_kind("activations"),
        program=estimate.of_kind("program"),
        context=result.context,
        free=result.room,
    )


def to_json(result: Preflight) -> dict[str, Any]:
    """Return a preflight as plain values; sizes are bytes, contexts are tokens."""
    return {
        "name": result.name,
        "verdict": result.verdict,
        "fits": result.fits,
        **asdict(result.plan),
        "context": result.context,
        "context_length": result.shape.context_length,
        "largest_context": result.largest_context,
        "parameters": result.shape.parameters,
        "needed": result.estimate.needed,
        "resident": result.estimate.resident,
        "free": result.room,
        "rows": [asdict(row) for row in result.estimate.rows],
        "advice": list(advise(result)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = _build_parser().parse_args(argv)
    wish = Wish(
        device="cpu" if given.cpu_only else "auto",
        dtype=given.dtype,
        kv_cache=given.kv_cache,
        num_gpus=given.num_gpus,
    )
    free = None if given.free is None else FreeMemory(given.free)
    if free is not None:  # a computer without GPUs, whatever this one has
        wish = replace(wish, device="cpu")
    if given.dtype == "auto" and not runs_on_gpu(wish.device) and can_pack(kernels_folder()):
        wish = replace(wish, dtype="bfloat16", packs=True)
    try:
        result = check_memory(given.name, wish, context=given.context, free=free)
    except HubUnreachable as error:
        print(f"Could not be checked: {error}", file=sys.stderr)
        return NOT_CHECKED
    except QwenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    print(json.dumps(to_json(result), indent=2) if given.json else render_table(result))
    return FITS if result.fits else DOES_NOT_FIT


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwen.preflight",
        description="Say whether a checkpoint fits into memory, before it is fetched or loaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="as -c of the web demo takes it")
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens of prompt and reply together (default: the model's whole context)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="auto")
    parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    parser.add_argument("--num-gpus", type=positive_int, metavar="N", help="spread over N GPUs")
    parser.add_argument(
        "--free",
        type=_gigabytes,
        metavar="GB",
        help="check for a computer without a GPU that has so much free (10^9 bytes), not this one",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _gigabytes(text: str) -> int:
    try:
        size = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return size


if __name__ == "__main__":
    sys.exit(main())

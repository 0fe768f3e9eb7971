"""`python -m qwen.evals.profile`: the speed and memory tables of Qwen's README, for any checkpoint.

Speed: tokens per second of 2,048 and 8,192 tokens generated behind one token of context, prompt
included, as the README counts. Memory: the peak while 2,048 tokens are read and one is generated,
and while 8,192 are generated. Greedy, through our engine; `--peer` adds Transformers' `generate`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen.errors import OutOfMemory, QwenError, is_out_of_memory
from qwen.evals.machine import describe_machine
from qwen.evals.random_models import SIZES
from qwen.evals.report import Samples

#: Generates so many tokens behind a prompt and returns when all are there.
Generate = Callable[[Sequence[int], int], None]

#: Generated before anything is measured: compilation, graphs, lazy set-up.
_WARM_UP_TOKENS = 16

_PUBLISHED_FIGURES = ("generate 2048", "generate 8192", "peak, encode 2048", "peak, generate 8192")

#: From Qwen's README of September 2023, on an A100-SXM4-80G: tok/s twice, then GB twice.
PUBLISHED = {
    ("7b", "dense"): (30.34, 29.32, 17.66, 22.58),
    ("7b", "int4"): (43.56, 33.92, 8.21, 13.62),
    ("14b", "dense"): (30.70, 21.73, 30.15, 38.94),
    ("14b", "int4"): (37.11, 26.11, 13.00, 21.79),
}


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the tables.

    Attributes:
        who: "ours" or "generate".
        what: Such as "generate 2048".
    """

    who: str
    what: str
    samples: Samples
    published: float | None = None

    def __str__(self) -> str:
        """Show the median, the spread and what the README had."""
        beside = "" if self.published is None else f" (README, A100: {self.published:g})"
        return f"{self.who:<10} {self.what:<28} {self.samples}{beside}"


def main() -> int:
    """Measure, print, write; returns the exit code."""
    given = _parser().parse_args()
    machine = describe_machine("torch", "transformers")
    try:
        model, name = _load(given)
        from qwen.devices import input_device

        device = input_device(model)
        if device.type == "cuda":
            import torch

            machine = f"{torch.cuda.get_device_name(device)} · {machine}"
        print(f"{machine}\n{name}, {given.rounds} rounds", flush=True)
        lines = []
        for who in ("generate", "ours") if given.peer else ("ours",):
            # Ours comes last: on a CPU it packs the model's weights in place.
            build = _our_engine if who == "ours" else _transformers_generate
            generate = build(model, max(*given.generate, given.encode, _WARM_UP_TOKENS) + 2)
            for line in _tables(generate, who, given, device.type):
                lines.append(line)
                print(line, flush=True)
            del generate
    except QwenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if given.json:
        rows = [{**asdict(line), "median": line.samples.median} for line in lines]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "model": name, "rows": rows}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        _plot(given.plot, f"{name} · {machine}", lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen.evals.profile", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-c", "--checkpoint-path", default="auto", metavar="NAME")
    source.add_argument("--random", choices=list(SIZES), help="random weights of a size")
    parser.add_argument("--int4", action="store_true", help="with --random: layers in 4 bits")
    parser.add_argument("--cpu-only", action="store_true")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    parser.add_argument("--generate", type=int, nargs="+", default=[2048, 8192], metavar="N")
    parser.add_argument("--encode", type=int, default=2048, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also measure Transformers' generate")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser


def _load(given: argparse.Namespace) -> tuple[Any, str]:
    if given.random is None:
        from qwen.loading import load_model

        loaded = load_model(
            given.checkpoint_path, device="cpu" if given.cpu_only else "auto", dtype=given.dtype
        )
        return loaded.model, f"{loaded.name}, {loaded.model.dtype}"
    import torch

    from qwen.evals.random_models import build_random_model
    from qwen.loading import choose_dtype, cpu_has_bfloat16

    on_gpu = torch.cuda.is_available() and not given.cpu_only
    dtype = choose_dtype(given.dtype, has_cuda=on_gpu, cpu_has_bfloat16=cpu_has_bfloat16())
    weights = "int4" if given.int4 else "dense"
    model = build_random_model(
        given.random,
        device="cuda" if on_gpu else "cpu",
        dtype=getattr(torch, dtype),
        weights=weights,  # type: ignore[arg-type]
    )
    return model, f"random {given.random}, {weights}, {dtype}"


def _our_engine(model: Any, context_length: int) -> Generate:
    from qwen.engine import Engine
    from qwen.fast_decoder import build_decoder, kernels_folder
    from qwen.messages import SamplingParams

    decoder = build_decoder(model, kernels_folder=kernels_folder())
    engine = Engine(model, eos_token_ids=(), context_length=context_length, decoder=decoder)

    def generate(ids: Sequence[int], new_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        steps = list(engine.submit(ids, params, cancel=threading.Event()))
        assert len(steps) == new_tokens + 1, steps[-1]

    return generate


def _transformers_generate(model: Any, context_length: int) -> Generate:
    import torch

    from qwen.devices import input_device

    def generate(ids: Sequence[int], new_tokens: int) -> None:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([list(ids)], device=input_device(model)),
                attention_mask=torch.ones(1, len(ids), device=input_device(model)),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
        assert output.shape[1] == len(ids) + new_tokens

    return generate


def _tables(generate: Generate, who: str, given: argparse.Namespace, device: str) -> list[Line]:
    """Measure both tables of one contestant."""
    generate([5], _WARM_UP_TOKENS)
    figures: dict[str, Samples] = {}
    for new_tokens in given.generate:
        work = partial(generate, [5], new_tokens)
        speed, peak = _repeated(work, new_tokens + 1, given, device)
        figures[f"generate {new_tokens}"] = speed
        if new_tokens == max(given.generate):
            figures[f"peak, generate {new_tokens}"] = peak
    prompt = [5 + place % 1000 for place in range(given.encode)]
    speed, peak = _repeated(partial(generate, prompt, 1), given.encode, given, device)
    figures[f"encode {given.encode}"] = speed
    figures[f"peak, encode {given.encode}"] = peak
    key = (given.random, "int4" if given.int4 else "dense")
    published = dict(zip(_PUBLISHED_FIGURES, PUBLISHED.get(key, ()), strict=False))
    return [Line(who, what, samples, published.get(what)) for what, samples in figures.items()]


def _repeated(
    work: Callable[[], None], tokens: int, given: argparse.Namespace, device: str
) -> tuple[Samples, Samples]:
    """Return the speeds in tok/s and the peaks in GB of some rounds."""
    runs = [_measured(work, device) for _ in range(given.rounds)]
    speeds = tuple(tokens / seconds for seconds, _ in runs)
    return Samples(speeds, "tok/s"), Samples(tuple(peak / 1e9 for _, peak in runs), "GB")


def _measured(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Return seconds, and the peak of memory in bytes: of the GPU, else of the process so far."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    try:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, QwenError):
            raise OutOfMemory("The measurement does not fit. Choose fewer tokens.") from None
        raise
    seconds = time.perf_counter() - started
    if device == "cuda":
        return seconds, float(torch.cuda.max_memory_reserved())
    from qwen.evals.contestants import peak_memory

    return seconds, peak_memory()


def _plot(path: Path, title: str, lines: Sequence[Line]) -> None:
    from qwen.evals.report import draw_bars

    speeds = [line for line in lines if line.samples.unit == "tok/s"]
    draw_bars(
        path,
        title=title,
        names=[f"{line.who}, {line.what}" for line in speeds],
        values=[line.samples.median for line in speeds],
        marks=[line.published for line in speeds],
        label="tok/s; black: Qwen's README on an A100",
    )


if __name__ == "__main__":
    sys.exit(main())

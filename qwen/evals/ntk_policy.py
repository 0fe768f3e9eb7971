"""What `ntk_policy="grow"` is worth where a reply outgrows its rotary base, against "published".

`python -m qwen.evals.ntk_policy -c ./qwen-7b`: a prompt a little shorter than the trained length,
then text appended as if generated; perplexity in steps of the reply under both policies. See
docs/long_context.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen.errors import InvalidRequest
from qwen.evals.arguments import (
    INTERRUPTED,
    add_common_arguments,
    load_measured,
    parse_count,
    parse_length,
    run_named,
)
from qwen.evals.machine import describe_machine
from qwen.evals.perplexity_report import check_output, check_plotting, write_json

POLICIES = ("published", "grow")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen.evals.ntk_policy",
        description="Measure perplexity in a reply that outgrows its rotary base (Qwen v1).",
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--prompt",
        type=parse_length,
        metavar="N",
        help="tokens of the prompt (default: 15/16 of the trained length)",
    )
    parser.add_argument(
        "--reply", type=parse_length, default=2048, metavar="N", help="(default: 2048)"
    )
    parser.add_argument(
        "--step", type=parse_count, default=256, metavar="N", help="tokens of a figure (256)"
    )
    return run_named(_run, parser.parse_args(argv))


def _run(given: argparse.Namespace) -> int:
    for path in (given.json, given.plot):
        check_output(path)
    check_plotting(given.plot)
    model, corpus, name = load_measured(given)
    config = model.config
    if not getattr(config, "use_dynamic_ntk", False):
        raise InvalidRequest(
            f"{name} has no dynamic NTK (use_dynamic_ntk), so both policies are one. Choose a "
            "Qwen v1 checkpoint that has it."
        )
    prompt = given.prompt or config.seq_length * 15 // 16
    results: dict[str, Any] = {
        "checkpoint": name,
        "corpus": corpus.name,
        "corpus_ids": corpus.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "trained_length": config.seq_length,
        "prompt": prompt,
        "reply": given.reply,
        "step": given.step,
        "machine": describe_machine("torch", "transformers"),
    }
    print(f"{name} on {corpus.name}, {results['dtype']}\n{results['machine']}", flush=True)
    try:
        _measure(given, model, corpus.ids, prompt, results)
    except KeyboardInterrupt:
        print("Stopped; what was measured is kept where --json is given.")
        return INTERRUPTED
    if given.plot is not None:
        plot_steps(results, given.plot)
    return 0


def _measure(
    given: argparse.Namespace, model: Any, ids: Sequence[int], prompt: int, results: dict[str, Any]
) -> None:
    """Score window after window; after each one the averages so far are printed and kept."""
    import torch

    from qwen.evals.long_context import policy_losses, window_starts

    length = prompt + given.reply
    scored = []
    for start in window_starts(len(ids), length, given.windows):
        began = time.monotonic()
        window = ids[start : start + length]
        losses = policy_losses(model, window, prompt_length=prompt, chunk=given.chunk)
        scored.append(torch.stack(losses).double())
        means = torch.stack(scored)  # (windows, policies, reply)
        results |= {
            "windows": len(scored),
            "perplexity": {
                policy: [
                    float(part.mean().exp())
                    for part in torch.split(means[:, index], given.step, dim=1)
                ]
                for index, policy in enumerate(POLICIES)
            },
        }
        if given.json is not None:
            write_json(given.json, results)
        print(f"\nwindows: {len(scored)} ({time.monotonic() - began:.0f} s)\n")
        print(render_steps(results), flush=True)


def render_steps(results: dict[str, Any]) -> str:
    """Render perplexity in each step of the reply as a Markdown table."""
    lines = ["| tokens of the sequence | " + " | ".join(POLICIES) + " |", "|---|---:|---:|"]
    last = results["prompt"] + results["reply"]
    for index, pair in enumerate(zip(*results["perplexity"].values(), strict=True)):
        start = results["prompt"] + index * results["step"]
        figures = " | ".join(f"{figure:,.2f}" for figure in pair)
        lines.append(f"| {start + 1:,} – {min(start + results['step'], last):,} | {figures} |")
    return "\n".join(lines)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """Draw perplexity over the length of the sequence, one line for each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw_steps(figure.subplots(), results)
    figure.savefig(path, dpi=150)


def draw_steps(axes: Any, results: dict[str, Any]) -> None:
    """Draw what `plot_steps` does on axes of a figure."""
    for policy, figures in results["perplexity"].items():
        starts = [results["prompt"] + i * results["step"] for i in range(len(figures))]
        axes.plot(starts, figures, marker="o", label=policy)
    axes.axvline(results["trained_length"], color="grey", linestyle=":", label="trained length")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the sequence")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel(f"perplexity of the next {results['step']:,} tokens")
    axes.set_title(f"{results['checkpoint']}: a reply to {results['prompt']:,} tokens", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    sys.exit(main())

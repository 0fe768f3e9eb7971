"""What the fast path loses: its perplexity against float32 through Transformers' classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen.backend import ignore_progress
from qwen.decoder import Decoder
from qwen.errors import StartupError
from qwen.own_thread import run_on_own_thread

#: Tokens of each kind of text, and how many of them the decode form reads one by one.
_TOKENS, _ONE_BY_ONE = 1024, 384
_CHUNK = 256


def load_fast(checkpoint: str) -> tuple[Any, Decoder]:
    """Load a checkpoint as the web demo does on a CPU with `--dtype auto`.

    Raises:
        CheckpointError: It cannot be had, read or run.
        StartupError: There is no fast path for it here; the log says why.
    """
    return run_on_own_thread(partial(_load_fast, checkpoint))


def _load_fast(checkpoint: str) -> tuple[Any, Decoder]:
    from qwen.fast_decoder import build_decoder, can_pack, kernels_folder
    from qwen.loading import load_model

    folder = kernels_folder()
    dtype: Any = "bfloat16" if can_pack(folder) else "auto"
    model: Any = load_model(checkpoint, device="cpu", dtype=dtype, report=ignore_progress).model
    decoder = build_decoder(model, kernels_folder=folder)
    if decoder is None:
        raise StartupError(f"{checkpoint} has no fast path on this machine.")
    return model, decoder


def fast_path_perplexities(checkpoint: str) -> Iterator[tuple[str, float, float]]:
    """Yield the form's name, its perplexity and that of float32 on the same tokens."""
    from qwen.evals.mixed_text import mixed_texts
    from qwen.loading import load_model

    texts = [list(ids)[:_TOKENS] for ids in mixed_texts(checkpoint).values()]
    model: Any = load_model(checkpoint, device="cpu", dtype="float32", report=ignore_progress).model
    exact = [_losses(ids, partial(_read_whole, model)) for ids in texts]
    del model
    _, decoder = load_fast(checkpoint)
    prefill = [_losses(ids, partial(_read, decoder, chunk=_CHUNK)) for ids in texts]
    yield "prefill", _perplexity(prefill), _perplexity(exact)
    shorter = [ids[:_ONE_BY_ONE] for ids in texts]
    decode = [_losses(ids, partial(_read, decoder, chunk=1)) for ids in shorter]
    yield "decode", _perplexity(decode), _perplexity([loss[: _ONE_BY_ONE - 1] for loss in exact])


@torch.inference_mode()
def _losses(ids: Sequence[int], read: Callable[[Tensor], Tensor]) -> Tensor:
    """Return -log p of every token after the first, (len(ids) - 1,)."""
    tokens = torch.tensor(ids)
    return torch.nn.functional.cross_entropy(
        read(tokens[:-1]).float(), tokens[1:], reduction="none"
    )


def _read_whole(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def _read(decoder: Decoder, ids: Tensor, *, chunk: int) -> Tensor:
    sequence = decoder.start(len(ids))
    parts = torch.split(ids, chunk)
    return torch.cat([decoder.logits(decoder.advance(part, sequence)) for part in parts])


def _perplexity(losses: Sequence[Tensor]) -> float:
    return math.exp(torch.cat(list(losses)).mean())

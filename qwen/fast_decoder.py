"""Chooses the fastest decoder that runs a loaded model where it is, and says in the log which.

On a CPU our own kernels, on a GPU CUDA graphs; what neither can run keeps Transformers' own
forward.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qwen.cpu_kernels import KernelsUnavailable, load_kernels
from qwen.decoder import Decoder
from qwen.decoder_weights import DecoderUnsupported, check_model
from qwen.weights_cache import cache_folder

logger = logging.getLogger(__name__)


def kernels_folder() -> Path:
    """Return where compiled CPU kernels are kept."""
    return cache_folder() / "kernels"


def can_pack(folder: Path) -> bool:
    """Tell whether `build_decoder` can pack weights into 6 bits on this machine's CPU."""
    try:
        load_kernels(folder)
    except KernelsUnavailable:
        return False
    return True


def build_decoder(model: Any, *, kernels_folder: Path | None = None) -> Decoder | None:
    """Build the fastest decoder that runs a model here.

    Args:
        model: See `Decoder`; not changed if None is returned.
        kernels_folder: Where compiled CPU kernels are kept; None computes in the model's own dtype.

    Returns:
        None if the model needs Transformers' own forward.
    """
    try:
        check_model(model)
    except DecoderUnsupported as reason:
        logger.warning("Decoding with Transformers' forward, which is slower: %s.", reason)
        return None
    device = next(model.parameters()).device.type
    if device == "cuda":
        from qwen.cuda_graphs import GraphedDecoder, make_step_parts

        logger.info("Decoding with CUDA graphs")
        return GraphedDecoder(model, make_parts=make_step_parts)
    if device == "cpu" and kernels_folder is not None:
        try:
            kernels = load_kernels(kernels_folder)
        except KernelsUnavailable as reason:
            dtype = str(model.dtype).removeprefix("torch.")
            logger.warning(
                "Decoding with dense %s weights, which is slower than 6 bits: %s.", dtype, reason
            )
        else:
            logger.info("Decoding with 6-bit weights on the CPU")
            return Decoder(model, kernels=kernels)
    return Decoder(model)

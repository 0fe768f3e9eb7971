"""`attempt`: work of one reply among many, whose error is a value with a name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from qwen.errors import BackendFailed, OutOfMemory, QwenError, is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: All that oneDNN says when it gets no memory for its scratchpad (run under RLIMIT_AS). It says the
#: same of an operation that it does not know, but then the warm-up would have failed.
_ONEDNN_OUT_OF_MEMORY = "could not create a primitive"


def attempt(work: Callable[[], T]) -> tuple[T | None, QwenError | None]:
    """Do some work; return its result, or the error by its name."""
    try:
        return work(), None
    except QwenError as error:
        return None, error.with_traceback(None)
    except Exception as error:
        # A new error, that does not hold the tensors in the frames of the first one's traceback.
        return None, _named_error(error)


def _named_error(error: Exception) -> QwenError:
    if is_out_of_memory(error) or _ONEDNN_OUT_OF_MEMORY in str(error):
        logger.warning("Out of memory while generating (%s)", str(error))
        return OutOfMemory(
            "Memory ran out while generating. Shorten the conversation or start a new chat, "
            "lower max_new_tokens, or use a smaller model."
        )
    logger.error("Generating failed", exc_info=error)
    return BackendFailed(
        "Generating failed because of an unexpected fault. The server's log has the details; "
        "try again."
    )

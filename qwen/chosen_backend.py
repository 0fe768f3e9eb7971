"""The backend that the flags ask for: a model in this process, or a remote engine.

The one place where both are known; what loads either is imported when it is wanted.
"""

from __future__ import annotations

import gc

from qwen.backend import ChatBackend, ReportProgress, ignore_progress
from qwen.load_options import LoadOptions
from qwen.remote_options import RemoteOptions


def load_chosen_backend(
    checkpoint: str,
    options: LoadOptions,
    remote: RemoteOptions | None,
    *,
    report: ReportProgress = ignore_progress,
) -> ChatBackend:
    """Load a checkpoint, or reach the remote engine where one is given.

    Raises:
        QwenError: As `qwen.local.load_backend` or `qwen.remote.open_remote`.
    """
    if remote is not None:
        from qwen.remote import open_remote

        return open_remote(remote, max_input_tokens=options.max_input_tokens, report=report)
    from qwen.local import load_backend
    from qwen.mapped_memory import return_large_blocks

    return_large_blocks()
    backend = load_backend(checkpoint, options, report=report)
    # What is there now stays: else every full collection looks at all of it again, and all streams
    # pause for 0.16 s (run; 370,000 objects, most of them the libraries' own).
    gc.collect()
    gc.freeze()
    return backend

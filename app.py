"""The web demo: `python app.py`. Settings → backend → serve."""

import os
import sys

from qwen.backend import ChatBackend, DeferredBackend, ReportProgress
from webapp.activity import Activity
from webapp.server import TerminalProgress, end_process, serve
from webapp.settings import parse_settings


def main() -> int:
    """Run the server until it is told to stop; returns the exit code."""
    settings = parse_settings(sys.argv[1:], os.environ)
    activity = Activity()

    def load(report: ReportProgress) -> ChatBackend:
        from qwen.chosen_backend import load_chosen_backend

        checkpoint, options, remote = settings.checkpoint, settings.load, settings.remote
        backend = load_chosen_backend(checkpoint, options, remote, report=report)
        return activity.watch(backend)

    return serve(settings, DeferredBackend(load, on_status=TerminalProgress()), activity)


if __name__ == "__main__":
    end_process(main())

"""The one logging set-up of every process that cluster/ starts."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

_OURS = ("cluster", "router", "workers", "kernels")
_QUIET = ("ray", "httpx", "httpcore", "asyncio", "urllib3", "transformers")
LOGGERS = (*_OURS, *_QUIET)  # whose levels are set here


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment, so that a progress display may redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def set_up_logging(level: str, who: str = "") -> None:
    """Log to stderr: time, level, who (a worker id; empty in the command line) and text. Idempotent."""
    handler = _CurrentStderr()
    name = f" {who}" if who else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s{name} %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in _OURS:
        logging.getLogger(package).setLevel(level.upper())
    for package in _QUIET:
        logging.getLogger(package).setLevel(logging.WARNING)

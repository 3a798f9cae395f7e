"""The terminal of `headrace serve`: steps, logs and what Ray relays from its processes, without tearing each other up.

Everything goes through one rich console on stderr. Ray prints lines of our own processes to stderr under a prefix of
its own, and its remarks to stdout: the first are shown without the prefix, the second only when debugging.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

_RAY_PREFIX = re.compile(
    r"^(?:\x1b\[[\d;]*m)*\((?:WorkerActor|ServeReplica:\S+) pid=\d+(?:, ip=\S+)?\)(?:\x1b\[[\d;]*m)* ?"
)
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_LEVEL = re.compile(r"^\d\d:\d\d:\d\d (WARNING|ERROR|CRITICAL)\b")

chatter = logging.getLogger("cluster.chatter")


class _Lines(io.TextIOBase):
    """A text stream that hands on whole lines."""

    def __init__(self, original: object) -> None:
        self._rest = ""
        self._original = original

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._original.fileno()  # type: ignore[attr-defined, no-any-return]

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.take(line)
        return len(text)

    def take(self, line: str) -> None:
        raise NotImplementedError


class _Shown(_Lines):
    def __init__(self, console: Console, original: object) -> None:
        super().__init__(original)
        self._console = console

    def take(self, line: str) -> None:
        line = _RAY_PREFIX.sub("", line)
        level = _LEVEL.match(line)
        text = Text.from_ansi(line, style=_COLOURS[level[1]] if level else "")
        self._console.print(text, soft_wrap=True)


class _Chatter(_Lines):
    def take(self, line: str) -> None:
        if line.strip():
            chatter.debug("%s", Text.from_ansi(line).plain)


@contextmanager
def taken_over(console: Console) -> Iterator[None]:
    """Route sys.stderr through the console and sys.stdout to the debug log. `console` must hold the real stderr."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stderr = _Shown(console, stderr)
    sys.stdout = _Chatter(stdout)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr

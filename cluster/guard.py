"""Clears away after a cluster whose process was killed. A program of its own, with nothing but the standard library.

    python guard.py MARK DIRECTORY

It waits until its standard input ends, which happens when the process that started it is gone, however that came
about. Then it kills every process that carries MARK in its environment and removes DIRECTORY. Ray's agents, for
example, outlive a killed Ray by a minute or more.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "HEADRACE_SESSION"  # environment variable that every process of a session inherits
_KILL_S = 5.0


def marked_processes(mark: str) -> list[int]:
    """Processes of a session, this one left out. Empty where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended, or it is another user's
    return [pid for pid in found if pid != os.getpid()]


def kill_marked(mark: str, spare: int | None = None) -> int:
    """SIGKILL all of them, and what they start meanwhile. Answers how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_S
    while pids := [pid for pid in marked_processes(mark) if pid != spare]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return len(killed)


def main(mark: str, directory: str) -> None:
    sys.stdin.buffer.read()
    kill_marked(mark)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

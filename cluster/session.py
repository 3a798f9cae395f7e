"""One start of a cluster on this machine: its processes, known by a mark they inherit, and its temporary files."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

from cluster import guard

_GUARD_S = 10.0


class Session:
    """From before anything is started until everything has ended, and beyond it if this process is killed."""

    def __init__(self, directory: Path) -> None:
        """`directory` holds the session's files and is removed with it."""
        self._mark = secrets.token_hex(16)
        os.environ[guard.MARK] = self._mark
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self._mark, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )

    def kill_processes(self) -> int:
        """What is left of the session, at once and by force. Answers how many there were."""
        return guard.kill_marked(self._mark, spare=self._guard.pid)

    def close(self) -> None:
        """Let the guard remove the files and end. Idempotent."""
        stdin = self._guard.stdin
        if stdin is not None and not stdin.closed:
            stdin.close()
            try:
                self._guard.wait(_GUARD_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
        os.environ.pop(guard.MARK, None)

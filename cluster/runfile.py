"""The run file: how `headrace down` and `headrace status` find a running `headrace serve`.

One JSON file for each cluster name, locked by the process that serves. The lock goes with the process however it
ends, so a file without a lock is left over from a life that was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.models.cache import default_cache_dir

_LOCK_ATTEMPTS = 5


class AlreadyRunning(Exception):
    """Another `headrace serve` of this name is alive."""

    def __init__(self, run: Run) -> None:
        self.run = run
        super().__init__(
            f"a cluster named {run.cluster!r} is running already (pid {run.pid}, {run.url or 'starting'}); "
            f"stop it with `headrace down --cluster {run.cluster}`, or give this one another name with --cluster"
        )


class Run(BaseModel):
    """What a serving process tells of itself."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    cluster: str
    pid: int
    url: str = ""  # empty until it is ready
    grpc: str = ""
    model: str = ""
    temp_dirs: list[str] = []  # to be removed by whoever finds them without their owner


def run_dir() -> Path:
    return default_cache_dir() / "run"


class RunFile:
    """Held by a serving process from before it starts anything until everything has stopped."""

    def __init__(self, cluster: str) -> None:
        """Take the name. Raises AlreadyRunning, OSError. `left_over` is what a killed predecessor left behind."""
        directory = run_dir()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = directory / f"{cluster}.json"
        self.left_over: Run | None = None
        attempts = 0
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                attempts += 1
                if attempts < _LOCK_ATTEMPTS:  # it may only be somebody who looks whether we are alive
                    os.close(self._file)
                    time.sleep(0.02)
                    continue
                run = _parse(os.pread(self._file, 65536, 0)) or Run(cluster=cluster, pid=0)
                os.close(self._file)
                raise AlreadyRunning(run) from None
            if _same_file(self._file, self.path):
                break
            os.close(self._file)  # removed by its owner between our open and our lock
        self.left_over = _parse(os.pread(self._file, 65536, 0))
        self.write(Run(cluster=cluster, pid=os.getpid()))

    def write(self, run: Run) -> None:
        text = (json.dumps(run.model_dump(), indent=2) + "\n").encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def remove(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def read_run(cluster: str) -> tuple[Run, bool] | None:
    """What the run file of a name says, and whether its process is alive. None: no file."""
    path = run_dir() / f"{cluster}.json"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        run = _parse(os.pread(descriptor, 65536, 0))
        if run is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return run, True
        return run, False
    finally:
        os.close(descriptor)


def live_runs() -> Iterator[Run]:
    """Every cluster of this user that is alive on this machine."""
    for path in sorted(run_dir().glob("*.json")):
        found = read_run(path.stem)
        if found is not None and found[1]:
            yield found[0]


def _parse(text: bytes) -> Run | None:
    try:
        fields: Any = json.loads(text)
        return Run.model_validate(fields)
    except (ValueError, ValidationError):
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        ours, named = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)

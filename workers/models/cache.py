"""Directories made once and then only read. Neither a crash nor two starts at a time leave a half-made one."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.models.errors import ModelError

Say = Callable[[str], None]


def default_cache_dir() -> Path:
    """$HEADRACE_CACHE, else headrace in $XDG_CACHE_HOME, else ~/.cache/headrace."""
    if own := os.environ.get("HEADRACE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "headrace"


def made_once(target: Path, make: Callable[[Path], None], say: Say) -> Path:
    """`target`, filled by `make(empty directory)` unless it is there already.

    The directory is made under another name and renamed when whole. Raises ModelError when the cache cannot be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target, say):
            if target.is_dir():
                return target
            # We hold the lock, so a directory being made is a dead process's.
            for stale in target.parent.glob(f".{glob.escape(target.name)}.making-*"):
                shutil.rmtree(stale, ignore_errors=True)
            making = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
            try:
                making.chmod(0o755)  # mkdtemp makes it private; other users of a shared cache read it
                make(making)
                making.rename(target)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"the model cache {target.parent} cannot be written: {error}. Set HEADRACE_CACHE to a writable directory "
            "with room for the model"
        ) from error
    return target


@contextmanager
def _only_one(target: Path, say: Say) -> Iterator[None]:
    """Other processes wait here for the one that makes `target`. The lock dies with its process."""
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process to prepare {target.name} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""The guard: what a session leaves is cleared away, whether its process ends in order or is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import guard
from cluster.session import Session

ROOT = Path(__file__).resolve().parents[2]

OWNER = """
import subprocess, sys, time
from pathlib import Path
from cluster.session import Session
Session(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def soon(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_in_order(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    stranger = subprocess.Popen(["sleep", "60"])
    session = Session(directory)
    ours = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        # The mark is in place once the child has become `sleep`.
        assert soon(lambda: ours.pid in guard.marked_processes(os.environ[guard.MARK]))
        assert session.kill_processes() == 1
        assert ours.wait(30) == -9
        assert stranger.poll() is None
        assert session.kill_processes() == 0
        session.close()
        assert not directory.exists()
        session.close()  # again: nothing happens
        assert guard.MARK not in os.environ
    finally:
        session.close()
        for process in (stranger, ours):
            process.kill()
            process.wait()


def test_when_the_owner_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "log").write_text("x")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert running(child)
    finally:
        owner.kill()
        owner.wait()
    assert soon(lambda: not running(child))
    assert soon(lambda: not directory.exists())

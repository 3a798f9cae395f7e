"""The run file, and `headrace down`, which finds its cluster by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.foreground import remove_temp_dirs
from cluster.runfile import AlreadyRunning, Run, RunFile, live_runs, read_run
from cluster.shutdown import DownError, take_down

ROOT = Path(__file__).resolve().parents[2]

# A serving process in miniature; `stubborn` does not hear SIGTERM.
SERVER = """
import os, signal, sys, time
from cluster.runfile import Run, RunFile
stubborn, temp_dir = sys.argv[1] == "stubborn", sys.argv[2]
file = RunFile("mini")
file.write(Run(cluster="mini", pid=os.getpid(), url="http://127.0.0.1:1", temp_dirs=[temp_dir] if temp_dir else []))
def stop(*_):
    file.remove()
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else stop)
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    return tmp_path


@contextmanager
def serving(kind: str = "polite", temp_dir: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, kind, temp_dir], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_name_is_held_and_given_back(cache: Path) -> None:
    file = RunFile("x")
    try:
        assert read_run("x") == (Run(cluster="x", pid=os.getpid()), True)
        file.write(Run(cluster="x", pid=os.getpid(), url="http://h:1"))
        assert [run.url for run in live_runs()] == ["http://h:1"]
        assert file.path.stat().st_mode & 0o077 == 0
    finally:
        file.remove()
    assert read_run("x") is None
    assert list((cache / "run").iterdir()) == []
    file.remove()  # again: nothing happens


def test_a_shorter_text_replaces_a_longer_one() -> None:
    file = RunFile("x")
    try:
        file.write(Run(cluster="x", pid=1, url="http://a-rather-long-name.example:12345"))
        file.write(Run(cluster="x", pid=1))
        assert read_run("x") == (Run(cluster="x", pid=1), True)
    finally:
        file.remove()


def test_a_second_serve_of_the_same_name_is_told_who_runs() -> None:
    with serving() as process:
        with pytest.raises(AlreadyRunning) as caught:
            RunFile("mini")
        assert f"pid {process.pid}" in str(caught.value)
        assert "headrace down --cluster mini" in str(caught.value)
        other = RunFile("other")
        other.remove()


def test_what_a_killed_process_left_behind_is_found() -> None:
    with serving(temp_dir="/somewhere") as process:
        process.kill()
        process.wait()
        assert read_run("mini") == (
            Run(cluster="mini", pid=process.pid, url="http://127.0.0.1:1", temp_dirs=["/somewhere"]),
            False,
        )
        assert list(live_runs()) == []
        file = RunFile("mini")
        assert file.left_over is not None
        assert file.left_over.temp_dirs == ["/somewhere"]
        file.remove()


def test_a_broken_run_file_is_no_obstacle(cache: Path) -> None:
    (cache / "run").mkdir()
    (cache / "run" / "x.json").write_text("{")
    assert read_run("x") is None
    RunFile("x").remove()


def test_down_stops_and_says_so() -> None:
    with serving() as process:
        assert take_down(None, 10.0, False).startswith(f"stopped cluster 'mini' (pid {process.pid}) in ")
        assert process.wait(30) == 0
    assert take_down("mini", 1.0, False) == "no cluster named 'mini' is running here"
    assert take_down(None, 1.0, False) == "no cluster is running here"


def test_down_forces_only_when_told_to() -> None:
    with serving("stubborn") as process:
        with pytest.raises(DownError, match=r"has not ended within 0[.]2 s"):
            take_down("mini", 0.2, False)
        assert process.poll() is None
        assert take_down("mini", 0.2, True) == f"killed cluster 'mini' (pid {process.pid})"
        assert process.wait(30) == -signal.SIGKILL
    assert read_run("mini") is None


def test_down_tidies_up_after_a_killed_process() -> None:
    temp_dir = tempfile.mkdtemp(prefix="headrace-", dir="/tmp")
    with serving(temp_dir=temp_dir) as process:
        process.kill()
        process.wait()
    assert temp_dir in take_down("mini", 1.0, False)
    assert not Path(temp_dir).exists()


def test_down_never_signals_a_process_that_holds_no_lock(cache: Path) -> None:
    """The id in a file that was left over may belong to somebody else by now."""
    (cache / "run").mkdir()
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        (cache / "run" / "old.json").write_text(Run(cluster="old", pid=sleeper.pid).model_dump_json())
        assert "had ended without tidying up" in take_down("old", 1.0, True)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_down_wants_a_name_when_several_run() -> None:
    other = RunFile("other")
    try:
        with serving(), pytest.raises(DownError, match="mini, other"):
            take_down(None, 1.0, False)
    finally:
        other.remove()


def test_only_directories_of_our_own_making_are_removed(tmp_path: Path) -> None:
    precious = tmp_path / "headrace-precious"
    precious.mkdir()
    link = Path(tempfile.gettempdir()) / f"headrace-link-{os.getpid()}"
    link.symlink_to(precious)
    try:
        run = Run(
            cluster="x", pid=1, temp_dirs=[str(precious), "/tmp", "/", str(link), "/tmp/headrace-x/../.."]
        )
        assert remove_temp_dirs(run) == []
        assert precious.is_dir()
    finally:
        link.unlink()

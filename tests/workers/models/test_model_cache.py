from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.models.cache import default_cache_dir, made_once
from workers.models.errors import ModelError

said: list[str] = []


def fill(directory: Path) -> None:
    (directory / "file").write_text("whole")


def test_made_once(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    calls = []

    def make(directory: Path) -> None:
        calls.append(directory)
        assert not target.exists()
        fill(directory)

    assert made_once(target, make, said.append) == target
    assert made_once(target, make, said.append) == target
    assert len(calls) == 1
    assert (target / "file").read_text() == "whole"


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def make(directory: Path) -> None:
        fill(directory)
        raise ModelError("broken on the way")

    with pytest.raises(ModelError, match="broken on the way"):
        made_once(target, make, said.append)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]
    made_once(target, fill, said.append)


CHILD = """
import sys, time
from pathlib import Path
from workers.models.cache import made_once
def make(directory):
    (directory / "file").write_text("half")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (directory / "file").write_text("whole")
made_once(Path(sys.argv[1]), make, lambda message: print(message, flush=True))
print((Path(sys.argv[1]) / "file").read_text(), flush=True)
"""


def start(target: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_starts_at_a_time(tmp_path: Path) -> None:
    first = start(tmp_path / "model", 1.0)
    assert line_of(first) == "making"
    second = start(tmp_path / "model", 0.0)
    assert line_of(second).startswith("waiting for another process")
    assert line_of(second) == "whole"  # not made again
    assert line_of(first) == "whole"
    assert [first.wait(60), second.wait(60)] == [0, 0]


def test_a_killed_start_is_cleaned_up(tmp_path: Path) -> None:
    target = tmp_path / "model"
    process = start(target, 60)
    assert line_of(process) == "making"
    process.kill()
    process.wait()
    assert not target.exists()
    assert len(list(tmp_path.glob(".model.making-*"))) == 1
    made_once(target, fill, said.append)  # returns: the lock died with its process
    assert not list(tmp_path.glob(".model.making-*"))


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="HEADRACE_CACHE"):
        made_once(tmp_path / "file" / "model", fill, said.append)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/headrace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "headrace"
    monkeypatch.setenv("HEADRACE_CACHE", "~/own")
    assert default_cache_dir() == Path.home() / "own"

"""A whole cluster on a real Ray, with fakes inside its processes: start, death, hanging, stop, and nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.runfile import Run, read_run
from cluster.shutdown import take_down
from tests.cluster.fake_parts import NOTES
from tests.cluster.process_tree import descendants

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # far above what a busy machine takes
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 260,
}


class Serve:
    """`headrace serve` with fakes as a process of its own."""

    def __init__(self, directory: Path, *settings: str, under: tuple[str, ...] = ()) -> None:
        self.notes = directory / "notes"
        self.notes.mkdir()
        model = directory / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        self.log = directory / "log"
        self.temp = directory / "tmp"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-m", "tests.cluster.serve_fake", *settings],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {NOTES: str(self.notes)},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text()

    def run(self) -> Run | None:
        found = read_run("headrace")
        return found[0] if found else None

    def until(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until it held."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, self.text()
            time.sleep(0.02)
        return time.monotonic() - began

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.text()
        run = self.run()
        return run is not None and run.url != ""

    def life(self, worker_id: str) -> tuple[int, int]:
        """(epoch, process id) of the present life."""
        epoch, pid = (self.notes / worker_id).read_text().split()
        return int(epoch), int(pid)


@contextmanager
def serving(directory: Path, *settings: str, under: tuple[str, ...] = ()) -> Iterator[Serve]:
    directory.mkdir()
    serve = Serve(directory, *settings, under=under)
    try:
        yield serve
    finally:
        if serve.process.poll() is None:
            below = descendants(serve.process.pid)
            serve.process.kill()
            for pid in below:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        serve.process.wait()


def started_at(pid: int) -> str | None:
    """What tells a process from a later one with the same id; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def processes_of(serve: Serve) -> dict[int, str | None]:
    return {pid: started_at(pid) for pid in descendants(serve.process.pid)}


def program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def left(processes: dict[int, str | None]) -> list[int]:
    return [pid for pid, start in processes.items() if start is not None and started_at(pid) == start]


def listeners_of(pids: set[int]) -> set[str]:
    """Addresses that these processes listen on, as /proc/net/tcp* writes them (hex)."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if match := re.fullmatch(r"socket:\[(\d+)]", target):
                inodes.add(match[1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> Path:
    return cache


def test_a_cluster_lives_mends_itself_and_leaves_nothing(tmp_path: Path) -> None:
    settings = ("supervisor.hang_timeout_s=0.5", "worker.timeout_s=1.5", "pools.prefill.tensor_parallel=2")
    with serving(tmp_path / "a", *settings) as serve:
        serve.until(serve.is_ready, START_S)
        run = serve.run()
        assert run is not None
        assert run.pid == serve.process.pid
        with urllib.request.urlopen(f"{run.url}/cluster", timeout=5) as answer:
            assert json.load(answer)["model"]["name"] == "fake"
        assert "curl http://127.0.0.1:" in serve.text()

        # Nothing of it can be reached from another machine.
        loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
        assert listeners_of({*processes_of(serve), serve.process.pid}) <= loopback

        # A killed worker is back within seconds, as a new life.
        other = serve.life("prefill-0")
        epoch, pid = serve.life("decode-0")
        os.kill(pid, signal.SIGKILL)
        assert serve.until(lambda: serve.life("decode-0")[0] > epoch, 30) < 30
        assert started_at(serve.life("decode-0")[1]) is not None
        assert serve.life("prefill-0") == other
        assert f"decode-0 (epoch {epoch}) died after" in serve.text()

        # So is one that has lost a rank: all its ranks begin anew.
        first, (epoch, pid) = serve.life("prefill-0"), serve.life("prefill-0.1")
        assert first[0] == epoch
        os.kill(pid, signal.SIGKILL)
        serve.until(lambda: min(serve.life("prefill-0")[0], serve.life("prefill-0.1")[0]) > epoch, 30)
        serve.until(lambda: started_at(first[1]) is None, 10)
        assert re.search(
            rf"prefill-0 \(epoch {epoch}\) died after .*: rank 1: its process died", serve.text()
        )

        # A stopped one is noticed by its lease, and ended.
        epoch, pid = serve.life("decode-0")
        os.kill(pid, signal.SIGSTOP)
        serve.until(lambda: serve.life("decode-0")[0] > epoch, 30)
        serve.until(lambda: started_at(pid) is None, 10)
        assert "its lease in Redis ran out" in serve.text()

        # The embedded Valkey comes back too.
        valkey = next(
            pid for pid in processes_of(serve) if "valkey-server" in os.readlink(f"/proc/{pid}/exe")
        )
        os.kill(valkey, signal.SIGKILL)
        serve.until(lambda: "starting it again on the same port" in serve.text(), 20)
        serve.until(lambda: any("valkey-server" in program(pid) for pid in processes_of(serve)), 10)

        processes = processes_of(serve)
        assert len(processes) > 5
        assert "stopped cluster 'headrace'" in take_down(None, 30, False)
        assert serve.process.wait(30) == 0
        assert left(processes) == []
        assert all(not Path(name).exists() for name in run.temp_dirs)
        assert serve.run() is None
        assert "Traceback" not in serve.text()


def test_a_model_that_can_not_start_ends_it_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path / "b", "model.name=broken") as serve:
        processes: dict[int, str | None] = {}
        deadline = time.monotonic() + START_S
        while serve.process.poll() is None:
            processes |= processes_of(serve)
            assert time.monotonic() < deadline, serve.text()
            time.sleep(0.1)
        assert serve.process.returncode == 1
        assert re.search(
            r"error: (prefill|decode)-0 could not start: ValueError: this model is broken", serve.text()
        )
        assert "Traceback" not in serve.text()
        assert left(processes) == []
        assert serve.run() is None


def test_ranks_that_a_model_can_not_be_cut_for_are_refused_before_ray_starts(tmp_path: Path) -> None:
    with serving(tmp_path / "e", "pools.decode.tensor_parallel=8") as serve:
        assert serve.process.wait(START_S) == 1
        assert (
            "pools.decode.tensor_parallel is 8: llama with 4 query heads cannot be shared out" in serve.text()
        )
        assert "ray" not in serve.text().split("error:")[0]


def test_sigterm_while_ray_starts_ends_in_order(tmp_path: Path) -> None:
    """And under nohup, a terminal that goes away stops nothing."""
    with serving(tmp_path / "d", under=("nohup",)) as serve:
        serve.until(lambda: "model" in serve.text(), START_S)
        processes: dict[int, str | None] = {}

        def ray_has_begun() -> bool:
            processes.update(processes_of(serve))
            return len(processes) > 2  # the guard and the first of Ray's

        serve.until(ray_has_begun, START_S)
        serve.process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            serve.process.wait(0.3)
        assert "stopping" not in serve.text()
        processes |= processes_of(serve)
        serve.process.terminate()
        assert serve.process.wait(30) == 0
        assert left(processes) == []
        assert serve.text().endswith("stopped\n")
        assert serve.run() is None


def test_what_a_killed_cluster_leaves_is_cleared_away(tmp_path: Path) -> None:
    with serving(tmp_path / "c", "supervisor.spares=0") as serve:
        serve.until(serve.is_ready, START_S)
        run = serve.run()
        assert run is not None
        processes = processes_of(serve)
        serve.process.kill()
        serve.process.wait()
        serve.until(lambda: not left(processes), 20)
        serve.until(lambda: not any(Path(name).exists() for name in run.temp_dirs), 10)
        assert "had ended without tidying up" in take_down("headrace", 5, False)

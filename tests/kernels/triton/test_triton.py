"""Triton's kernels against their oracles: under its interpreter everywhere, compiled where there is a GPU.

The cases of each group are in X_cases.py; X_builds.py builds its kernels for GPUs that need not be there. The interpreter
is chosen by the environment before Triton is imported, and by nobody else in this process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
GROUPS = [path.name.removesuffix("_cases.py") for path in sorted(HERE.glob("*_cases.py"))]
_NO_TESTS = 5  # pytest's exit status when a group has none that are slow

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)
each_group = pytest.mark.parametrize("group", GROUPS)


def run_cases(cases: str, marked: str = "", **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, str(HERE / cases)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    fine = (0, _NO_TESTS) if marked == "slow" else (0,)
    assert done.returncode in fine, done.stdout[-6000:] + done.stderr[-2000:]


@each_group
def test_interpreted(group: str) -> None:
    run_cases(f"{group}_cases.py", "not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
@each_group
def test_more_interpreted(group: str) -> None:
    run_cases(f"{group}_cases.py", "slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@each_group
def test_builds_for_gpus(group: str, tmp_path: Path) -> None:
    run_cases(f"{group}_builds.py", "not slow", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@each_group
def test_more_builds_for_gpus(group: str, tmp_path: Path) -> None:
    run_cases(f"{group}_builds.py", "slow", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_group
def test_compiled(group: str) -> None:
    run_cases(f"{group}_cases.py", TRITON_INTERPRET="0")


def test_nothing_else_loads_triton() -> None:
    names = ", ".join(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "kernels").glob("*.py")) + sorted((ROOT / "kernels" / "cpu").glob("*.py"))
    )
    program = f"import sys, {names}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

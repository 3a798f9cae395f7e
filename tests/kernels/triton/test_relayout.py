"""Triton's relayout against the oracle: under its interpreter everywhere, compiled where there is a GPU.

The interpreter is chosen by the environment before Triton is imported, and by nobody else in this process.
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

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)


def run_cases(cases: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).with_name(cases))]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_interpreted() -> None:
    run_cases("relayout_cases.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_builds_for_gpus(tmp_path: Path) -> None:
    run_cases("relayout_builds.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled() -> None:
    run_cases("relayout_cases.py", TRITON_INTERPRET="0")


def test_nothing_else_loads_triton() -> None:
    names = ", ".join(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "kernels").glob("*.py")) + sorted((ROOT / "kernels" / "cpu").glob("*.py"))
    )
    program = f"import sys, {names}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

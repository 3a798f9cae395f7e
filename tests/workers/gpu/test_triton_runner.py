"""Runner and sampler over Triton's kernels, in a process of their own whose Triton interprets, or compiled on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)


def run_cases(**environment: str) -> None:
    cases = str(Path(__file__).with_name("triton_runner_cases.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cases]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted() -> None:
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled() -> None:
    run_cases(TRITON_INTERPRET="0")

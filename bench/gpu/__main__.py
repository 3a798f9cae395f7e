"""python -m bench.gpu: what the GPU kernels reach of what this GPU can do. Prints one JSON object.

Without a GPU it says so and measures nothing. With --rehearse every case runs once at tiny sizes, without times: under
TRITON_INTERPRET=1 that needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

GROUPS = ("attention", "layer", "sampling", "relayout")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="all of them unless named")
    parser.add_argument("--rehearse", action="store_true", help="once, tiny, without times")
    parser.add_argument("--runs", type=int, default=20, help="the median of how many (20)")
    parser.add_argument("--seconds", type=float, default=240.0, help="no case is begun after that (240)")
    options = parser.parse_args()
    found = run(options.groups or list(GROUPS), options.rehearse, options.runs, options.seconds)
    json.dump(found, sys.stdout, indent=1)
    print()


def run(groups: list[str], rehearse: bool, runs: int, seconds: float) -> dict[str, Any]:
    """{"gpu": ..., "ceilings": ..., "cases": [...]}, or {"skipped": why}."""
    if lack := _lack(rehearse):
        return {"skipped": lack}
    import torch

    from bench.gpu.timing import Timer, measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, runs)
    until = time.monotonic() + seconds
    ceilings = timer.ceilings()
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    for group in groups:
        for case in importlib.import_module(f"bench.gpu.{group}").cases(device, rehearse):
            if time.monotonic() > until:
                left_out.append(f"{group}: {case.name} and what follows")
                break
            cases.append({"group": group, **measure(case, timer, ceilings)})
    return {
        "gpu": describe(),
        "ceilings": {"copy_bytes_per_s": ceilings.copy, "matmul_flops_per_s": ceilings.matmul},
        "cases": cases,
        "left_out": left_out,
    }


def describe() -> dict[str, Any]:
    import torch
    import triton

    on_gpu = torch.cuda.is_available()
    return {
        "name": torch.cuda.get_device_name() if on_gpu else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _lack(rehearse: bool) -> str:
    """Why nothing can be measured; empty when it can."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    if torch.cuda.is_available():
        return ""
    if rehearse and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "torch sees no GPU"


if __name__ == "__main__":
    main()

"""python -m bench.gpu: what the GPU kernels reach of what this GPU can do. Prints one JSON object.

Without a GPU it says so and measures nothing. With --rehearse every case runs once at tiny sizes, without times: under
TRITON_INTERPRET=1 that needs no GPU. Other programs beside it measure the whole engine: bench.gpu.engine, .peers,
.disaggregation, .endurance; bench/gpu_check.sh runs them all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.rows import write_json

Save = Callable[[dict[str, Any]], object]

GROUPS = ("attention", "matmul", "layer", "experts", "sampling", "relayout")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="all of them unless named")
    parser.add_argument("--rehearse", action="store_true", help="once, tiny, without times")
    parser.add_argument("--runs", type=int, default=20, help="the median of how many (20)")
    parser.add_argument("--seconds", type=float, default=240.0, help="no case is begun after that (240)")
    parser.add_argument(
        "--json", type=Path, help="a file that is whole after each case; else printed at the end"
    )
    options = parser.parse_args()
    groups = options.groups or list(GROUPS)
    save: Save = (lambda found: None) if options.json is None else partial(write_json, options.json)
    found = run(groups, options.rehearse, options.runs, options.seconds, save)
    if options.json is None:
        print(json.dumps(found, indent=1))
    else:
        save(found)


def run(groups: list[str], rehearse: bool, runs: int, seconds: float, save: Save) -> dict[str, Any]:
    """{"gpu": ..., "ceilings": ..., "cases": [...]}, or {"skipped": why}; saved after each case, too."""
    if lack := _lack(rehearse):
        return {"skipped": lack}
    import torch

    from bench.gpu.timing import Timer, measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, runs, rehearse)
    until = time.monotonic() + seconds
    ceilings = timer.ceilings()
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    found = {
        "gpu": describe(),
        "ceilings": {"copy_bytes_per_s": ceilings.copy, "matmul_flops_per_s": ceilings.matmul},
        "cases": cases,
        "left_out": left_out,
    }
    for group in groups:
        for case in importlib.import_module(f"bench.gpu.{group}").cases(device, rehearse):
            if time.monotonic() > until:
                left_out.append(f"{group}: {case.name} and what follows")
                break
            cases.append({"group": group, **measure(case, timer, ceilings)})
            save(found)
    return found


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

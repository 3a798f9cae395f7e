"""Decode and prefill of the engine itself, in one process without HTTP, held against what the machine allows.

python -m bench.engine                                    every configuration, batch and context
python -m bench.engine --configs bf16,int8+kv8 --batches 1,16 --contexts 1024 --runs 3
python -m bench.engine --profile-host --configs int8      what a step costs outside the model
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from bench.configurations import ALL, CHANGES, FORMATS, NotSupported, overrides
from bench.engine.campaign import Campaign, document
from bench.engine.drive import cases
from bench.engine.report import markdown, plot
from bench.machine import describe
from bench.results import write_results
from workers.models.catalog import prepare_model


def _numbers(text: str) -> list[int]:
    return [int(part.replace("_", "")) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.engine"
    )
    parser.add_argument(
        "--configs",
        default=",".join(ALL),
        help=f"{', '.join(FORMATS)}, each with any of {', '.join('+' + c for c in CHANGES)}; default {','.join(ALL)}",
    )
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 64])
    parser.add_argument("--contexts", type=_numbers, default=[128, 1024, 4096])
    parser.add_argument("--kinds", default="prefill,decode")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of which a run takes the median")
    parser.add_argument("--chunk", type=int, default=512, help="engine.max_num_batched_tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--memory-gib", type=float, help="for KV blocks; default 60%% of what is available now"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--profile-host", action="store_true", help="also time what is not the model")
    parser.add_argument("--out", type=Path, default=Path("bench-out/engine"))
    given = parser.parse_args()
    names = tuple(given.configs.split(","))
    for name in names:
        try:
            overrides(name)
        except NotSupported:
            pass  # becomes a line of the report
        except ValueError as error:
            parser.error(str(error))
    memory = given.memory_gib * 2**30 if given.memory_gib else 0.6 * _available_bytes()
    machine = describe()
    campaign = Campaign(
        configurations=names,
        cases=tuple(c for c in cases(given.batches, given.contexts) if c.kind in given.kinds.split(",")),
        model=prepare_model(given.model, say=print),
        threads=given.threads,
        runs=given.runs,
        steps=given.steps,
        chunk=given.chunk,
        memory_bytes=memory,
        profile_host=given.profile_host,
    )
    found = document(campaign, *campaign.measure(), machine)
    write_results(given.out, "engine", found, markdown(found), plot)


def _available_bytes() -> float:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None, "/proc/meminfo has no MemAvailable"
    return int(found[1]) * 1024.0


if __name__ == "__main__":
    main()

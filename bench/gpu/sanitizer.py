"""The kernels under NVIDIA's compute-sanitizer, at tiny sizes: memory accessed wrongly, and races in shared memory.

python -m bench.gpu.sanitizer [--json FILE]
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bench.gpu.rows import Rows, parser

TOOLS = ("memcheck", "racecheck")
_USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def findings(output: str) -> int | None:
    """Errors or hazards; None where the tool said nothing of either."""
    found = [int(errors or hazards) for errors, hazards in _SUMMARY.findall(output)]
    return sum(found) if found else None


def main() -> None:
    given = parser("bench.gpu.sanitizer", __doc__)
    given.add_argument("--each", type=float, default=40.0, help="seconds of each tool at most (40)")
    options = given.parse_args()
    rows = Rows(options.json, options.seconds)
    program = shutil.which("compute-sanitizer") or (str(_USUAL) if _USUAL.exists() else None)
    if program is None:
        rows.note(skipped="compute-sanitizer is not installed")
        rows.end()
        return
    for tool in TOOLS:
        with rows.part(tool) as time_left:
            if time_left:
                _run(rows, program, tool, options.each)
    rows.end()


def _run(rows: Rows, program: str, tool: str, seconds: float) -> None:
    command = [program, "--tool", tool, sys.executable, "-m", "bench.gpu", "--rehearse"]
    # Without torch's own pool each tensor is an allocation, past whose end nothing may be read.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # the tool's and the program's, which outlives the tool when that alone is killed
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            rows.add(case=tool, note=f"not at its end after {seconds:.0f} s")
            return
    found = findings(said)
    if found is None:
        lines = said.strip().splitlines()
        rows.add(case=tool, note=f"ended with {process.returncode}: {lines[-1][:200] if lines else ''}")
    elif found:
        first = next((line for line in said.splitlines() if "Invalid" in line or "hazard" in line), "")
        rows.add(case=tool, findings=found, failed=first[:300])
    else:
        rows.add(case=tool, findings=0)


if __name__ == "__main__":
    main()

"""The figures of the README: `headrace serve` as a user starts it, measured from outside.

    python -m bench.main_job [--runs 3] [--json FILE] [-- extra arguments of `headrace serve`]

Start to first token, memory of each process, output tokens per second at concurrency 1 and 16; beside them, in the
same run, transformers' own `generate` on the same weights and what memory bandwidth would allow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from bench.load import Result, Shape, run
from cluster.valkey import free_port

ONE = Shape(requests=4, concurrency=1, shared_tokens=0, own_tokens=(128, 128), output_tokens=128)
SIXTEEN = Shape(requests=64, concurrency=16, shared_tokens=256, own_tokens=(128, 512), output_tokens=128)


class Served:
    """`headrace serve` on free ports, from its start to its end."""

    def __init__(self, extra: list[str]) -> None:
        port, grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "cluster.cli", "serve", "--cluster", f"bench-{port}"]
        command += ["--port", str(port), "--grpc-port", str(grpc_port), *extra]
        self.began = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def first_token(self) -> tuple[float, float]:
        """Seconds from the start until it is ready, and until the first token of a first chat."""
        while True:
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                raise RuntimeError(f"headrace serve ended: {self._process.stderr.read().decode()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.02)
        ready = time.perf_counter() - self.began
        model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    return ready, time.perf_counter() - self.began
        raise RuntimeError("no token came")

    def memory(self) -> dict[str, float]:
        """MiB of each kind of process, shared pages counted in parts (PSS)."""
        status = httpx.get(f"{self.url}/cluster", timeout=10).json()
        workers = {worker["pid"]: f"{worker['role']} worker" for worker in status["workers"]}
        sizes: dict[str, float] = {}
        for pid in _descendants(self._process.pid):
            kind = workers.get(pid) or _kind(pid, self._process.pid)
            sizes[kind] = sizes.get(kind, 0.0) + _pss_mib(pid)
        return dict(sorted(sizes.items()))

    def stop(self) -> float:
        """Seconds that a clean stop took."""
        began = time.perf_counter()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        return time.perf_counter() - began


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(stat.parent.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _kind(pid: int, root: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "gone"
    if pid == root:
        return "supervisor"
    for word, kind in (
        ("ServeReplica", "router"),
        ("valkey", "valkey"),
        ("WorkerActor", "spare worker process"),
    ):
        if word in command:
            return kind
    return "ray"


def _pss_mib(pid: int) -> float:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def measure(runs: int, extra: list[str]) -> dict[str, Any]:
    starts = []
    served: Served | None = None
    for _ in range(runs):
        if served is not None:
            served.stop()
        served = Served(extra)
        starts.append(served.first_token())
    assert served is not None
    results: dict[str, list[Result]] = {"concurrency 1": [], "concurrency 16": []}
    try:
        idle = served.memory()
        for seed in range(runs):
            for name, shape in (("concurrency 1", ONE), ("concurrency 16", SIXTEEN)):
                results[name].append(asyncio.run(run(served.url, Shape(**(asdict(shape) | {"seed": seed})))))
        loaded = served.memory()
    finally:
        stop_s = served.stop()
    return {
        "machine": f"{platform.processor() or platform.machine()}, {_cpu_model()}, Python {platform.python_version()}",
        "ready_s": statistics.median(ready for ready, _ in starts),
        "first_token_s": statistics.median(token for _, token in starts),
        "stop_s": stop_s,
        "memory_idle_mib": idle,
        "memory_after_load_mib": loaded,
        "load": {name: [asdict(r) for r in all_runs] for name, all_runs in results.items()},
    }


def _cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    count = len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return f"{count} x {found[1] if found else 'unknown'}"


def peers(weights: Path, runs: int) -> dict[str, Any]:
    """In processes of their own, after the cluster has stopped: nothing fights over the cores."""

    def once(*command: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=True
        ).stdout

    measured = [json.loads(once("bench.peer_transformers", str(weights))) for _ in range(runs)]
    return {
        "transformers": {key: statistics.median(m[key] for m in measured) for key in measured[0]},
        "memory_read": once("bench.memory_floor").strip().splitlines(),
        "weight_bytes": sum(f.stat().st_size for f in weights.glob("*.safetensors")),
    }


def report(figures: dict[str, Any]) -> str:
    lines = [
        f"Machine: {figures['machine']}",
        "",
        f"- ready {figures['ready_s']:.1f} s, first token {figures['first_token_s']:.1f} s after `headrace serve`; "
        f"stopped in {figures['stop_s']:.1f} s",
        "",
        "| process | MiB (PSS) idle | after the load |",
        "|---|---|---|",
    ]
    after = figures["memory_after_load_mib"]
    lines += [
        f"| {k} | {figures['memory_idle_mib'].get(k, 0):.0f} | {after.get(k, 0):.0f} |" for k in sorted(after)
    ]
    lines += [
        "",
        "| work | output tokens/s (range) | TTFT p50 | TPOT p50 | errors |",
        "|---|---|---|---|---|",
    ]
    medians = {}
    for name, all_runs in figures["load"].items():
        rates = sorted(r["output_tokens_per_s"] for r in all_runs)
        medians[name] = statistics.median(rates)
        ttft = statistics.median(r["ttft_p50_s"] for r in all_runs)
        tpot = statistics.median(r["tpot_p50_s"] for r in all_runs)
        errors = sum(r["errors"] for r in all_runs)
        lines.append(
            f"| {name} | {medians[name]:.0f} ({rates[0]:.0f}–{rates[-1]:.0f}) | {ttft * 1e3:.0f} ms | "
            f"{tpot * 1e3:.1f} ms | {errors} |"
        )
    if "transformers" in figures:
        for (name, rate), mine in zip(figures["transformers"].items(), medians.values(), strict=True):
            lines.append(
                f"| transformers generate, {name} | {rate:.0f} | | | Headrace is {mine / rate:.1f} times as fast |"
            )
        lines += [
            "",
            f"Memory read: {'; '.join(figures['memory_read'])}; weights {figures['weight_bytes'] / 1e6:.0f} MB",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-peers", action="store_true", help="only Headrace")
    parser.add_argument("extra", nargs="*", help="arguments of `headrace serve`")
    given = parser.parse_args()
    figures = measure(given.runs, given.extra)
    if not given.no_peers:
        from workers.models.catalog import prepare_model

        figures |= peers(prepare_model("smollm2-135m-instruct").path, given.runs)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(report(figures))


if __name__ == "__main__":
    main()

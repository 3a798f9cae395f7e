"""The router's own speed on one core: `headrace bench router`, or python -m bench.router.

The real router (HTTP, gRPC, dispatch, worker links, embedded Valkey) is pinned to core 0. Simulated workers, which speak
the real protocol and answer at once, and the load generator share core 1. A plain uvicorn app (uvloop, httptools) that
sends the same bytes, without making them, takes turns with it on core 0. CPU time is that of the process, not the wall's:
on a busy machine it is the figure to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.machine import describe, sentence
from bench.results import write_results
from bench.router.bed import Bed, Window
from bench.router.work import OUTPUT_TOKENS, PROMPT_TOKENS, STREAM_TOKENS, Scenario, Work
from bench.spread import Spread, interleaved, percentile
from workers.models.catalog import prepare_model

_WARM_S = 1.0
SCENARIOS = ("one", "ids", "text", "stream16k", "stream32k", "unpaced", "grpc")


@dataclass(frozen=True)
class Run:
    """One window, in the figures that are reported."""

    per_second: float  # answers, or tokens where they are streamed
    cpu_us: float  # of the server's process, each
    busy: float  # share of its core that the server used
    p50_ms: float  # of an answer that is not streamed; of a token, from its sender to the client
    p99_ms: float

    @classmethod
    def of(cls, window: Window, streams: bool) -> Run:
        number = window.events if streams else window.answers
        if not number:
            raise RuntimeError("nothing was answered: the machine is too busy to measure anything")
        times = window.ages_s if streams else window.latencies_s
        p50, p99 = (percentile(times, share) * 1e3 if times else 0.0 for share in (0.5, 0.99))
        return cls(number / window.seconds, window.server_cpu_s / number * 1e6, window.busy, p50, p99)


def scenario(name: str, work: Work) -> tuple[Scenario, Sequence[str]]:
    """And the servers that take turns in it."""
    both = ("router", "plain")
    return {
        "one": (work.whole("ids", 1), both),
        "ids": (work.whole("ids", 64), both),
        "text": (work.whole("text", 64), both),
        "stream16k": (work.stream("", 64, 0.004), both),
        "stream32k": (work.stream("", 64, 0.002), both),
        "unpaced": (work.stream("", 64, 0.0), both),
        "grpc": (work.stream("", 64, 0.016), ("grpc", "router")),
    }[name]


DESCRIPTIONS = {
    "one": f"answers of {OUTPUT_TOKENS} tokens to {PROMPT_TOKENS} token ids, one at a time",
    "ids": f"answers of {OUTPUT_TOKENS} tokens to {PROMPT_TOKENS} token ids, 64 at a time",
    "text": f"the same prompts as text ({PROMPT_TOKENS} tokens), 64 at a time",
    "stream16k": f"64 chats streamed, {STREAM_TOKENS} tokens each, a step every 4 ms (16,000 tokens/s)",
    "stream32k": "the same, a step every 2 ms (32,000 tokens/s)",
    "unpaced": "the same, steps as fast as they are taken",
    "grpc": "64 chats over gRPC, a step every 16 ms (4,000 tokens/s); beside it HTTP at that pace",
}


async def measure(
    bed: Bed, names: Sequence[str], rounds: int, seconds: float, streams: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"scenarios": {}}
    for name in names:
        asked, servers = scenario(name, bed.work)
        runs: dict[str, list[Run]] = {server: [] for server in servers}
        for _, server in interleaved(servers, rounds):
            runs[server].append(Run.of(await bed.measure(server, asked, _WARM_S, seconds), asked.streams))
        found["scenarios"][name] = {server: [asdict(run) for run in of] for server, of in runs.items()}
        print(row(name, found["scenarios"][name]), flush=True)
    if streams:
        found["memory"] = await bed.memory(streams)
    return found


def row(name: str, runs: dict[str, list[dict[str, float]]]) -> str:
    cells = [DESCRIPTIONS[name]]
    (first, ours), (_, other) = runs.items()
    for of in (ours, other):
        rate, cpu, p50, p99 = (
            Spread.of([run[figure] for run in of]) for figure in ("per_second", "cpu_us", "p50_ms", "p99_ms")
        )
        cells += [rate.shown(), cpu.shown(1), f"{p50.median:.2f} / {p99.median:.2f}"]
    medians = [Spread.of([run["cpu_us"] for run in of]).median for of in (ours, other)]
    cells.append("" if first == "grpc" else f"{medians[1] / medians[0]:.0%}")
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, Any]) -> str:
    lines = [
        f"Machine: {sentence(found['machine'])}",
        "",
        "| what | router, per s | CPU µs each | p50 / p99 ms | plain app, per s | CPU µs each | p50 / p99 ms "
        "| plain CPU / router CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(name, runs) for name, runs in found["scenarios"].items()]
    lines += ["", "The row of gRPC: the router's gRPC, then its HTTP, at the same pace.", ""]
    if "memory" in found:
        memory = found["memory"]
        each = (memory["open_bytes"] - memory["before_bytes"]) / memory["streams"]
        lines += [
            f"Memory: {memory['before_bytes'] / 2**20:.0f} MiB idle, {memory['open_bytes'] / 2**20:.0f} MiB with "
            f"{memory['streams']:,} open streams, {each / 1024:.1f} KiB each; "
            f"{memory['after_bytes'] / 2**20:.0f} MiB after they have ended.",
            "",
        ]
    return "\n".join(lines)


def plot(found: dict[str, Any], paths: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in found["scenarios"] if name.startswith(("stream", "unpaced"))]
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for shift, server in ((-0.2, "router"), (0.2, "plain")):
        medians = [
            Spread.of([run["cpu_us"] for run in found["scenarios"][name][server]]).median for name in names
        ]
        axis.bar([place + shift for place in range(len(names))], medians, 0.4, label=server)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="CPU µs per streamed token")
    axis.legend()
    figure.tight_layout()
    for path in paths:
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="headrace bench router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each window")
    parser.add_argument("--streams", type=int, default=5000, help="open at once to see what memory they take")
    parser.add_argument(
        "--prefill", type=int, default=1, help="simulated prefill workers; 0: decode reads prompts"
    )
    parser.add_argument("--decode", type=int, default=1, help="simulated decode workers")
    parser.add_argument(
        "--index", action="store_true", help="workers tell the index of every prompt's blocks"
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="whose tokenizer and template are used"
    )
    parser.add_argument("--profile", type=Path, help="write here where the router's CPU time goes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench-out/router"))
    given = parser.parse_args()
    if unknown := set(given.what) - set(SCENARIOS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    found: dict[str, Any] = {"machine": describe(), "arguments": {**vars(given)}}
    found["arguments"] = {name: str(value) for name, value in vars(given).items()}
    with Bed(
        prepare_model(given.model).path,
        prefill=given.prefill,
        decode=given.decode,
        tells_index=given.index,
        profile=given.profile,
        seed=given.seed,
    ) as bed:
        found |= uvloop.run(measure(bed, given.what or SCENARIOS, given.rounds, given.seconds, given.streams))
    write_results(given.out, "router", found, table(found), plot)


if __name__ == "__main__":
    main()

"""KV transfer against what the machine can do: `headrace bench transfer`, or python -m bench.transfer.

shm against one core's memcpy, tcp over loopback against sockets driven by C and iperf3, and what handing over adds to
the time to the first token. Everything is a ratio of figures of one run that took turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe, sentence
from bench.results import write_results
from bench.spread import Spread, interleaved
from bench.transfer import first_token, granularity
from bench.transfer.limits import SocketCopy, iperf3_rate, memcpy_rate
from bench.transfer.pair import Pair
from workers.config import TransferConfig

KIB = 1024
SIZES = (256 * KIB, 1024 * KIB, 8192 * KIB, 65536 * KIB)
WHAT = ("shm", "tcp", "ttft", "granularity")
LENGTHS = (512, 1024, 2048, 4096)


def shm(rounds: int, total_bytes: int) -> list[dict[str, Any]]:
    """Each block size: bytes per second of a transfer and of memmove between the same kinds of memory."""
    found = []
    source = np.ones(total_bytes, np.uint8)
    for block_bytes in SIZES:
        pair = Pair(block_bytes, total_bytes, TransferConfig(channels=["shm"]))
        try:
            pair.transfer()  # opens the channels, maps the pages
            rates: dict[str, list[float]] = {"headrace": [], "memcpy": []}
            for number, name in interleaved(list(rates), rounds):
                if name == "headrace":
                    rates[name].append(pair.transfer())
                else:
                    rates[name].append(memcpy_rate(pair.side.pages, source, block_bytes, number))
        finally:
            pair.stop()
        found.append({"block_bytes": block_bytes, "rates": rates})
    return found


def tcp(rounds: int, total_bytes: int, streams: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    copy = SocketCopy()
    for count in streams:
        for block_bytes in SIZES:
            pair = Pair(block_bytes, total_bytes, TransferConfig(channels=["tcp"], tcp_streams=count))
            try:
                pair.transfer()
                rates: dict[str, list[float]] = {"headrace": [], "sockets": [], "iperf3": []}
                for _, name in interleaved(list(rates), rounds):
                    if name == "headrace":
                        rates[name].append(pair.transfer())
                    elif name == "sockets":
                        rates[name].append(copy.rate(count, block_bytes, total_bytes))
                    elif (rate := iperf3_rate(count)) is not None:
                        rates[name].append(rate)
            finally:
                pair.stop()
            found.append({"block_bytes": block_bytes, "streams": count, "rates": rates})
    return found


def ttft(rounds: int, threads: int) -> list[dict[str, Any]]:
    common = ["--set", f"engine.num_threads={threads}"]
    clusters = {
        "one worker": ["--prefill", "0", "--decode", "1", *common],
        "shm": ["--prefill", "1", "--decode", "1", *common],
        "tcp": ["--prefill", "1", "--decode", "1", "--set", 'transfer.channels=["tcp"]', *common],
    }
    found = []
    for one in first_token.measure(clusters, LENGTHS, rounds):
        found.append({"prompt_tokens": one.prompt_tokens, "seconds": one.seconds})
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"Machine: {sentence(found['machine'])}", ""]
    if "shm" in found:
        lines += ["| shm, blocks of | GB/s | memcpy, one core | ratio |", "|---|---|---|---|"]
        for row in found["shm"]:
            ours, limit = (Spread.of(row["rates"][name]) for name in ("headrace", "memcpy"))
            lines.append(
                f"| {row['block_bytes'] // KIB:,} KiB | {ours.shown(1, 1e-9)} | {limit.shown(1, 1e-9)} | "
                f"{ours.median / limit.median:.0%} |"
            )
        lines.append("")
    if "tcp" in found:
        lines += [
            "| tcp over loopback, blocks of | streams | GB/s | sockets in C, same memory | ratio | iperf3 | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["tcp"]:
            ours, sockets = (Spread.of(row["rates"][name]) for name in ("headrace", "sockets"))
            iperf = Spread.of(row["rates"]["iperf3"]) if row["rates"]["iperf3"] else None
            lines.append(
                f"| {row['block_bytes'] // KIB:,} KiB | {row['streams']} | {ours.shown(2, 1e-9)} | "
                f"{sockets.shown(2, 1e-9)} | {ours.median / sockets.median:.0%} | "
                + (
                    "not installed | |"
                    if iperf is None
                    else f"{iperf.shown(2, 1e-9)} | {ours.median / iperf.median:.0%} |"
                )
            )
        lines.append("")
    if "ttft" in found:
        lines += [
            "| prompt tokens | first token, one worker | prefill + decode, shm | added | tcp | added |",
            "|---|---|---|---|---|---|",
        ]
        for row in found["ttft"]:
            one = first_token.FirstToken(row["prompt_tokens"], row["seconds"])
            cells = [f"{one.prompt_tokens:,}", f"{one.spread('one worker').shown(1, 1e3)} ms"]
            for name in ("shm", "tcp"):
                added = one.added(name, "one worker")
                cells += [f"{one.spread(name).shown(1, 1e3)} ms", f"{added.median:+.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if "granularity" in found:
        groups = list(found["granularity"][0]["seconds"])
        heads = [f"layers in {count} parts" if int(count) > 1 else "by chunk" for count in groups]
        lines += [
            f"| wire | prompt tokens | {' | '.join(f'first token, {head}' for head in heads)} |",
            "|" + "---|" * (len(groups) + 2),
        ]
        for row in found["granularity"]:
            spreads = [Spread.of(row["seconds"][count]) for count in groups]
            base = spreads[0].median
            cells = [f"{s.shown(1, 1e3)} ms ({s.median / base - 1:+.1%})" for s in spreads]
            lines.append(f"| {row['wire']} | {row['prompt_tokens']:,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, Any], paths: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for row, name, axis in (("shm", "memcpy", axes[0]), ("tcp", "sockets", axes[1])):
        rows = [one for one in found.get(row, []) if one.get("streams", 1) == 1]
        for which, style in (("headrace", "o-"), (name, "s--")):
            axis.plot(
                [one["block_bytes"] / KIB for one in rows],
                [Spread.of(one["rates"][which]).median / 1e9 for one in rows],
                style,
                label=which,
            )
        axis.set(xscale="log", xlabel="block, KiB", ylabel="GB/s", title=row, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    for path in paths:
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="headrace bench transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", choices=WHAT, help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=256, help="moved in each transfer")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2], help="of tcp")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (ttft)")
    parser.add_argument("--out", type=Path, default=Path("bench-out/transfer"))
    given = parser.parse_args()
    what = given.what or WHAT
    total = given.mib * KIB * KIB
    found: dict[str, Any] = {"machine": describe()}
    if "shm" in what:
        found["shm"] = shm(given.rounds, total)
    if "tcp" in what:
        found["tcp"] = tcp(given.rounds, total, given.streams)
    if "ttft" in what:
        found["ttft"] = ttft(given.rounds, given.threads)
    if "granularity" in what:
        found["granularity"] = granularity.measure((512, 2048), (1, 5, 30), given.rounds, given.threads)
    write_results(given.out, "transfer", found, table(found), plot)


if __name__ == "__main__":
    main()

"""A run for people: a table, plots, and a line while it goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bench.serve.drive import Run
from bench.spread import percentile

# A generator that uses more of its core than this, or sends later, measures itself too.
BUSY_SHARE = 0.8
LATE_S = 0.01

_ROWS = (
    ("ttft_s", "TTFT"),
    ("tpot_s", "TPOT"),
    ("itl_s", "ITL"),
    ("e2e_s", "end to end"),
    ("late_s", "sent late"),
    ("connect_s", "connecting"),
)


def table(found: dict[str, Any]) -> str:
    run = found["run"]
    columns = ("mean", "p50", "p90", "p99", "max")
    lines = [f"| {found['what']} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for key, title in _ROWS:
        values = run[key]
        cells = ["-" if values is None else f"{values[column] * 1e3:,.1f} ms" for column in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    offered = run["offered_requests_per_s"]
    lines += [
        "",
        f"{run['requests']} requests in {run['seconds']:.1f} s"
        + (f" (and {run['warmup_requests']} to warm up)" if run["warmup_requests"] else "")
        + f": {run['requests_per_s']:.2f} requests/s"
        + (f" of {offered:.2f} offered" if offered is not None and found["loop"] == "open" else "")
        + f", {run['prompt_tokens_per_s']:,.0f} prompt and {run['output_tokens_per_s']:,.0f} output tokens/s, "
        f"at most {run['most_in_flight']} in flight",
    ]
    if "slo" in run:
        lines.append(
            f"goodput under {run['slo']}: {run['goodput_requests_per_s']:.2f} requests/s, "
            f"{run['goodput_share']:.1%} of requests"
        )
    if run["errors"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in run["errors_by_kind"].items())
        lines.append(f"{run['errors']} errors ({kinds}); the first: {run['first_error']:.200}")
    if run["ended_early"]:
        lines.append(f"{run['ended_early']} answers ended before the tokens that were asked for")
    lines += ["", f"the generator used {run['generator']['cpu_share']:.0%} of a core, "
              f"{run['generator']['cpu_s_per_request'] * 1e6:,.0f} µs a request"]  # fmt: skip
    return "\n".join([*lines, *warnings(run)]) + "\n"


def warnings(run: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    if run["generator"]["cpu_share"] > BUSY_SHARE:
        found.append(
            f"warning: the generator was at {run['generator']['cpu_share']:.0%} of its core: part of the latency is "
            "its own; send less, or run several"
        )
    if run["late_s"] is not None and run["late_s"]["p99"] > LATE_S:
        found.append(
            f"warning: one request in a hundred was sent {run['late_s']['p99'] * 1e3:.0f} ms late or more; "
            "latencies count from when it was due"
        )
    return found


def plot(found: dict[str, Any], paths: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = found["curves"]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, key, title in ((axes[0], "ttft_s", "TTFT"), (axes[1], "tpot_s", "TPOT")):
        values = sorted(curves[key])
        axis.plot(values, [(index + 1) / len(values) for index in range(len(values))])
        limit = (found["slo_s"] or {}).get(key)
        if limit is not None:
            axis.axvline(limit, color="tab:red", linestyle="--", label="SLO")
            axis.legend()
        axis.set(xlabel="seconds", ylabel="share of requests", title=title, ylim=(0, 1.02))
    flight = found["run"]["in_flight"]
    axes[2].step(flight["at_s"], flight["requests"], where="post")
    axes[2].set(xlabel="seconds", ylabel="requests in flight", title="load", ylim=(0, None))
    figure.tight_layout()
    for path in paths:
        figure.savefig(path)
    pyplot.close(figure)


class Progress:
    """One line on a terminal that is written over; on anything else nothing."""

    def __init__(self, window: int = 200) -> None:
        self._window = window
        self._width = 0
        self._on = sys.stderr.isatty()

    def __call__(self, run: Run) -> None:
        if not self._on:
            return
        line = progress_line(run, time.perf_counter(), self._window)
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def over(self) -> None:
        if self._on and self._width:
            sys.stderr.write("\n")


def progress_line(run: Run, now: float, window: int = 200) -> str:
    """TTFT and lateness are of the last `window` requests that were sent."""
    last = run.records[-window:]
    ttfts = sorted(r.ttft for r in last if r.arrivals)
    late = sorted(r.late for r in last if r.sent)
    errors = sum(bool(record.error) for record in run.records)
    text = (
        f"{now - run.began:6.0f} s  sent {len(run.records):,}  done {run.done:,}  in flight {run.in_flight:,}"
    )
    if errors:
        text += f"  errors {errors:,}"
    if ttfts:
        text += f"  TTFT p50 {percentile(ttfts, 0.5) * 1e3:,.0f} p99 {percentile(ttfts, 0.99) * 1e3:,.0f} ms"
    if late:
        text += f"  late p99 {percentile(late, 0.99) * 1e3:.1f} ms"
    return text

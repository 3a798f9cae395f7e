"""Figures for people: Markdown tables by workload, and one plot of their headlines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.compare.campaign import Record
from bench.machine import sentence
from bench.spread import Spread
from bench.workloads import WORKLOADS

_QUICK = "A quick run of shortened workloads, not those in the titles: it shows that everything runs, not how fast."


def markdown(document: Mapping[str, Any]) -> str:
    records = [Record(**entry) for entry in document["systems"]]
    lines = [_QUICK, ""] if document["quick"] else []
    lines += [
        f"Machine: {sentence(document['machine'])}. {document['runs']} interleaved runs of each system, one server "
        "at a time, the same load generator and the same text for all; medians (range).",
    ]
    for workload, what in document["workloads"].items():
        lines += ["", f"**{workload}**: {what}", "", *_table(workload, records)]
    lines += ["", "Started by:", ""]
    lines += [
        f"- `{record.system}` ({record.version}): `{record.command}`" for record in records if record.command
    ]
    return "\n".join(lines) + "\n"


def _table(workload: str, records: list[Record]) -> list[str]:
    columns = WORKLOADS[workload].columns
    lines = [
        "| system | " + " | ".join(title for title, _, _ in columns.values()) + " | errors |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for record in _best_first(workload, records):
        runs = record.figures.get(workload, [])
        if not runs:
            why = record.trouble[-1] if record.trouble else "not run"
            lines.append(f"| {record.system} | not measured: {_cell(why)}" + " |" * (len(columns) + 1))
            continue
        cells = [
            Spread.of([run[name] for run in runs]).shown(digits, scale)
            for name, (_, scale, digits) in columns.items()
        ]
        failed = sum(run["errors"] for run in runs)
        asked = sum(run["requests"] for run in runs)
        errors = f"{failed:.0f} of {asked:.0f}" if failed else "0"
        lines.append(f"| {record.system} | " + " | ".join(cells) + f" | {errors} |")
    return lines


def _best_first(workload: str, records: list[Record]) -> list[Record]:
    def rank(record: Record) -> tuple[bool, float]:
        middle = headline(workload, record)
        if middle is None:
            return True, 0.0
        return False, -middle.median if WORKLOADS[workload].more_is_better else middle.median

    return sorted(records, key=rank)


def headline(workload: str, record: Record) -> Spread | None:
    runs = record.figures.get(workload, [])
    return Spread.of([run[WORKLOADS[workload].headline] for run in runs]) if runs else None


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def plot(document: Mapping[str, Any], targets: list[Path]) -> None:
    """A panel for each workload. Needs matplotlib (the extra `bench`); raises ImportError without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [Record(**entry) for entry in document["systems"]]
    names = list(document["workloads"])
    figure, axes = pyplot.subplots(
        len(names), 1, figsize=(8, 1.2 + len(names) * (0.7 + 0.25 * len(records))), squeeze=False
    )
    for axis, workload in zip(axes[:, 0], names, strict=True):
        found = [
            (r.system, s) for r in reversed(_best_first(workload, records)) if (s := headline(workload, r))
        ]
        title, scale, _ = WORKLOADS[workload].columns[WORKLOADS[workload].headline]
        middles = [spread.median * scale for _, spread in found]
        below = [(spread.median - spread.low) * scale for _, spread in found]
        above = [(spread.high - spread.median) * scale for _, spread in found]
        colours = ["tab:blue" if name.startswith("headrace") else "tab:gray" for name, _ in found]
        axis.barh([name for name, _ in found], middles, xerr=[below, above], color=colours, capsize=2)
        better = "more is better" if WORKLOADS[workload].more_is_better else "less is better"
        axis.set_title(document["workloads"][workload], fontsize=9, loc="left")
        axis.set_xlabel(f"{title} ({better})", fontsize=8)
        axis.tick_params(labelsize=8)
    if document["quick"]:
        figure.suptitle(_QUICK, fontsize=8, color="tab:red")
    figure.tight_layout()
    for target in targets:
        figure.savefig(target, dpi=150)
    pyplot.close(figure)

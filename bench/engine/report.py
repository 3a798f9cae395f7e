"""Figures of the engine for people: Markdown, and a plot of each case against its floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.machine import sentence
from bench.spread import Spread


def markdown(document: Mapping[str, Any]) -> str:
    floors = document["floors"]
    lines = [
        f"Machine: {sentence(document['machine'])}.",
        "",
        f"{document['model']}, one process, {document['threads']} threads, no HTTP; medians of {document['runs']} "
        f"interleaved runs (range), each run the median of {document['steps']} steps. Best of "
        f"{len(floors['probes'])} probes in the same run: reading {floors['bytes_per_s'] / 1e9:.1f} GB/s, bfloat16 "
        f"product {floors['flops_per_s'] / 1e12:.2f} TFLOP/s. `step / floor` is against the larger of the two floors "
        "(m: memory, a: arithmetic): 1.0 could not be faster, except that integer products may beat the bfloat16 rate.",
    ]
    for kind, unit in (("decode", "step, ms"), ("prefill", "prompt, ms")):
        rows = [row for row in document["rows"] if row["kind"] == kind]
        if rows:
            lines += ["", f"**{kind}**", "", *_table(rows, unit)]
    lines += _not_measured(document) + _host(document)
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], unit: str) -> list[str]:
    lines = [
        f"| context | batch | configuration | tokens/s | {unit} | step / floor | memory floor, ms | "
        "arithmetic floor, ms |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        head = f"| {row['context']:,} | {row['batch']} | {row['configuration']} |"
        if "skipped" in row:
            lines.append(f"{head} skipped: {row['skipped'].replace('|', '/')} | | | | |")
            continue
        spread = Spread.of(row["seconds"])
        rates = Spread.of([row["tokens"] / seconds for seconds in row["seconds"]])
        bound = "m" if row["memory_floor_s"] >= row["arithmetic_floor_s"] else "a"
        lines.append(
            f"{head} {rates.shown()} | {spread.shown(2, 1e3)} | {spread.median / row['floor_s']:.2f} {bound} | "
            f"{row['memory_floor_s'] * 1e3:.2f} | {row['arithmetic_floor_s'] * 1e3:.2f} |"
        )
    return lines


def _not_measured(document: Mapping[str, Any]) -> list[str]:
    troubled = [r for r in document["configurations"] if r["trouble"]]
    if not troubled:
        return []
    return ["", "Not measured:", "", *(f"- {r['configuration']}: {r['trouble']}" for r in troubled)]


def _host(document: Mapping[str, Any]) -> list[str]:
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in document["configurations"]:
        for host in record["host"]:
            runs.setdefault((record["configuration"], host["case"]), []).append(host)
    if not runs:
        return []
    parts = list(next(iter(runs.values()))[0]["parts_cpu_us"])
    lines = [
        "",
        "**host**: CPU time of the stepping thread outside the model, microseconds",
        "",
        f"| configuration | case | step | model | host | host a token | share of step | {' | '.join(parts)} |",
        "|---" * (7 + len(parts)) + "|",
    ]
    for (name, case), hosts in runs.items():

        def middle(figure: str, of: list[dict[str, Any]] = hosts) -> float:
            return float(statistics.median(host[figure] for host in of))

        cells = [f"{statistics.median(host['parts_cpu_us'][part] for host in hosts):.0f}" for part in parts]
        lines.append(
            f"| {name} | {case} | {middle('step_us'):,.0f} | {middle('model_us'):,.0f} | "
            f"{middle('host_cpu_us'):,.0f} | {middle('host_cpu_us_per_token'):.1f} | {middle('host_share'):.1%} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def plot(document: Mapping[str, Any], targets: list[Path]) -> None:
    """Tokens a second by batch, a panel for each context, floors dashed. Needs matplotlib; ImportError without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in document["rows"] if row["kind"] == "decode" and "skipped" not in row]
    contexts = sorted({row["context"] for row in rows})
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    if not rows:
        return
    figure, axes = pyplot.subplots(1, len(contexts), figsize=(4.2 * len(contexts), 4), squeeze=False)
    for axis, context in zip(axes[0], contexts, strict=True):
        for number, name in enumerate(names):
            mine = [row for row in rows if row["context"] == context and row["configuration"] == name]
            batches = [row["batch"] for row in mine]
            rates = [row["batch"] / Spread.of(row["seconds"]).median for row in mine]
            limits = [row["batch"] / row["floor_s"] for row in mine]
            axis.plot(batches, rates, "o-", color=f"C{number}", label=name, markersize=4)
            axis.plot(batches, limits, "--", color=f"C{number}", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_title(f"decode, context {context:,}", fontsize=9)
        axis.set_xlabel("batch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens/s (dashed: the floor's)", fontsize=8)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    for target in targets:
        figure.savefig(target, dpi=150)
    pyplot.close(figure)

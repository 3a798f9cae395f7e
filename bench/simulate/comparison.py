"""What policies that were simulated amount to beside each other: a table and a plot.

Seeds are paired: at one load and seed all policies see the same requests at the same times, so ratios are taken seed by
seed, and their median and range are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.simulate.experiment import Row
from bench.simulate.policies import ORACLE

OURS = "cost"
Place = tuple[str, int, bool]  # trace, workers, split


def places(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    found: dict[Place, list[Row]] = {}
    for row in rows:
        found.setdefault((row["trace"], row["workers"], row["split"]), []).append(row)
    return found


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Of the router's policy at each load: against round robin, the best of the baselines, and what is possible."""
    found = []
    for (trace, workers, split), inside in places(rows).items():
        for load in dict.fromkeys(row["load"] for row in inside):
            by_policy: dict[str, dict[int, Row]] = {}
            for row in inside:
                if row["load"] == load:
                    by_policy.setdefault(row["policy"], {})[row["seed"]] = row
            others = {
                name: _ratios(seeds, by_policy[OURS])
                for name, seeds in by_policy.items()
                if OURS in by_policy and name not in (OURS, ORACLE)
            }
            if not others:
                continue
            ours = by_policy[OURS].values()
            best = min(others, key=lambda name: median(others[name]))
            plain = by_policy.get("round_robin", {})
            found.append(
                {
                    "trace": trace,
                    "workers": workers,
                    "split": split,
                    "load": load,
                    "hits": median(row["hits"] for row in ours),
                    "of_oracle": median(row["of_oracle"] for row in ours),
                    "own_of_oracle": median(row["own_of_oracle"] for row in ours),
                    "ttft_p99_s": median(row["ttft_p99_s"] for row in ours),
                    "least_ttft_p99_s": median(row["least_ttft_p99_s"] for row in ours),
                    "round_robin_over_ours": others.get("round_robin"),
                    "round_robin_over_least": [
                        r["ttft_p99_s"] / r["least_ttft_p99_s"] for r in plain.values()
                    ],
                    "best": best,
                    "best_over_ours": others[best],
                }
            )
    return found


def _ratios(theirs: Mapping[int, Row], ours: Mapping[int, Row]) -> list[float]:
    return [theirs[seed]["ttft_p99_s"] / ours[seed]["ttft_p99_s"] for seed in theirs if seed in ours]


def _spread(ratios: Sequence[float] | None) -> str:
    if not ratios:
        return ""
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _shape(row: Mapping[str, Any]) -> str:
    half = row["workers"] // 2
    return f"{half} P + {row['workers'] - half} D" if row["split"] else f"{row['workers']} unified"


def _medians(rows: Iterable[Row]) -> list[Row]:
    """One row of each load and policy, with medians over seeds."""
    together: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row["load"], row["policy"]), []).append(row)
    return [
        seeds[0]
        | {
            name: median(row[name] for row in seeds)
            for name, value in seeds[0].items()
            if isinstance(value, float) and name != "load"
        }
        | {
            name: {role: median(row[name][role] for row in seeds) for role in seeds[0][name]}
            for name in ("balance", "busy")
        }
        for seeds in together.values()
    ]


def markdown(found: Mapping[str, Any]) -> str:
    rows: list[Row] = found["rows"]
    lines = [
        "Hits: of what the longest prefix anywhere would save; `own` leaves out what was fetched from another worker. p99 TTFT "
        "in seconds; `least`: what no placement can better, each prompt alone on an idle worker with an endless cache. Ratios are "
        "medians over seeds, with their range. Loads are shares of the capacity with the oracle's placement.",
        "",
        f"| trace | workers | load | `{OURS}`: hits | own | p99 | least | round_robin / {OURS} | round_robin / least | "
        f"best other | / {OURS} |",
        "|---" * 11 + "|",
    ]
    for verdict in verdicts(rows):
        lines.append(
            f"| {verdict['trace']} | {_shape(verdict)} | {verdict['load']:.0%} | {verdict['of_oracle']:.1%} | "
            f"{verdict['own_of_oracle']:.1%} | {verdict['ttft_p99_s']:.2f} | {verdict['least_ttft_p99_s']:.2f} | "
            f"{_spread(verdict['round_robin_over_ours'])} | {_spread(verdict['round_robin_over_least'])} | "
            f"{verdict['best']} | {_spread(verdict['best_over_ours'])} |"
        )
    for inside in places(rows).values():
        first = inside[0]
        lines += [
            "",
            f"**{first['trace']}, {_shape(first)}**: {first['requests']:,} requests, capacity "
            f"{median(row['capacity_per_s'] for row in inside):.2f} requests/s, endless memory would hit "
            f"{median(row['endless_hits'] for row in inside):.1%}",
            "",
            "| load | policy | hits | own | of the oracle's | TTFT p50, s | p99, s | TPOT p50, ms | p99, ms | goodput | "
            "busy | busiest / mean |",
            "|---" * 12 + "|",
        ]
        for row in _medians(inside):
            busy = ", ".join(f"{value:.0%}" for value in row["busy"].values())
            balance = ", ".join(f"{value:.2f}" for value in row["balance"].values())
            lines.append(
                f"| {row['load']:.0%} | {row['policy']} | {row['hits']:.1%} | {row['own_hits']:.1%} | "
                f"{row['of_oracle']:.1%} | {row['ttft_p50_s']:.2f} | {row['ttft_p99_s']:.2f} | "
                f"{row['tpot_p50_s'] * 1e3:.0f} | {row['tpot_p99_s'] * 1e3:.0f} | {row['goodput']:.1%} | {busy} | {balance} |"
            )
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], targets: list[Path]) -> None:
    """p99 TTFT by load, a panel for each cluster. Needs matplotlib; ImportError without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "headrace"  # the same figures give the same file
    cells = places(found["rows"])
    columns = min(len(cells), 4)
    lines = -(-len(cells) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False)
    names = list(dict.fromkeys(row["policy"] for row in found["rows"]))
    for axis, inside in zip(axes.flat, cells.values(), strict=False):
        rows = _medians(inside)
        for number, name in enumerate(names):
            mine = [row for row in rows if row["policy"] == name]
            style = "k--" if name == ORACLE else f"C{number}o-"
            loads, p99 = [100 * row["load"] for row in mine], [row["ttft_p99_s"] for row in mine]
            axis.plot(loads, p99, style, label=name, markersize=3, linewidth=2 if name == OURS else 1)
        axis.axhline(
            median(row["least_ttft_p99_s"] for row in inside),
            color="grey",
            linestyle=":",
            label="least possible",
        )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_title(f"{inside[0]['trace']}, {_shape(inside[0])}", fontsize=9)
        axis.set_xlabel("load, % of capacity", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(cells) :]:
        axis.axis("off")
    axes[0][0].set_ylabel("p99 TTFT, s", fontsize=8)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    for target in targets:
        figure.savefig(target, dpi=80, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)

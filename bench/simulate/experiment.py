"""Every policy at every load on clusters of several sizes, in as many processes as wanted; and what it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.simulate.capacity import capacity_per_s
from bench.simulate.cluster import Cluster, ClusterConfig
from bench.simulate.jobs import Asked
from bench.simulate.outcome import Slo, summary
from bench.simulate.policies import ORACLE
from bench.simulate.traces import rate_per_s

OURS = "cost"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cluster and a trace: all policies and loads share its capacity."""

    trace_name: str
    workers: int
    split: bool  # half of the workers read prompts for the other half; else all are unified
    trace: Callable[[], list[Asked]]  # in the process that needs it
    config: ClusterConfig

    @property
    def name(self) -> str:
        return f"{self.trace_name}, {self.workers} {'split' if self.split else 'unified'}"


def run_cells(
    cells: Sequence[Cell], policies: Sequence[str], loads: Sequence[float], slo: Slo, processes: int
) -> Iterator[Row]:
    """Rows in the order of cells, loads and policies, each as soon as it and those before it are there."""
    with ProcessPoolExecutor(processes) as pool:
        capacities = list(pool.map(_capacity, cells))
        tasks = [
            (cell, capacity, policy, load, slo)
            for cell, capacity in zip(cells, capacities, strict=True)
            for load in loads
            for policy in policies
        ]
        yield from pool.map(_row, tasks)


def _capacity(cell: Cell) -> float:
    return capacity_per_s(cell.config, cell.trace())


def _row(task: tuple[Cell, float, str, float, Slo]) -> Row:
    cell, capacity, policy, load, slo = task
    trace = cell.trace()
    cluster = Cluster(dataclasses.replace(cell.config, policy=policy), trace)
    cluster.run(load * capacity / rate_per_s(trace))
    found = summary(cluster, slo)
    hits = found["hits"]
    oracle = hits["oracle_share_of_prompt"]
    own = hits["share_of_prompt"] - hits["fetched_share_of_prompt"]
    return {
        "trace": cell.trace_name,
        "workers": cell.workers,
        "split": cell.split,
        "requests": len(trace),
        "capacity_per_s": round(capacity, 4),
        "load": load,
        "policy": policy,
        "hits": hits["share_of_prompt"],
        "own_hits": round(own, 6),
        "endless_hits": hits["endless_share_of_prompt"],
        "of_oracle": hits["share_of_oracle"],
        "own_of_oracle": round(own / oracle, 6) if oracle else 1.0,
        "ttft_p50_s": found["ttft_s"]["p50"],
        "ttft_p99_s": found["ttft_s"]["p99"],
        "tpot_p50_s": found["tpot_s"].get("p50", 0.0),
        "tpot_p99_s": found["tpot_s"].get("p99", 0.0),
        "goodput": found["goodput_share"],
        "balance": {role: figures["max_over_mean"] for role, figures in found["balance"].items()},
        "computed_prompt_tokens": found["computed_prompt_tokens"],
        "preemptions": found["preemptions"],
    }


# --- what it shows --------------------------------------------------------------------------------------------------


def groups(rows: Sequence[Row]) -> dict[tuple[str, int, bool], list[Row]]:
    found: dict[tuple[str, int, bool], list[Row]] = {}
    for row in rows:
        found.setdefault((row["trace"], row["workers"], row["split"]), []).append(row)
    return found


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Of the router's policy at each load: against round robin, and against the best of the baselines."""
    found = []
    for (trace, workers, split), inside in groups(rows).items():
        for load in dict.fromkeys(row["load"] for row in inside):
            by_policy = {row["policy"]: row for row in inside if row["load"] == load}
            others = {name: row for name, row in by_policy.items() if name not in (OURS, ORACLE)}
            if OURS not in by_policy or not others:
                continue
            ours = by_policy[OURS]
            best = min(others, key=lambda name: others[name]["ttft_p99_s"])
            plain = others.get("round_robin")
            found.append(
                {
                    "trace": trace,
                    "workers": workers,
                    "split": split,
                    "load": load,
                    "of_oracle": ours["of_oracle"],
                    "own_of_oracle": ours["own_of_oracle"],
                    "round_robin_over_ours": plain["ttft_p99_s"] / ours["ttft_p99_s"] if plain else None,
                    "best": best,
                    "best_over_ours": others[best]["ttft_p99_s"] / ours["ttft_p99_s"],
                }
            )
    return found


def _shape(row: Mapping[str, Any]) -> str:
    half = row["workers"] // 2
    return f"{half} P + {row['workers'] - half} D" if row["split"] else f"{row['workers']} unified"


def markdown(found: Mapping[str, Any]) -> str:
    rows: list[Row] = found["rows"]
    lines = [
        "Hits are shares of all prompt tokens; `own` leaves out what was fetched from another worker. Loads are shares of the "
        "capacity with the oracle's placement.",
        "",
        f"| trace | workers | load | `{OURS}`: hits of the oracle's | own | p99 TTFT of round_robin / ours | "
        "best other | its p99 TTFT / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for verdict in verdicts(rows):
        plain = verdict["round_robin_over_ours"]
        lines.append(
            f"| {verdict['trace']} | {_shape(verdict)} | {verdict['load']:.0%} | {verdict['of_oracle']:.1%} | "
            f"{verdict['own_of_oracle']:.1%} | {'' if plain is None else f'{plain:.2f}'} | {verdict['best']} | "
            f"{verdict['best_over_ours']:.2f} |"
        )
    for inside in groups(rows).values():
        first = inside[0]
        lines += [
            "",
            f"**{first['trace']}, {_shape(first)}**: {first['requests']:,} requests, capacity "
            f"{first['capacity_per_s']:.2f} requests/s, endless memory would hit {first['endless_hits']:.1%}",
            "",
            "| load | policy | hits | own | of the oracle's | TTFT p50, s | p99, s | TPOT p50, ms | p99, ms | goodput | "
            "busiest / mean |",
            "|---" * 11 + "|",
        ]
        for row in inside:
            balance = ", ".join(f"{value:.2f}" for value in row["balance"].values())
            lines.append(
                f"| {row['load']:.0%} | {row['policy']} | {row['hits']:.1%} | {row['own_hits']:.1%} | "
                f"{row['of_oracle']:.1%} | {row['ttft_p50_s']:.2f} | {row['ttft_p99_s']:.2f} | "
                f"{row['tpot_p50_s'] * 1e3:.0f} | {row['tpot_p99_s'] * 1e3:.0f} | {row['goodput']:.1%} | {balance} |"
            )
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], targets: list[Path]) -> None:
    """p99 TTFT by load, a panel for each cluster. Needs matplotlib; ImportError without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "headrace"  # the same figures give the same file
    cells = groups(found["rows"])
    columns = min(len(cells), 3)
    lines = -(-len(cells) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False)
    names = list(dict.fromkeys(row["policy"] for row in found["rows"]))
    for axis, inside in zip(axes.flat, cells.values(), strict=False):
        for number, name in enumerate(names):
            mine = [row for row in inside if row["policy"] == name]
            style = "k--" if name == ORACLE else f"C{number}o-"
            axis.plot(
                [100 * row["load"] for row in mine],
                [row["ttft_p99_s"] for row in mine],
                style,
                label=name,
                markersize=3,
                linewidth=2 if name == OURS else 1,
            )
        axis.set_yscale("log")
        axis.set_title(f"{inside[0]['trace']}, {_shape(inside[0])}", fontsize=9)
        axis.set_xlabel("load, % of capacity", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(cells) :]:
        axis.axis("off")
    axes[0][0].set_ylabel("p99 TTFT, s", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    for target in targets:
        figure.savefig(target, dpi=130, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)

"""What was found, as Markdown and as plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import sentence

_WITHIN = 1.02  # of the bound or the optimum


def markdown(found: dict[str, Any]) -> str:
    parts = ["# Placement of experts\n", f"Measured on {sentence(found['machine'])}.\n"]
    for name, section in (
        ("anew", _anew),
        ("optima", _optima),
        ("changes", _changes),
        ("over_time", _over_time),
        ("unequal", _unequal),
        ("nodes", _nodes),
        ("clock", _clock),
    ):
        if found.get(name):
            parts.append(section(found[name]))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _three(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _anew(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["experts"], row["ranks"], row["redundant"]].append(row)
    layers = [value for row in rows for value in row["of_bound"]["headrace"]]
    near = sum(value <= _WITHIN for value in layers)
    worse = {which: _worse(rows, which) for which in ("eplb", "eplb by node")}
    head = [
        "experts",
        "ranks",
        "slots",
        "redundant",
        "bound / mean",
        "headrace: mean",
        "worst",
        "EPLB: mean",
        "worst",
    ]
    head += ["EPLB by node", "round robin", "contiguous", "ms a layer"]
    table = _table(head, (_anew_row(*key, group) for key, group in sorted(groups.items())))
    return (
        "## From nothing: time of the fullest rank divided by the bound\n\n"
        f"{near} of {len(layers)} layers are within 2% of the bound, the worst is at {max(layers):.3f}; "
        f"worse than EPLB: {worse['eplb']}, than its policy by node: {worse['eplb by node']}.\n\n{table}"
    )


def _worse(rows: list[dict[str, Any]], which: str) -> int:
    """Layers in which the other's fullest rank is lower."""
    pairs = (zip(row["of_bound"]["headrace"], row["of_bound"].get(which, [])) for row in rows)  # noqa: B905 (not always there)
    return sum(own > other * (1 + 1e-9) for pair in pairs for own, other in pair)


def _anew_row(experts: int, ranks: int, redundant: int, group: list[dict[str, Any]]) -> list[Any]:
    def values(which: str) -> list[float]:
        return [value for row in group for value in row["of_bound"].get(which, [])]

    def mean(which: str) -> str:
        return f"{np.mean(values(which)):.3f}" if values(which) else ""

    above = [value for row in group for value in row["bound_of_mean"]]
    return [
        experts,
        ranks,
        group[0]["slots"],
        redundant,
        f"{min(above):.2f}–{max(above):.2f}",
        mean("headrace"),
        f"{max(values('headrace')):.3f}",
        mean("eplb"),
        f"{max(values('eplb')):.3f}",
        mean("eplb by node"),
        mean("round robin"),
        mean("contiguous"),
        f"{np.mean([row['layer_ms'] for row in group]):.0f}",
    ]


def _optima(rows: list[dict[str, Any]]) -> str:
    head = [
        "shares",
        "cases",
        "headrace: mean",
        "worst",
        "within 2%",
        "EPLB: mean",
        "worst",
        "bound: mean",
        "least",
    ]
    lines = []
    for shares in ("any", "equal"):
        own = [row for row in rows if row["shares"] == shares]
        if not own:
            continue
        headrace, eplb, bound = ([row[key] for row in own] for key in ("headrace", "eplb", "bound"))
        near = sum(value <= _WITHIN for value in headrace)
        lines.append(
            [
                shares,
                len(own),
                *_three(np.mean(headrace), max(headrace)),
                near,
                *_three(np.mean(eplb), max(eplb), np.mean(bound), min(bound)),
            ]
        )
    return "## Small cases: divided by the optimum that HiGHS proved\n\n" + _table(head, lines)


def _changes(sections: dict[str, list[dict[str, Any]]]) -> str:
    head = ["", "shares", "balancedness: mean", "least", "moves of a layer: mean", "most"]
    text = "## After a change of domain (OLMoE)\n"
    for group, rows in sections.items():
        lines = [
            [
                row["what"],
                row["shares"],
                *_three(row["mean"], row["least"]),
                f"{row['moves']:.1f}",
                row["most_moves"],
            ]
            for row in rows
        ]
        text += f"\n{group}\n\n{_table(head, lines)}"
    return text


def _over_time(rows: list[dict[str, Any]]) -> str:
    head = ["loads", "policy", "balancedness: mean", "least", "moves of a layer and window"]
    lines = (
        [row["loads"], row["policy"], f"{row['mean']:.3f}", f"{row['least']:.3f}", f"{row['moves']:.1f}"]
        for row in rows
    )
    return "## Over time, each window served by a plan from the one before\n\n" + _table(head, lines)


def _unequal(rows: list[dict[str, Any]]) -> str:
    head = ["group", "shares", "from nothing: mean", "least", "after a change: mean", "least"]
    keys = ("anew", "anew_least", "onward", "onward_least")
    lines = ([row["group"], row["shares"], *(f"{row[key]:.3f}" for key in keys)] for row in rows)
    return "## Unequal ranks: bound divided by the fullest rank's time\n\n" + _table(head, lines)


def _nodes(rows: list[dict[str, Any]]) -> str:
    head = ["group", "domain", "loads alone", "2% allowed", "(fullest)", "5% allowed", "(fullest)"]
    head.append("5%, from loads alone by 16 moves a layer")
    lines = (
        [
            row["group"],
            row["domain"],
            *_three(row["blind"], row["at_0.02"]),
            f"+{row['imbalance_0.02']:.1%}",
            *_three(row["at_0.05"]),
            f"+{row['imbalance_0.05']:.1%}",
            *_three(row["after_16_moves"]),
        ]
        for row in rows
    )
    return "## Share of hops to another node\n\n" + _table(head, lines)


def _clock(rows: list[dict[str, Any]]) -> str:
    head = [
        "loads",
        "slots",
        "from nothing, s",
        "worst of bound",
        "loads changed by 20%, s",
        "worst",
        "moves a layer",
    ]
    lines = (
        [
            row["loads"],
            row["slots"],
            f"{row['anew_s']:.2f}",
            *_three(row["anew_of_bound"]),
            f"{row['drift_s']:.2f}",
            *_three(row["drift_of_bound"]),
            f"{row['moves']:.1f}",
        ]
        for row in rows
    )
    return "## Time of one core to plan 61 layers of 256 experts over 64 ranks\n\n" + _table(head, lines)


def plot(found: dict[str, Any], paths: list[Path]) -> None:
    """Gaps to the bound by size, and balancedness over time. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for which, color in (("eplb", "tab:orange"), ("headrace", "tab:blue")):
        gaps = np.sort(
            [100 * (v - 1) for row in found.get("anew", []) for v in row["of_bound"].get(which, [])]
        )
        if len(gaps):
            left.plot(np.linspace(0, 100, len(gaps)), gaps, label=which, color=color)
    left.axhline(2, color="gray", linewidth=0.8, linestyle=":")
    left.set(xlabel="layers, % of all cells", ylabel="fullest rank above the bound, %", ylim=(0, 30))
    if found.get("anew"):
        left.legend()
    rows = found.get("over_time", [])
    first = next((row["loads"] for row in rows if "drift" in row["loads"]), "")
    for row in rows:
        if row["loads"] == first:
            right.plot(row["windows"], label=f"{row['policy']}, {row['moves']:.0f} moves")
    right.set(xlabel="window of 30 s", ylabel="balancedness", title=first)
    if rows:
        right.legend()
    figure.tight_layout()
    for path in paths:
        figure.savefig(path)
    pyplot.close(figure)

"""Throughput of an expert-parallel decode pool under drifting load: live rebalancing, static placement, periodic EPLB.

python -m bench.experts simulate --olmoe FOLDER [--minutes 40] [--ranks 64] [--redundant 1] [--overlap 0]

Simulated are DeepSeek-V3's shape on H200s (bench/experts/simulate/machine.py says from which figures). Real is the code
that decides: loads, rebalancer and placement of router/experts, and EPLB as router/experts/baselines.py has it. The
same seed gives the same result. FOLDER holds OLMoE's expert counts, olmoe__expert_counts__DOMAIN.npz.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.experts.simulate.machine import Machine, Model, StepCost, Work
from bench.experts.simulate.policies import Eplb, Even, Live, Policy, Pool, Static
from bench.experts.simulate.run import Outcome, simulate
from bench.experts.simulate.scenarios import ScenarioError, scenarios
from bench.results import write_results
from router.config import ExpertsConfig

POLICIES: dict[str, Callable[[Pool], Policy]] = {
    "static": lambda pool: Static(),
    "eplb-once": lambda pool: Eplb(pool, once=True),
    "eplb-stop": lambda pool: Eplb(pool),
    "eplb-background": lambda pool: Eplb(pool, background=True),
    "eplb-often": lambda pool: Eplb(pool, interval=500, window=500, background=True),
    "live": lambda pool: Live(pool, ExpertsConfig()),
    "even": lambda pool: Even(),
}


@dataclass(frozen=True)
class Task:
    policy: str
    scenario: str
    pool: Pool
    seconds: float
    frame_s: float
    seed: int
    olmoe: Path | None


def run(task: Task) -> tuple[str, Outcome]:
    """The policy's name, and what came of it."""
    cost = task.pool.cost
    found = scenarios(cost.model.drawn, cost.model.experts, task.seconds, task.seed, task.olmoe)
    popularity = dict(found)[task.scenario]
    policy = POLICIES[task.policy](task.pool)
    outcome = simulate(cost, task.pool.first, policy, popularity, task.seconds, task.frame_s, task.seed)
    return policy.name, outcome


def rows(tasks: Sequence[Task], processes: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(processes) as workers:
        found = list(zip(tasks, workers.map(run, tasks), strict=True))
    even = {task.scenario: outcome.tokens_per_s for task, (_, outcome) in found if task.policy == "even"}
    return [_row(task, name, outcome, even.get(task.scenario)) for task, (name, outcome) in found]


def _row(task: Task, name: str, outcome: Outcome, even: float | None) -> dict[str, Any]:
    """even: tokens/s of the bound in this scenario, where it was asked for."""
    every = max(len(outcome.frames) // 150, 1)
    return {
        "scenario": task.scenario,
        "policy": name,
        "tokens_per_s": outcome.tokens_per_s,
        "of_even": None if even is None else outcome.tokens_per_s / even,
        "worst_tokens_per_s": outcome.worst_tokens_per_s,
        "balancedness": outcome.balancedness,
        "changes": outcome.changes,
        "moves": round(outcome.moves * task.pool.cost.model.each_stands_for),
        "moved_gb": outcome.moves * task.pool.move_bytes / 1e9,
        "stalled_s": outcome.stalled_s,
        "timeline": [round(frame.tokens_per_s) for frame in outcome.frames[::every]],
        "timeline_s": every * task.frame_s,
    }


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| load | placement | tokens/s | of even | worst 1% | balancedness | changes | experts moved (GB) | stalled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        of_even = "" if row["of_even"] is None else f"{row['of_even']:.1%}"
        lines.append(
            f"| {row['scenario']} | {row['policy']} | {row['tokens_per_s']:,.0f} | {of_even} "
            f"| {row['worst_tokens_per_s']:,.0f} | {row['balancedness']:.3f} | {row['changes']} "
            f"| {row['moves']:,} ({row['moved_gb']:,.0f}) | {row['stalled_s']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], paths: list[Path]) -> None:
    """Throughput over time, a panel for each scenario. Needs matplotlib; ImportError without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "the same each time"}

    names = list(dict.fromkeys(row["scenario"] for row in found["rows"]))
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 2.6 * len(names)), squeeze=False, sharex=True)
    for (panel,), name in zip(axes, names, strict=True):
        for row in found["rows"]:
            if row["scenario"] == name:
                minutes = [index * row["timeline_s"] / 60 for index in range(len(row["timeline"]))]
                panel.plot(
                    minutes, [per_s / 1e3 for per_s in row["timeline"]], label=row["policy"], linewidth=1
                )
        panel.set(title=name, ylabel="1,000 tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[-1][0].set_xlabel("minutes")
    axes[0][0].legend(fontsize=7, ncols=3, loc="lower right")
    figure.tight_layout()
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.experts simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--olmoe", type=Path, help="folder with OLMoE's counts; without it only the synthetic load"
    )
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--frame-s", type=float, default=2.0, help="seconds for which one step stands")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128, help="sequences of each rank")
    parser.add_argument(
        "--redundant", type=int, default=1, help="slots of a layer beyond experts / ranks, on each rank"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.0, help="share of the all-to-all that is hidden, 0 to 1"
    )
    parser.add_argument("--layers", type=int, default=Model.layers)
    parser.add_argument(
        "--drawn", type=int, help="layers whose tokens are drawn, for all of them; default all"
    )
    parser.add_argument("--experts", type=int, default=Model.experts)
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"of {','.join(POLICIES)}")
    parser.add_argument("--scenarios", help="parts of their names, separated by commas; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("bench-out/experts-simulate"))
    given = parser.parse_args(arguments)
    try:
        tasks = _tasks(given)
    except ScenarioError as error:
        parser.error(str(error))
    found = rows(tasks, given.processes)
    cost = tasks[0].pool.cost
    parameters = {"model": asdict(cost.model), "machine": asdict(cost.machine), "work": asdict(cost.work)}
    results = {"parameters": parameters, "slots": tasks[0].pool.slots, "seed": given.seed, "rows": found}
    write_results(given.out, "experts-simulate", results, table(found), plot)


def _tasks(given: argparse.Namespace) -> list[Task]:
    """Raises ScenarioError."""
    if given.experts % given.ranks:
        raise ScenarioError(
            f"--experts {given.experts} are not the same number on each of {given.ranks} ranks"
        )
    policies = given.policies.split(",")
    if unknown := sorted(set(policies) - set(POLICIES)):
        raise ScenarioError(f"--policies: there is no {unknown[0]!r}; there are {', '.join(POLICIES)}")
    drawn = given.layers if given.drawn is None else given.drawn
    if not 1 <= drawn <= given.layers:
        raise ScenarioError(f"--drawn is {drawn}; allowed is 1 to {given.layers}, all layers")
    if not 0 <= given.overlap <= 1:
        raise ScenarioError(f"--overlap is {given.overlap}; allowed is 0 to 1")
    cost = StepCost(
        replace(Model(), layers=given.layers, drawn=drawn, experts=given.experts),
        replace(Machine(), overlap=given.overlap),
        Work(given.ranks, given.batch),
    )
    pool = Pool(cost, given.experts // given.ranks + given.redundant)
    seconds = given.minutes * 60
    every = [name for name, _ in scenarios(drawn, given.experts, seconds, given.seed, given.olmoe)]
    wanted = given.scenarios.split(",") if given.scenarios else [""]
    names = [name for name in every if any(part in name for part in wanted)]
    if not names:
        raise ScenarioError(
            f"--scenarios: none is named like {given.scenarios!r}; there are {', '.join(every)}"
        )
    return [
        Task(policy, name, pool, seconds, given.frame_s, given.seed, given.olmoe)
        for name in names
        for policy in policies
    ]

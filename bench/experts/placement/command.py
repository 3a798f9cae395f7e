"""Where experts are placed, and how good that is: beside EPLB, simpler baselines, a bound and the exact optimum.

python -m bench.experts placement [--olmoe FOLDER] [--only anew,optima,changes,over_time,unequal,nodes,clock]

FOLDER holds OLMoE's expert counts (olmoe__expert_counts__DOMAIN.npz and ..._crosslayer__DOMAIN.npz); without it only
synthetic loads are used. Everything but times is the same on every machine. Optima need scipy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.experts.placement import anew, onward, ranks, report
from bench.experts.placement.loads import LoadsError, olmoe, olmoe_coactivation
from bench.experts.simulate.scenarios import bursty, drifting, olmoe_domains, switching
from bench.machine import describe
from bench.results import write_results
from router.experts.placement import Options
from router.experts.topology import uniform

_LAYERS_OVER_TIME = 4


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.experts placement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--olmoe", type=Path, help="folder with OLMoE's expert counts")
    parser.add_argument("--only", default=",".join(_SECTIONS), help=f"of {','.join(_SECTIONS)}")
    parser.add_argument("--limit-s", type=float, default=30.0, help="for each exact optimum; default 30")
    parser.add_argument("--rounds", type=int, default=3, help="of the clock; default 3")
    parser.add_argument(
        "--effort", type=int, default=Options().effort, help="of plans from nothing; default as in the router"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out/experts"))
    asked = parser.parse_args(arguments)
    wanted = asked.only.split(",")
    unknown = set(wanted).difference(_SECTIONS)
    if unknown:
        parser.error(f"--only: there is no {min(unknown)!r}; there are {', '.join(_SECTIONS)}")
    found: dict[str, Any] = {"machine": describe()}
    try:
        for name in wanted:
            print(f"{name} ...", flush=True)
            found[name] = _SECTIONS[name](asked)
    except (LoadsError, ImportError) as error:
        sys.exit(str(error))
    write_results(asked.out, "placement", found, report.markdown(found), report.plot)


def _anew(asked: argparse.Namespace) -> Any:
    return anew.grid(olmoe(asked.olmoe) if asked.olmoe else {}, asked.effort)


def _changes(asked: argparse.Namespace) -> Any:
    if asked.olmoe is None:
        return {}
    measured = olmoe(asked.olmoe)
    return {
        f"{count} ranks of {slots} slots": onward.changes_of_domain(measured, count, slots)
        for count, slots in ((8, 9), (16, 5))
    }


def _over_time(asked: argparse.Namespace) -> Any:
    named = {}
    if asked.olmoe is not None:
        domains = olmoe_domains(asked.olmoe, _LAYERS_OVER_TIME, 64, seed=0)
        named = {
            "OLMoE, change of domain": switching(domains, 300.0),
            "OLMoE, drift": drifting(domains, 1200.0),
            "OLMoE, bursts": bursty(domains, 300.0),
        }
    named["Zipf, drifting"] = onward.synthetic_drift(_LAYERS_OVER_TIME, 64)
    return onward.over_time(named, uniform(8, 9), _LAYERS_OVER_TIME)


def _nodes(asked: argparse.Namespace) -> Any:
    if asked.olmoe is None:
        return []
    return ranks.across_nodes(olmoe(asked.olmoe), olmoe_coactivation(asked.olmoe))


_SECTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "anew": _anew,
    "optima": lambda asked: anew.optima(asked.limit_s),
    "changes": _changes,
    "over_time": _over_time,
    "unequal": lambda asked: ranks.unequal(olmoe(asked.olmoe) if asked.olmoe else {}),
    "nodes": _nodes,
    "clock": lambda asked: ranks.clock(asked.rounds),
}

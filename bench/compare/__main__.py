"""Headrace and other systems on the same weights, text and machine, driven by one load generator.

    python -m bench.compare                                   everything: hours
    python -m bench.compare --install                         only install the peers
    python -m bench.compare --quick --systems vllm,llama:q8_0 --workloads one,sixteen

Runs are interleaved; one server lives at a time. What cannot be installed or started is a row that says why.
Arguments after `--` go to `headrace serve`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from bench.compare.campaign import Campaign, document
from bench.compare.report import markdown, plot
from bench.compare.systems import DEFAULT, KNOWN
from bench.machine import describe
from bench.results import write_results
from bench.workloads import FULL, QUICK, WORKLOADS
from workers.models.cache import default_cache_dir


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _leave(number: int, frame: FrameType | None) -> None:
    """The server that is alive is stopped on the way out; also where a shell has set signals to be ignored."""
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.compare"
    )
    parser.add_argument(
        "--systems",
        type=_listed,
        default=DEFAULT,
        help=f"of {', '.join(KNOWN)}, those of Headrace and llama with :VARIANT; default {','.join(DEFAULT)}",
    )
    parser.add_argument("--workloads", type=_listed, default=tuple(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="tiny workloads: proves that it runs, not how fast"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out/compare"), help="directory of the results"
    )
    parser.add_argument("--peers-dir", type=Path, default=default_cache_dir() / "peers")
    parser.add_argument("--install", action="store_true", help="install the peers and stop")
    parser.add_argument("serve_args", nargs="*", help="further arguments of `headrace serve`, after --")
    given = parser.parse_args()
    if wrong := [name for name in given.workloads if name not in WORKLOADS]:
        parser.error(f"no such workload: {', '.join(wrong)}; there are {', '.join(WORKLOADS)}")
    if wrong := [name for name in given.systems if name.partition(":")[0] not in KNOWN]:
        parser.error(f"no such system: {', '.join(wrong)}; there are {', '.join(KNOWN)}")

    campaign = Campaign(
        given.systems,
        given.workloads,
        given.runs,
        QUICK if given.quick else FULL,
        given.peers_dir.expanduser().resolve(),
        given.out.resolve(),
        tuple(given.serve_args),
    )
    try:
        records = campaign.install()
    except ValueError as error:
        parser.error(str(error))
    if given.install:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    machine = describe()
    campaign.measure(records)
    found = document(campaign, records, machine)
    write_results(campaign.out, "compare", found, markdown(found), plot)


if __name__ == "__main__":
    main()

"""One run: what is said before, a line for each case as soon as it is measured, and the end."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels.nccl_tests.collectives import About
from kernels.nccl_tests.errors import BadArguments
from kernels.nccl_tests.plan import DTYPES, Case, not_checkable, not_supported
from kernels.nccl_tests.rank import Repeats, Result, Timing
from kernels.nccl_tests.table import (
    Line,
    Measured,
    as_data,
    average_bus_bandwidth,
    footer,
    header,
    remarks,
    row,
)
from kernels.nccl_tests.team import Team

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """All that a team is asked to do."""

    backend: str
    how: str  # where the ranks are, in words
    cases: Sequence[Case]
    repeats: Repeats
    arguments: dict[str, Any]
    json_file: Path | None = None


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the table is this program's output


def perform(run: Run, team: Team, out: Say = say) -> bool:
    """Run every case and print the table. Answers whether no element was wrong. Raises TeamError, BadArguments."""
    about = team.about()
    num_ranks = len(team)
    cases = _possible(run, num_ranks, out)
    for text in _preamble(run, about):
        out(text)
    team.join()
    team.allocate(
        max(case.counts(num_ranks).send * DTYPES[case.dtype].num_bytes for case in cases),
        max(case.size_bytes(num_ranks) for case in cases),
    )
    lines: list[Line] = []
    try:
        operation = None
        for case in cases:
            if case.operation != operation:
                operation = case.operation
                for text in ("#", f"# {operation}", *header()):
                    out(text)
            lines.append(_line(case, team.measure(case, run.repeats)))
            out(row(lines[-1]))
    finally:  # what was measured before a rank failed is worth keeping
        if run.json_file is not None:
            run.json_file.write_text(json.dumps(_document(run, about, lines, len(cases)), indent=2) + "\n")
    for text in footer(lines):
        out(text)
    team.close()
    return not any(line.wrong for line in lines)


def _possible(run: Run, num_ranks: int, out: Say) -> list[Case]:
    """The cases that the backend has; what it lacks is named once."""
    missing = {reason: None for case in run.cases if (reason := not_supported(run.backend, case)) is not None}
    for reason in missing:
        out(f"# left out: {reason}")
    cases = [case for case in run.cases if not_supported(run.backend, case) is None]
    if not cases:
        raise BadArguments(
            next(iter(missing), None)
            or f"no size is large enough for one element of every one of {num_ranks} ranks; raise --maxbytes"
        )
    for case in cases:
        if run.repeats.checks and (reason := not_checkable(case, num_ranks)) is not None:
            raise BadArguments(reason)
    return cases


def _preamble(run: Run, about: Sequence[About]) -> list[str]:
    versions = {name: version for each in about for name, version in each.versions.items()}
    text = [
        f"# Headrace nccl-test: backend {run.backend}, {len(about)} {'rank' if len(about) == 1 else 'ranks'}, {run.how}",
        "# " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"# warm-up {run.repeats.warmup}, iterations {run.repeats.iterations}, checks {run.repeats.checks}",
    ]
    for name, version in versions.items():
        others = sorted({each.versions.get(name, "none") for each in about} - {version})
        if others:
            text.append(f"# Ranks differ in {name}: {', '.join([version, *others])}")
    text += [
        f"#  Rank {rank:>3}  pid {each.pid:>7}  on {each.host}  {each.device}"
        for rank, each in enumerate(about)
    ]
    shared = _shared(about) if run.backend == "nccl" else {}
    text += [f"# {remark}" for remark in remarks(len(about), shared, run.backend)]
    return text


def _shared(about: Sequence[About]) -> dict[str, list[int]]:
    """Devices with several ranks."""
    on: dict[tuple[str, str], list[int]] = {}
    for rank, each in enumerate(about):
        on.setdefault((each.host, each.device_key), []).append(rank)
    return {f"{about[ranks[0]].device} of {key[0]}": ranks for key, ranks in on.items() if len(ranks) > 1}


def _line(case: Case, results: Sequence[Result]) -> Line:
    return Line(
        case,
        len(results),
        _merge([result.out_of_place for result in results]),
        _merge([result.in_place for result in results]),
    )


def _merge(timings: Sequence[Timing]) -> Measured:
    seconds = [timing.seconds for timing in timings]
    wrong = [timing.wrong for timing in timings if timing.wrong is not None]
    return Measured(sum(seconds) / len(seconds), max(seconds), sum(wrong) if wrong else None)


def _document(run: Run, about: Sequence[About], lines: Sequence[Line], planned: int) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": run.backend,
        "how": run.how,
        "arguments": run.arguments,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "ranks": [{"rank": rank, **asdict(each)} for rank, each in enumerate(about)],
        "complete": len(lines) == planned,
        "wrong": sum(line.wrong for line in lines),
        "avg_busbw_gb_s": average_bus_bandwidth(lines),
        "lines": [as_data(line) for line in lines],
    }

"""The table, column for column that of nccl-tests, and the same as data for --json. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.nccl_tests.plan import Case, bandwidths

_PLACES = ("out_of_place", "in_place")


@dataclass(frozen=True, slots=True)
class Measured:
    """One placement of a line: seconds an iteration, mean over the ranks, and wrong elements of all ranks together."""

    seconds: float
    slowest_seconds: float
    wrong: int | None


@dataclass(frozen=True, slots=True)
class Line:
    case: Case
    num_ranks: int
    out_of_place: Measured
    in_place: Measured

    def bus_bandwidths(self) -> tuple[float, float]:
        return (
            bandwidths(self.case, self.num_ranks, self.out_of_place.seconds)[1],
            bandwidths(self.case, self.num_ranks, self.in_place.seconds)[1],
        )

    @property
    def wrong(self) -> int:
        return (self.out_of_place.wrong or 0) + (self.in_place.wrong or 0)


def header() -> list[str]:
    left = f"# {'size':>10}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}"
    units = f"# {'(B)':>10}  {'(elements)':>12}  {'':>8}  {'':>6}  {'':>6}"
    place = f"  {'time':>8}  {'algbw':>7}  {'busbw':>7}  {'#wrong':>6}"
    place_units = f"  {'(us)':>8}  {'(GB/s)':>7}  {'(GB/s)':>7}  {'':>6}"
    width = len(place) - 2
    above = "#".ljust(len(left)) + "".join(f"  {name:>{width}}" for name in ("out-of-place", "in-place"))
    return [above, left + place * 2, (units + place_units * 2).rstrip()]


def row(line: Line) -> str:
    case = line.case
    left = f"{line.case.size_bytes(line.num_ranks):>12}  {case.count:>12}  {case.dtype:>8}  {case.redop:>6}  {case.root:>6}"
    return left + "".join(
        _place(case, line.num_ranks, measured) for measured in (line.out_of_place, line.in_place)
    )


def _place(case: Case, num_ranks: int, measured: Measured) -> str:
    microseconds = measured.seconds * 1e6
    decimals = 0 if microseconds >= 10_000 else 1 if microseconds >= 100 else 2
    algorithm, bus = bandwidths(case, num_ranks, measured.seconds)
    wrong = "N/A" if measured.wrong is None else str(measured.wrong)
    return f"  {microseconds:>8.{decimals}f}  {algorithm:>7.2f}  {bus:>7.2f}  {wrong:>6}"


def average_bus_bandwidth(lines: Sequence[Line]) -> float:
    """GB/s over all lines, both placements."""
    values = [value for line in lines for value in line.bus_bandwidths()]
    return sum(values) / len(values) if values else 0.0


def footer(lines: Sequence[Line]) -> list[str]:
    wrong = sum(line.wrong for line in lines)
    checked = any(getattr(line, place).wrong is not None for line in lines for place in _PLACES)
    verdict = "FAILED" if wrong else "OK" if checked else "(nothing was checked)"
    return [
        f"# Out of bounds values : {wrong} {verdict}",
        f"# Avg bus bandwidth    : {average_bus_bandwidth(lines):g}",
    ]


def as_data(line: Line) -> dict[str, Any]:
    """A line for --json. Times in microseconds, bandwidths in GB/s."""
    case = line.case
    found: dict[str, Any] = {
        "operation": case.operation,
        "size_bytes": case.size_bytes(line.num_ranks),
        "count": case.count,
        "type": case.dtype,
        "redop": case.redop,
        "root": case.root,
    }
    for place in _PLACES:
        measured: Measured = getattr(line, place)
        algorithm, bus = bandwidths(case, line.num_ranks, measured.seconds)
        found[place] = {
            "time_us": measured.seconds * 1e6,
            "time_slowest_rank_us": measured.slowest_seconds * 1e6,
            "algbw_gb_s": algorithm,
            "busbw_gb_s": bus,
            "wrong": measured.wrong,
        }
    return found


def remarks(num_ranks: int, shared: Mapping[str, Sequence[int]], backend: str) -> list[str]:
    """What a reader must know before believing the bandwidths. `shared`: device -> the ranks on it."""
    found = []
    if backend == "gloo":
        found.append(
            "Backend gloo on CPUs: this shows that ranks meet and results are right; its speed says nothing of NCCL."
        )
    if num_ranks == 1:
        found.append("One rank only: nothing crosses a link. busbw is 0 by definition or without meaning.")
    for device, ranks in shared.items():
        names = ", ".join(str(rank) for rank in ranks)
        found.append(f"Ranks {names} share {device}: busbw is not that of a link.")
    return found

"""All rounds of all systems: who ran, with what figures, and who could not and why."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.compare.environments import PeerUnavailable
from bench.compare.server import running, shown
from bench.compare.systems import Launch, Place, launch
from bench.compare.weights import Weights
from bench.load import Target
from bench.prompts import Book
from bench.spread import interleaved
from bench.workloads import FULL, WORKLOADS, Figures, Scale
from cluster.valkey import free_port
from router.chat.tokenizer import TextTokenizer

_DEADLINE_S = 1800  # of one workload


@dataclass
class Record:
    """Of one system."""

    system: str
    version: str = ""
    command: str = ""
    start_s: list[float] = field(default_factory=list)
    figures: dict[str, list[Figures]] = field(default_factory=dict)  # by workload, one entry a run
    trouble: list[str] = field(default_factory=list)  # why a run or a workload has no figures


@dataclass(frozen=True)
class Campaign:
    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    runs: int
    scale: Scale
    peers_dir: Path
    out: Path
    serve_args: tuple[str, ...] = ()

    def install(self) -> dict[str, Record]:
        """Everything that is missing, before anything is measured."""
        records = {system: Record(system) for system in self.systems}
        weights = Weights.prepare(self.peers_dir)
        for system, record in records.items():
            self._launch(record, weights)
            print(f"{system}: {record.trouble[-1] if record.trouble else record.version}", flush=True)
        return records

    def measure(self, records: dict[str, Record]) -> None:
        """One server at a time. A system that fails once is not tried again: its row says why."""
        weights = Weights.prepare(self.peers_dir)
        book = Book(TextTokenizer(weights.model.path))
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        for number, system in interleaved(self.systems, self.runs):
            record = records[system]
            if record.trouble and not record.figures:
                continue
            found = self._launch(record, weights)
            if found is not None:
                self._run(record, *found, book, number)
                (self.out / "raw.json").write_text(
                    json.dumps([asdict(r) for r in records.values()], indent=1)
                )

    def _launch(self, record: Record, weights: Weights) -> tuple[Launch, int] | None:
        place = Place(self.peers_dir, weights, free_port(), free_port(), self.serve_args)
        try:
            found = launch(record.system, place)
        except PeerUnavailable as error:
            record.trouble.append(str(error))
            return None
        record.version, record.command = found.version, shown(found)
        return found, place.port

    def _run(self, record: Record, found: Launch, port: int, book: Book, number: int) -> None:
        print(f"round {number + 1} of {self.runs}: {record.system}\n    {record.command}", flush=True)
        log = self.out / "logs" / f"{record.system.replace(':', '-')}-{number + 1}.log"
        try:
            with running(found, port, book, log) as (target, started_s):
                record.start_s.append(started_s)
                for workload in self.workloads:
                    self._drive(record, workload, target, book, number)
        except PeerUnavailable as error:
            record.trouble.append(str(error))
            print(f"    not measured: {error}", flush=True)

    def _drive(self, record: Record, workload: str, target: Target, book: Book, number: int) -> None:
        began = time.perf_counter()
        try:
            driven = WORKLOADS[workload].drive(target, book, number, self.scale)
            figures = asyncio.run(asyncio.wait_for(driven, _DEADLINE_S))
        except (RuntimeError, TimeoutError) as error:
            why = f"{workload}: {error or f'not done after {_DEADLINE_S} s'}"
            record.trouble.append(why)
            print(f"    {why}", flush=True)
            return
        record.figures.setdefault(workload, []).append(figures)
        headline = WORKLOADS[workload].headline
        print(
            f"    {workload}: {headline} {figures[headline]:.4g}, errors {figures['errors']:.0f}, "
            f"took {time.perf_counter() - began:.0f} s",
            flush=True,
        )


def document(campaign: Campaign, records: dict[str, Record], machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": machine,
        "runs": campaign.runs,
        "scale": asdict(campaign.scale),
        "quick": campaign.scale != FULL,
        "workloads": {name: WORKLOADS[name].what for name in campaign.workloads},
        "systems": [asdict(record) for record in records.values()],
    }

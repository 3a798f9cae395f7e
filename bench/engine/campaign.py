"""All rounds of all configurations, interleaved, with the machine's floors probed before, between and after."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.engine.drive import BLOCK_SIZE, WARM_STEPS, Case, decode, fill_kv, prefill, running_engine
from bench.engine.host_profile import profile_host
from bench.engine.model_bytes import WeightFormat, Work, decode_work, prefill_work
from bench.floors import Floors
from bench.spread import interleaved
from workers.engine.engine import Engine
from workers.models.catalog import PreparedModel
from workers.models.checkpoint import read_json
from workers.models.errors import ModelError
from workers.models.gguf_blocks import GgufBlocks
from workers.models.spec import DecoderSpec


@dataclass
class Record:
    """Of one configuration."""

    configuration: str
    kernels: str = ""
    weight_format: str = ""
    kv_token_bytes: float = 0.0
    seconds: dict[str, list[float]] = field(
        default_factory=dict
    )  # by case: a step, or a whole prompt; one a run
    host: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True)
class Campaign:
    configurations: tuple[str, ...]
    cases: tuple[Case, ...]
    model: PreparedModel
    threads: int
    runs: int
    steps: int
    chunk: int
    memory_bytes: float  # for KV blocks
    profile_host: bool

    def measure(self) -> tuple[list[Record], Floors]:
        records = {name: Record(name) for name in self.configurations}
        floors = Floors(self.threads)
        floors.probe()
        for number, name in interleaved(self.configurations, self.runs):
            record = records[name]
            if record.trouble:
                continue
            print(f"round {number + 1} of {self.runs}: {name}", flush=True)
            try:
                self._round(record)
            except (ValueError, ModelError) as error:
                record.trouble = str(error)
                print(f"    not measured: {error}", flush=True)
            floors.probe()
        return list(records.values()), floors

    def _round(self, record: Record) -> None:
        with running_engine(record.configuration, self.model, self.threads, 1024, self.chunk) as small:
            self._describe(record, small)
        fitting = [case for case in self.cases if self._fits(record, case)]
        num_blocks = max(case.blocks(self.steps) for case in fitting)
        with running_engine(record.configuration, self.model, self.threads, num_blocks, self.chunk) as engine:
            fill_kv(engine)
            for case in fitting:
                self._case(record, engine, case)

    def _describe(self, record: Record, engine: Engine) -> None:
        record.kernels = str(getattr(engine.runner, "kernels", "torch"))
        record.kv_token_bytes = engine.layout.block_bytes / BLOCK_SIZE
        record.weight_format = weight_format(record.configuration, self.model, record.kernels)

    def _fits(self, record: Record, case: Case) -> bool:
        return case.blocks(self.steps) * BLOCK_SIZE * record.kv_token_bytes <= self.memory_bytes

    def _case(self, record: Record, engine: Engine, case: Case) -> None:
        def drive() -> float:
            if case.kind == "prefill":
                return prefill(engine, case)
            return statistics.median(decode(engine, case, self.steps))

        seconds = drive()
        record.seconds.setdefault(key(case), []).append(seconds)
        print(f"    {key(case)}: {seconds * 1e3:.2f} ms", flush=True)
        if self.profile_host and case.kind == "decode":
            taken = self.steps + WARM_STEPS
            found = profile_host(engine, drive, taken, case.batch)
            record.host.append({"case": key(case)} | found)


def key(case: Case) -> str:
    return f"{case.kind}, batch {case.batch}, context {case.context}"


def weight_format(configuration: str, model: PreparedModel, kernels: str) -> WeightFormat:
    """`stored` is what the checkpoint stores where native kernels run, bfloat16 elsewhere."""
    name = configuration.partition("+")[0]
    if name == "stored":
        stored = GgufBlocks.are_in(model.path) and kernels != "torch"
        return "int4" if stored else "bf16"
    formats: dict[str, WeightFormat] = {
        "default": "bf16",
        "fp32": "fp32",
        "bf16": "bf16",
        "int8": "int8",
        "int4": "int4",
    }
    return formats[name]


def work_of(campaign: Campaign, record: Record, case: Case) -> Work:
    spec = DecoderSpec.from_config(read_json(campaign.model.path / "config.json"))
    chosen: Any = record.weight_format
    if case.kind == "prefill":
        return prefill_work(spec, chosen, record.kv_token_bytes, case.context, campaign.chunk)
    return decode_work(spec, chosen, record.kv_token_bytes, case.batch, case.context)


def document(
    campaign: Campaign, records: list[Record], floors: Floors, machine: dict[str, Any]
) -> dict[str, Any]:
    """Everything that was measured and what it is held against, ready for JSON."""
    rows = []
    for case in campaign.cases:
        for record in records:
            row: dict[str, Any] = asdict(case) | {"configuration": record.configuration}
            taken = record.seconds.get(key(case))
            if taken is None:
                rows.append(row | {"skipped": record.trouble or "its KV cache does not fit the memory"})
                continue
            work = work_of(campaign, record, case)
            tokens = case.context if case.kind == "prefill" else case.batch
            rows.append(
                row
                | {
                    "seconds": taken,
                    "tokens": tokens,
                    "bytes": work.bytes,
                    "flops": work.flops,
                    "memory_floor_s": work.memory_floor_s(floors.bytes_per_s),
                    "arithmetic_floor_s": work.arithmetic_floor_s(floors.flops_per_s),
                    "floor_s": work.floor_s(floors.bytes_per_s, floors.flops_per_s),
                }
            )
    return {
        "machine": machine,
        "model": campaign.model.served_name,
        "threads": campaign.threads,
        "runs": campaign.runs,
        "steps": campaign.steps,
        "chunk": campaign.chunk,
        "floors": asdict(floors),
        "configurations": [asdict(record) for record in records],
        "rows": rows,
    }

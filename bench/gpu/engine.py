"""An engine with a decoder of 8 billion parameters on this GPU, beside what the GPU could do at most.

python -m bench.gpu.engine [--quantization fp8] [--parts decode,prefill,throughput] [--set graphs=none]
    [--model DIRECTORY] [--json FILE]

decode: a step of 1 to 256 sequences with 1,024 tokens of context each, beside the time to read weights and KV once at
the copy bandwidth of the same run, and the CPU's time: a step's less what its thread waited for the GPU. prefill: a
prompt of 8,192 tokens, as a share of the matmul rate. throughput: 256 requests at a time through to their ends. profile:
the kernels of decode steps and of a prompt that take the most time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.engine.drive import Case, decode, fill_kv, prefill
from bench.engine.model_bytes import WeightFormat, Work, decode_work, prefill_work
from bench.gpu import model, workload
from bench.gpu.rows import Rows, parser
from bench.gpu.timing import Timer
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.checkpoint import read_json
from workers.models.spec import DecoderSpec
from workers.protocol.messages import Sampling

PARTS = ("decode", "prefill", "throughput", "profile")
_FORMATS: dict[str, WeightFormat] = {"none": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
_BLOCK = 16
_PROFILED = 12  # kernels
_SPARE_BYTES = 12 << 30  # activations, graphs, libraries, and what else holds memory


def settings(rehearse: bool, **more: Any) -> EngineConfig:
    where: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    if rehearse:
        where = {"device": "cpu", "dtype": "float32", "kernels": "torch"}
    return EngineConfig(**{**where, "block_size": _BLOCK, "prefix_caching": False, **more})


class Bench:
    def __init__(
        self, path: Path, rows: Rows, quantization: str, rehearse: bool, changes: dict[str, Any]
    ) -> None:
        self.tiny, self.rows = rehearse, rows
        self.batches = (1, 2) if rehearse else (1, 16, 64, 256)
        self.context, self.prompt = (24, 40) if rehearse else (1024, 8192)
        self.load = workload.TINY if rehearse else workload.FULL
        self.steps = 4 if rehearse else 40
        self.spec = DecoderSpec.from_config(read_json(path / "config.json"))
        self.format: WeightFormat = "fp32" if rehearse else _FORMATS[quantization]
        self.ceilings = Timer(torch.device("cpu" if rehearse else "cuda")).ceilings()
        tokens = max(
            self.load.most_tokens, max(self.batches) * (self.context + 2 * self.steps), 2 * self.prompt
        )
        began = time.perf_counter()
        self.engine = Engine(
            settings(
                rehearse,
                **{
                    "quantization": quantization,
                    "num_blocks": _blocks(self.spec, tokens, rehearse),
                    "max_num_seqs": max(self.batches[-1], self.load.concurrency),
                    "max_num_batched_tokens": self.prompt,
                    **changes,
                },
            ),
            model.prepared(path),
        )
        rows.note(
            ceilings={"copy_bytes_per_s": self.ceilings.copy, "matmul_flops_per_s": self.ceilings.matmul},
            quantization=quantization,
            start_s=time.perf_counter() - began,
            kernels=self.engine.runner.kernels,
            changes=json.dumps(changes),
        )
        captured = self.engine.runner.captured
        if captured is not None:
            rows.note(
                graphs=len(captured.graphs), capture_s=captured.seconds, graphs_bytes=captured.num_bytes
            )
        fill_kv(self.engine)

    @property
    def kv_token_bytes(self) -> float:
        return self.engine.layout.block_bytes / self.engine.layout.block_size

    def decode(self) -> None:
        for batch in self.batches:
            with self.rows.part(f"decode, batch {batch}") as time_left:
                if time_left:
                    self._decode(batch)

    def _decode(self, batch: int) -> None:
        case = Case("decode", batch, self.context)
        decode(self.engine, case, 4)  # compiles, captures
        with waits_for_gpu() as waits:
            waited: list[float] = []  # in each step

            def step() -> None:
                before = len(waits)
                self.engine.step()
                waited.append(sum(waits[before:]))

            times = decode(self.engine, case, self.steps, step)
        work = decode_work(self.spec, self.format, self.kv_token_bytes, batch, self.context + self.steps // 2)
        # Their mean and not the median: with a step begun before the last has ended, times of single calls mean little.
        step_s = statistics.mean(times)
        self.rows.add(
            case="decode step",
            batch=batch,
            context=self.context,
            ms=None if self.tiny else step_s * 1e3,
            tokens_per_s=None if self.tiny else batch / step_s,
            **self._beside_floor(work, step_s),
            cpu_ms=None if self.tiny else (step_s - statistics.mean(waited[-len(times) :])) * 1e3,
        )

    def _beside_floor(self, work: Work, seconds: float) -> dict[str, float | None]:
        if self.ceilings.copy is None:
            return {"floor_ms": None, "times_floor": None}
        floor_s = work.memory_floor_s(self.ceilings.copy)
        return {"floor_ms": floor_s * 1e3, "times_floor": seconds / floor_s}

    def prefill(self) -> None:
        case = Case("prefill", 1, self.prompt)
        with self.rows.part("prefill") as time_left:
            if not time_left:
                return
            prefill(self.engine, case)
            seconds = statistics.median(prefill(self.engine, case) for _ in range(1 if self.tiny else 5))
            work = prefill_work(self.spec, self.format, self.kv_token_bytes, self.prompt, self.prompt)
            peak = self.ceilings.matmul
            self.rows.add(
                case="prefill",
                context=self.prompt,
                ms=None if self.tiny else seconds * 1e3,
                tokens_per_s=None if self.tiny else self.prompt / seconds,
                share_of_matmul=None if peak is None else work.flops / seconds / peak,
            )

    def throughput(self) -> None:
        with self.rows.part("throughput") as time_left:
            if not time_left:
                return
            asks = self.load.asks(self.spec.vocab_size)
            self._generate(self.load.asks(self.spec.vocab_size, seed=1)[: self.load.concurrency // 2], 8)
            began = time.perf_counter()
            tokens = self._generate(asks, None)
            seconds = time.perf_counter() - began
            assert tokens == sum(ask.max_tokens for ask in asks), "an answer was cut short"
            self.rows.add(
                case="throughput",
                batch=self.load.concurrency,
                requests=len(asks),
                output_tokens=tokens,
                seconds=None if self.tiny else seconds,
                tokens_per_s=None if self.tiny else tokens / seconds,
            )

    def profile(self) -> None:
        decodes = [Case("decode", batch, self.context) for batch in self.batches if batch in (1, 2, 64)]
        for case in [*decodes, Case("prefill", 1, self.prompt)]:
            with self.rows.part(f"profile of {case}") as time_left:
                if time_left:
                    self._profile(case)

    def _profile(self, case: Case) -> None:
        seen = ProfilerActivity.CPU if self.tiny else ProfilerActivity.CUDA
        with profile(activities=[seen]) as found:
            if case.kind == "decode":
                decode(self.engine, case, 8)
            else:
                prefill(self.engine, case)
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        whole = sum(event.self_device_time_total for event in events)
        for event in events[:_PROFILED]:
            spent = event.self_device_time_total
            self.rows.add(
                case=f"kernel of {case.kind}",
                batch=case.batch,
                context=case.context,
                kernel=event.key[:90],
                calls=event.count,
                us_each=None if self.tiny else spent / event.count,
                share_of_gpu=None if self.tiny else spent / whole,
            )

    def _generate(self, asks: list[workload.Ask], most: int | None) -> int:
        sampling = [
            Sampling(
                max_tokens=min(most or ask.max_tokens, ask.max_tokens),
                seed=0,
                temperature=0.0,
                ignore_eos=True,
            )
            for ask in asks
        ]
        return sum(len(done.tokens) for done in self.engine.generate([ask.prompt for ask in asks], sampling))


@contextmanager
def waits_for_gpu() -> Iterator[list[float]]:
    """Seconds of every wait for an event, which is how a runner waits for a step."""
    real, found = torch.cuda.Event.synchronize, []

    def timed(event: torch.cuda.Event) -> None:
        began = time.perf_counter()
        real(event)
        found.append(time.perf_counter() - began)

    torch.cuda.Event.synchronize = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.cuda.Event.synchronize = real  # type: ignore[method-assign]


def _blocks(spec: DecoderSpec, tokens: int, rehearse: bool) -> int:
    """For so many tokens, or as many as this GPU has room for."""
    wanted = tokens // _BLOCK + 64
    if rehearse:
        return wanted
    free, _ = torch.cuda.mem_get_info()
    block_bytes = spec.num_layers * 2 * spec.num_kv_heads * _BLOCK * spec.head_dim * 2
    weights = model.model_bytes(model.LLAMA_8B)
    return max(64, min(wanted, (free - weights - _SPARE_BYTES) // block_bytes))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    given = parser("bench.gpu.engine", __doc__)
    given.add_argument("--quantization", choices=list(_FORMATS), default="none")
    given.add_argument("--parts", default=",".join(PARTS), help="those to measure, with commas between")
    given.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="of EngineConfig")
    options = given.parse_args()
    changes = {name: _value(text) for name, _, text in (one.partition("=") for one in options.set)}
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        given.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    rows = Rows(options.json, options.seconds)
    if not options.rehearse and not torch.cuda.is_available():
        rows.note(skipped="torch sees no GPU")
    else:
        with model.model_at(options.model, model.TINY if options.rehearse else model.LLAMA_8B) as path:
            # Of the formats some need a GPU, and a rehearsal is of the program only.
            quantization = "none" if options.rehearse else options.quantization
            bench = Bench(path, rows, quantization, options.rehearse, changes)
            for part in parts:
                getattr(bench, part)()
    rows.end()


if __name__ == "__main__":
    main()

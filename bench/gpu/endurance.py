"""Memory over many requests, and what happens when there is too little of it.

python -m bench.gpu.endurance [--json FILE]

growth: 10,000 short requests, a fifth of them cancelled, 256 at a time; what torch, the GPU and this process hold after
some of them. start: a KV cache takes what there is room for, one larger than the GPU is refused with the sizes. run:
prompts are answered while something else has taken nearly all memory.
"""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu import model
from bench.gpu.engine import settings
from bench.gpu.rows import Rows, parser
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.protocol.messages import Sampling, Work

# Few layers as wide as those of 8B: a step's activations are as large, and steps are short.
FEW_LAYERS = {**model.LLAMA_8B, "num_hidden_layers": 4}
_AT_A_TIME = 256
_LEFT_BYTES = 512 << 20  # of GPU memory, in the part `run`


class Churn:
    """Requests that come, go and are cancelled."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._rng, self._count = engine, random.Random(0), 0

    def run(self, requests: int) -> None:
        engine, rng, last = self._engine, self._rng, self._count + requests
        while self._count < last or engine.scheduler.has_work:
            with engine.lock:
                while self._count < last and len(engine.scheduler.requests) < _AT_A_TIME:
                    engine.scheduler.add(self._request())
                    if rng.random() < 0.2:
                        engine.scheduler.cancel(rng.choice(list(engine.scheduler.requests)))
            engine.step()
        with engine.lock:
            engine.scheduler.check()
            assert engine.pool.num_referenced == 0, f"{engine.pool.num_referenced} blocks are still held"

    def _request(self) -> Request:
        self._count += 1
        prompt = self._rng.choices(range(self._engine.vocab_size), k=self._rng.randint(8, 64))
        sampling = Sampling(max_tokens=self._rng.randint(1, 8), seed=0, temperature=0.0, ignore_eos=True)
        return Request(Work(request_id=str(self._count), prompt=prompt, sampling=sampling))


def growth(rows: Rows, path: Path, rehearse: bool) -> None:
    requests = 40 if rehearse else 10_000
    engine = Engine(
        settings(rehearse, num_blocks=2048, max_num_seqs=_AT_A_TIME, max_num_batched_tokens=4096),
        model.prepared(path),
    )
    churn, tenth = Churn(engine), requests // 10
    for done in range(tenth, requests + 1, tenth):
        churn.run(tenth)
        if done in (tenth, 2 * tenth, 5 * tenth, requests):
            rows.add(case="growth", requests=done, **_held(rehearse))


def _held(rehearse: bool) -> dict[str, int]:
    """Bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"process_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    if not rehearse:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found |= {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
            "gpu_bytes": total - free,
        }
    return found


def start(rows: Rows, path: Path) -> None:
    began = time.monotonic()
    engine = Engine(
        settings(False, max_num_seqs=_AT_A_TIME, max_num_batched_tokens=8192), model.prepared(path)
    )
    free, total = torch.cuda.mem_get_info()
    held = engine.num_blocks * engine.layout.block_bytes
    taken = {"cache_bytes": held, "gpu_bytes": total - free, "total_bytes": total}
    rows.add(case="a KV cache as large as there is room", seconds=time.monotonic() - began, **taken)
    too_many = 2 * total // engine.layout.block_bytes
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    for case, change in (
        ("a KV cache larger than the GPU", {"num_blocks": too_many}),
        ("a share of the GPU that is too small", {"gpu_memory_utilization": 0.01}),
    ):
        try:
            Engine(settings(False, **change), model.prepared(path))
        except ValueError as error:
            rows.add(case=case, message=str(error)[:600])
        else:
            rows.add(case=case, failed="it was not refused")
        gc.collect()
        torch.cuda.empty_cache()


def run(rows: Rows, path: Path) -> None:
    engine = Engine(
        settings(False, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=16384), model.prepared(path)
    )
    rng = random.Random(0)
    prompts = [rng.choices(range(engine.vocab_size), k=4096) for _ in range(8)]
    sampling = Sampling(max_tokens=8, seed=0, temperature=0.0, ignore_eos=True)
    before = [done.tokens for done in engine.generate(prompts, sampling)]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    balloon = torch.empty(free - _LEFT_BYTES, dtype=torch.uint8, device="cuda")
    under = [done.tokens for done in engine.generate(prompts, sampling)]
    del balloon
    torch.cuda.empty_cache()
    after = [done.tokens for done in engine.generate(prompts, sampling)]
    assert [len(tokens) for tokens in under] == [sampling.max_tokens] * len(prompts), (
        "an answer was cut short"
    )
    rows.add(
        case="no memory left at run time",
        answered=len(under),
        preemptions=engine.load().preemptions,
        same_tokens=_same(under, before),
        same_tokens_afterwards=_same(after, before),
    )


def _same(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Share of the answers; other steps round otherwise in bfloat16, so that not all need be."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def main() -> None:
    options = parser("bench.gpu.endurance", __doc__).parse_args()
    rows = Rows(options.json, options.seconds)
    if not options.rehearse and not torch.cuda.is_available():
        rows.note(skipped="torch sees no GPU")
        rows.end()
        return
    with model.model_at(options.model, model.TINY if options.rehearse else FEW_LAYERS) as path:
        parts: list[tuple[str, Any]] = [("growth", lambda: growth(rows, path, options.rehearse))]
        if not options.rehearse:  # memory of a CPU is another matter
            parts += [("start", lambda: start(rows, path)), ("run", lambda: run(rows, path))]
        for name, part in parts:
            with rows.part(name) as time_left:
                if time_left:
                    part()
            gc.collect()
            if not options.rehearse:
                torch.cuda.empty_cache()
    rows.end()


if __name__ == "__main__":
    main()

"""A prefill worker of two ranks, as a process: one engine computes, each rank's cache gets its half of the heads.

Reads lines of JSON from stdin: {"prompt": [...], "ticket": {...}, "road": "shm"}; answers {"code": null | "..."}.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from workers.config import EngineConfig, TransferConfig
from workers.engine.engine import Engine
from workers.engine.plan import StepResult
from workers.engine.request import Request, State
from workers.models.catalog import prepare_model
from workers.protocol.messages import KvLayout, Sampling, Ticket, Work
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import HostBlocks
from workers.transfer.handoff import Handoffs
from workers.transfer.shards import heads_of

SECRET = b"a secret of the tests"


class RankCaches:
    """The caches that the ranks of an engine would have."""

    def __init__(self, layout: KvLayout, num_blocks: int, ranks: int) -> None:
        self.memories: list[Any] = []
        self._parts: list[tuple[range, np.ndarray]] = []
        for rank in range(ranks):
            heads = heads_of(rank, ranks, layout.num_kv_heads)
            shape = (num_blocks, layout.num_layers, 2, len(heads), layout.block_size, layout.head_dim)
            pages = SharedPages(4 * int(np.prod(shape)))
            self._parts.append((heads, pages.array.view(np.float32).reshape(shape)))
            self.memories.append(HostBlocks(pages.array, layout, num_heads=len(heads), shared=pages))

    def scatter(self, cache: torch.Tensor, blocks: list[int]) -> None:
        for heads, part in self._parts:
            part[blocks] = cache[blocks, :, :, heads.start : heads.stop].numpy()

    def gather(self, cache: torch.Tensor, blocks: list[int]) -> None:
        for heads, part in self._parts:
            cache[blocks, :, :, heads.start : heads.stop] = torch.from_numpy(part[blocks])


def cache_of(engine: Engine) -> torch.Tensor:
    """[block, layer, k|v, head, token, head_dim]"""
    layout = engine.layout
    shape = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return engine.runner.kv_cache.view(-1).view(torch.float32).view(-1, *shape)


def open_engine(model: Path) -> Engine:
    torch.set_num_threads(1)
    config = EngineConfig(dtype="float32", num_blocks=256, max_num_batched_tokens=96, num_threads=1)
    return Engine(config, prepare_model(str(model)))


def main(model: Path) -> None:
    engine = open_engine(model)
    caches = RankCaches(engine.layout, engine.num_blocks, 2)
    ended = threading.Event()
    codes: list[str | None] = []

    def on_end(request: Request, handoff: Any, code: str | None, reason: str) -> None:
        codes.append(code and f"{code}: {reason}")
        ended.set()

    roads = {}
    for road in ("shm", "tcp"):
        config = TransferConfig(channels=[road], ring_memory=64 * 1024)  # type: ignore[list-item,arg-type]
        roads[road] = Handoffs(engine, caches.memories, config, worker_id="p", secret=SECRET, on_end=on_end)
        roads[road].start()
    print("ready", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        handoffs = roads[message["road"]]
        work = Work("r", message["prompt"], Sampling(max_tokens=8, seed=0, temperature=0.0))
        request = Request(work, prefill_only=True)

        def deliver(result: StepResult, handoffs: Handoffs = handoffs) -> None:
            tokens = {new.request.request_id: new for new in result.tokens}
            for request in result.progressed:
                caches.scatter(cache_of(engine), request.block_table.tolist())
                handoffs.advance(request, tokens.get(request.request_id))
                if request.state is State.PREFILLED:
                    engine.scheduler.cancel(request.request_id)

        ended.clear()
        with engine.lock:
            handoffs.open(request, msgspec.convert(message["ticket"], Ticket))
            engine.scheduler.add(request)
        while engine.scheduler.has_work:
            engine.step(deliver)
        ended.wait(20)
        print(json.dumps({"code": codes.pop() if codes else "nothing came"}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A thousand requests, a third of them cancelled at random stages: at rest nothing is held anywhere."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from tests.e2e.local_cluster import LocalCluster
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling

REQUESTS = 1000


def reference(model: Path, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    torch.set_num_threads(1)
    engine = Engine(EngineConfig(dtype="float32", num_blocks=2048, num_threads=1), prepare_model(str(model)))
    sampling = [Sampling(max_tokens=n, seed=i, ignore_eos=True) for i, n in enumerate(lengths)]
    return [completion.tokens for completion in engine.generate(prompts, sampling)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("channel", "tiers"), [("shm", False), ("tcp", False), ("shm", True)])
async def test_a_third_of_the_requests_is_cancelled(
    tiny_model: Path, tmp_path: Path, channel: str, tiers: bool
) -> None:
    rng = random.Random(11)
    stems = [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 200))] for _ in range(12)]
    prompts = [
        rng.choice(stems)[: rng.randrange(1, 200)]
        + [rng.randrange(3, 250) for _ in range(rng.randrange(0, 60))]
        for _ in range(REQUESTS)
    ]
    prompts = [prompt or [5] for prompt in prompts]
    lengths = [rng.randrange(1, 24) for _ in range(REQUESTS)]
    expected = reference(tiny_model, prompts, lengths)
    below = {"host_cache_memory": "4MB", "disk_cache_memory": "40MB", "disk_cache_dir": str(tmp_path)}
    # As a part of how long requests lately took, so that they leave at all stages however fast the machine is.
    leaves_at = [rng.random() if rng.random() < 1 / 3 else None for _ in range(REQUESTS)]
    took_s: deque[float] = deque([0.04], maxlen=50)

    async with LocalCluster(
        tiny_model,
        prefill=2,
        decode=2,
        engine={"max_num_batched_tokens": 128}
        | ({"num_blocks": 60} | below if tiers else {"num_blocks": 150}),
        transfer={"channels": [channel]},
        router={"admission": {"max_queue": REQUESTS, "queue_timeout_s": 120}},
    ) as cluster:
        gate = asyncio.Semaphore(60)
        outcomes = {"whole": 0, "left": 0}

        async def one(i: int) -> None:
            async with gate:
                asking = asyncio.ensure_future(
                    cluster.ask(
                        f"r{i}", prompts[i], max_tokens=lengths[i], seed=i, temperature=1.0, ignore_eos=True
                    )
                )
                began, part = time.monotonic(), leaves_at[i]
                if part is not None:
                    await asyncio.wait([asking], timeout=part * statistics.median(took_s))
                    if not asking.done():
                        asking.cancel()
                        await asyncio.wait([asking])
                        outcomes["left"] += 1
                        return
                answer = await asking
                took_s.append(time.monotonic() - began)
                assert answer.tokens == expected[i], f"request {i}"
                outcomes["whole"] += 1

        await asyncio.gather(*(one(i) for i in range(REQUESTS)))
        await cluster.assert_at_rest()
        status = await cluster.status()
    assert outcomes["whole"] + outcomes["left"] == REQUESTS
    assert outcomes["left"] > REQUESTS / 20, "of a third"
    assert all(reply.load.output_tokens > 0 for reply in status.values())
    assert sum(reply.load.prefix_hit_tokens for reply in status.values()) > 0

"""A cluster whose device caches hold a fraction of what is asked: host memory and disk give it back, over a kill -9."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.local_cluster import LocalCluster
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling
from workers.protocol.tiers import DISK, HOST


def conversations(count: int, turns: int) -> list[list[int]]:
    """Prompts in the order of asking; each goes on from the one `count` before it."""
    rng = random.Random(5)
    heads = [[rng.randrange(3, 250) for _ in range(60)] for _ in range(count)]
    prompts = []
    for _ in range(turns):
        for number, head in enumerate(heads):
            heads[number] = head + [rng.randrange(3, 250) for _ in range(40)]
            prompts.append(heads[number])
    return prompts


async def test_turns_of_conversations_come_back_from_the_tiers(tiny_model: Path, tmp_path: Path) -> None:
    prompts = conversations(8, 5)
    sampling = Sampling(max_tokens=8, seed=0, temperature=0.0, ignore_eos=True)
    config = EngineConfig(dtype="float32", num_blocks=1024, num_threads=1)
    engine = Engine(config, prepare_model(str(tiny_model)))
    expected = [completion.tokens for completion in engine.generate(prompts, sampling)]
    size = engine.layout.block_bytes
    settings = {
        "num_blocks": 40,
        "host_cache_memory": 60 * size,
        "disk_cache_memory": 400 * (size + 100),
        "disk_cache_dir": str(tmp_path),
    }
    async with LocalCluster(tiny_model, engine=settings) as cluster:
        index = cluster.dispatcher.index

        async def ask(name: str, numbers: range) -> None:
            for number in numbers:
                answer = await cluster.ask(f"{name}{number}", prompts[number], max_tokens=8, ignore_eos=True)
                assert answer.tokens == expected[number], (name, number)

        await ask("a", range(len(prompts)))
        await cluster.assert_at_rest()
        # How much came back depends on this machine: what would take longer to load than to compute is computed.
        loaded = [
            sample
            for text in await cluster.dispatcher.worker_metrics()
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == "headrace_prefix_load_tokens_total"
        ]
        assert {sample.labels["source"] for sample in loaded if sample.value > 0} >= {HOST, DISK}
        assert index.hashes("decode-0", HOST)
        on_disk = index.hashes("decode-0", DISK)
        assert on_disk

        cluster.kill("decode-0")
        cluster.launch("decode-0")
        await cluster.wait_for_workers()
        end = time.monotonic() + 20
        while not index.hashes("decode-0", DISK) >= on_disk:
            assert time.monotonic() < end, "the next life does not tell what the disk holds"
            await asyncio.sleep(0.05)
        await ask("b", range(len(prompts) - 8, len(prompts)))
        await cluster.assert_at_rest()
    assert set(os.listdir(tmp_path)) == {"decode-0", "prefill-0"}

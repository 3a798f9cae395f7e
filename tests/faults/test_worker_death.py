"""Workers die or stop under running streams: the client sees one unbroken stream with the tokens it would have had."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.e2e.local_cluster import Answer, LocalCluster
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

TOKENS = 250


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("tiny"), {"max_position_embeddings": 2048}, seed=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(80, 300))] for _ in range(24)]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    torch.set_num_threads(1)
    engine = Engine(EngineConfig(dtype="float32", num_blocks=2048, num_threads=1), prepare_model(str(model)))
    sampling = [Sampling(max_tokens=TOKENS, seed=i, ignore_eos=True) for i in range(len(prompts))]
    return [completion.tokens for completion in engine.generate(prompts, sampling)]


async def ask_all(cluster: LocalCluster, prompts: list[list[int]]) -> list[Answer]:
    async def one(i: int, prompt: list[int]) -> Answer:
        await asyncio.sleep(0.02 * i)  # so that at any moment some read their prompts and some stream
        return await cluster.ask(f"r{i}", prompt, max_tokens=TOKENS, seed=i, temperature=1.0, ignore_eos=True)

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("victims", "how"),
    [
        (["decode-0"], signal.SIGKILL),
        (["prefill-0"], signal.SIGKILL),
        (["decode-1"], signal.SIGSTOP),
        (["decode-0", "prefill-1"], signal.SIGKILL),
    ],
    ids=["decode killed", "prefill killed", "decode stopped", "one of each killed"],
)
async def test_streams_survive(
    model: Path, prompts: list[list[int]], expected: list[list[int]], victims: list[str], how: signal.Signals
) -> None:
    async with LocalCluster(
        model, prefill=2, decode=2, router={"timeout_s": 1.0, "heartbeat_s": 0.2}, transfer={"lease_s": 3.0}
    ) as cluster:
        asking = asyncio.ensure_future(ask_all(cluster, prompts))
        await cluster.wait_for_tokens(200)
        assert not asking.done(), "too late to disturb anything"
        for victim in victims:
            cluster.kill(victim, how)
        if how is signal.SIGKILL:
            await asyncio.sleep(1.0)
            for victim in victims:
                cluster.launch(victim)
        answers = await asking
        assert [a.tokens for a in answers] == expected
        if how is signal.SIGSTOP:
            for victim in victims:
                cluster.kill(victim, signal.SIGCONT)
        await cluster.wait_for_workers()
        await cluster.assert_at_rest()


@pytest.mark.timeout(120)
async def test_the_only_decode_worker_dies_and_comes_back(
    model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with LocalCluster(model, prefill=1, decode=1) as cluster:
        asking = asyncio.ensure_future(ask_all(cluster, prompts[:8]))
        await cluster.wait_for_tokens(100)
        cluster.kill("decode-0")
        assert not asking.done(), "too late to disturb anything"
        cluster.launch("decode-0")
        answers = await asking
        assert [a.tokens for a in answers] == expected[:8]
        await cluster.assert_at_rest()


@pytest.mark.timeout(120)
async def test_without_prefill_workers_the_decode_worker_does_it_all(
    model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with LocalCluster(model, prefill=1, decode=1) as cluster:
        cluster.kill("prefill-0")
        answers = await ask_all(cluster, prompts[:6])
        assert [a.tokens for a in answers] == expected[:6]
        cluster.launch("prefill-0")
        await cluster.wait_for_workers()
        await cluster.assert_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_death_every_two_seconds(model: Path) -> None:
    """300 sampled streams, again and again, while a random worker is killed every two seconds: each is whole."""
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 400))] for _ in range(300)]
    torch.set_num_threads(1)
    engine = Engine(EngineConfig(dtype="float32", num_blocks=4096, num_threads=1), prepare_model(str(model)))
    sampling = [Sampling(max_tokens=TOKENS, seed=i, ignore_eos=True) for i in range(len(prompts))]
    expected = [completion.tokens for completion in engine.generate(prompts, sampling)]
    async with LocalCluster(
        model,
        prefill=2,
        decode=2,
        router={
            "timeout_s": 1.0,
            "heartbeat_s": 0.2,
            "admission": {"max_attempts": 40, "queue_timeout_s": 300},
        },
        transfer={"lease_s": 3.0},
    ) as cluster:
        gate = asyncio.Semaphore(24)
        deaths = 0

        async def one(lap: int, i: int) -> Answer:
            async with gate:
                return await cluster.ask(
                    f"r{lap}-{i}", prompts[i], max_tokens=TOKENS, seed=i, temperature=1.0, ignore_eos=True
                )

        async def reap() -> None:
            nonlocal deaths
            while True:
                await asyncio.sleep(2.0)
                victim = rng.choice(sorted(cluster.processes))
                cluster.kill(victim)
                cluster.launch(victim)
                deaths += 1

        reaper = asyncio.create_task(reap())
        lap = 0
        while deaths < 6:
            answers = await asyncio.gather(*(one(lap, i) for i in range(len(prompts))))
            assert [a.tokens for a in answers] == expected
            lap += 1
        reaper.cancel()
        await cluster.wait_for_workers()
        await cluster.assert_at_rest()

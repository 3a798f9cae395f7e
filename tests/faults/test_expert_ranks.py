"""A rank of an expert-parallel group is killed under running streams: nobody sees it."""

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

TOKENS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model_type": "mixtral", "max_position_embeddings": 2048}
    return write_random_model(tmp_path_factory.mktemp("moe"), config, seed=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 150))] for _ in range(12)]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    torch.set_num_threads(1)
    config = EngineConfig(dtype="float32", num_blocks=512, num_threads=1)
    engine = Engine(config, prepare_model(str(model)))
    return [answer.tokens for answer in engine.generate(prompts, [sampling(i) for i in range(len(prompts))])]


def sampling(seed: int) -> Sampling:
    return Sampling(max_tokens=TOKENS, seed=seed, temperature=0.0, ignore_eos=True)


async def ask_all(cluster: LocalCluster, prompts: list[list[int]]) -> list[Answer]:
    async def one(i: int) -> Answer:
        await asyncio.sleep(0.02 * i)
        return await cluster.ask(f"r{i}", prompts[i], max_tokens=TOKENS, seed=i, ignore_eos=True)

    return list(await asyncio.gather(*(one(i) for i in range(len(prompts)))))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "victims",
    [["decode-0"], pytest.param(["decode-1", "prefill-1"], marks=pytest.mark.slow)],
    ids=["leader", "followers"],
)
async def test_the_others_go_on_and_it_comes_back(
    model: Path, prompts: list[list[int]], expected: list[list[int]], victims: list[str]
) -> None:
    """Its streams are moved by the router, those of the others are not even interrupted."""
    async with LocalCluster(
        model,
        prefill=2,
        decode=2,
        expert_parallel=2,
        router={"timeout_s": 1.0, "heartbeat_s": 0.2},
        transfer={"lease_s": 3.0},
    ) as cluster:
        asking = asyncio.ensure_future(ask_all(cluster, prompts))
        await cluster.wait_for_tokens(60)
        assert not asking.done(), "too late to disturb anything"
        for victim in victims:
            cluster.kill(victim)
        answers = await asking
        assert [answer.tokens for answer in answers] == expected
        for victim in victims:
            cluster.launch(victim)
        await cluster.wait_for_workers()
        answers = await ask_all(cluster, prompts)
        assert [answer.tokens for answer in answers] == expected
        await cluster.assert_at_rest()
        survivor = "decode-1" if "decode-0" in victims else "decode-0"
        assert "view 2 of the expert group: ranks [" in cluster.log(survivor)
        assert "view 3 of the expert group: ranks [0, 1]" in cluster.log(survivor)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_too_little_memory_for_those_who_remain(
    model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Streams go to the other replica, and this one takes part again when its rank is back."""
    async with LocalCluster(
        model,
        prefill=0,
        decode=4,
        expert_parallel=2,
        experts={"slots": 4},
        router={"timeout_s": 1.0, "heartbeat_s": 0.2},
    ) as cluster:
        asking = asyncio.ensure_future(ask_all(cluster, prompts))
        await cluster.wait_for_tokens(60)
        assert not asking.done(), "too late to disturb anything"
        cluster.kill("decode-1", signal.SIGKILL)
        answers = await asking
        assert [answer.tokens for answer in answers] == expected
        assert "8 experts do not fit on ranks 0, whose memory holds 4 each" in cluster.log("decode-0")
        cluster.launch("decode-1")
        await cluster.wait_for_workers()
        assert [answer.tokens for answer in await ask_all(cluster, prompts)] == expected
        await cluster.assert_at_rest()

"""Replicas whose experts are spread over several processes, a prefill and a decode group, judged by transformers."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import msgspec
import pytest
import redis

from tests.e2e.local_cluster import LocalCluster
from tests.e2e.oracle import Oracle, real_prompts
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.models.upcycle import Upcycling, upcycle
from workers.protocol import redis_keys
from workers.protocol.expert_messages import ExpertPost, ExpertRank
from workers.protocol.experts import Placement

NUM_EXPERTS, NUM_LAYERS = 8, 2


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model_type": "qwen2_moe", "max_position_embeddings": 2048, **_QWEN2_MOE}
    return write_random_model(tmp_path_factory.mktemp("moe"), config, seed=3)


_QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": False,
}


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 200))] for _ in range(count)]


def spread(version: int, rng: random.Random) -> Placement:
    """Over two ranks, some experts on both."""
    layers = []
    for _ in range(NUM_LAYERS):
        first = set(rng.sample(range(NUM_EXPERTS), 4))
        second = set(range(NUM_EXPERTS)) - first | set(rng.sample(sorted(first), rng.randint(0, 2)))
        layers.append((tuple(sorted(first)), tuple(sorted(second))))
    return Placement(version, tuple(layers))


class Groups:
    """What a router does about experts, by hand."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._redis = redis.Redis.from_url(cluster.valkey.url)
        self._cluster = cluster.name

    def ranks(self) -> list[ExpertRank]:
        raw: dict[bytes, bytes] = self._redis.hgetall(redis_keys.expert_ranks(self._cluster))
        return [msgspec.msgpack.decode(value, type=ExpertRank) for value in raw.values()]

    def post(self, placement: Placement) -> None:
        for group in {rank.group for rank in self.ranks()}:
            post = ExpertPost(group, placement, "test", time.time(), "test")
            self._redis.set(redis_keys.expert_post(self._cluster, group), msgspec.msgpack.encode(post))
            self._redis.set(redis_keys.expert_version(self._cluster, group), placement.version)

    async def wait_for(self, version: int, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while [rank.version for rank in self.ranks()] != [version] * 4:
            assert time.monotonic() < end, self.ranks()
            await asyncio.sleep(0.05)


@pytest.mark.timeout(180)
async def test_right_tokens_through_two_groups_while_experts_move(moe_model: Path) -> None:
    oracle, given, rng = Oracle(moe_model), prompts(6), random.Random(1)
    async with LocalCluster(
        moe_model, prefill=2, decode=2, expert_parallel=2, experts={"slots": 6}
    ) as cluster:
        groups = Groups(cluster)
        await groups.wait_for(1)
        asking = asyncio.ensure_future(cluster.ask_all(given, max_tokens=32, ignore_eos=True))
        for version in range(2, 12):
            groups.post(spread(version, rng))
            await groups.wait_for(version)
            if asking.done():  # tokens flow under every placement
                for prompt, answer in zip(given, asking.result(), strict=True):
                    assert oracle.fault(prompt, answer.tokens) is None
                asking = asyncio.ensure_future(
                    cluster.ask_all(given, name=f"v{version}-", max_tokens=32, ignore_eos=True)
                )
        for prompt, answer in zip(given, await asking, strict=True):
            assert oracle.fault(prompt, answer.tokens) is None
        assert {rank.group for rank in groups.ranks()} == {"prefill-ep0", "decode-ep0"}
        assert all(rank.members == [0, 1] for rank in groups.ranks())
        await cluster.assert_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("prefill", "size"), [(2, 2), (0, 4)])
async def test_real_text_comes_out_as_from_the_dense_model(
    smollm2: Path, oracle: Oracle, tmp_path: Path, prefill: int, size: int
) -> None:
    """An up-cycled model says what the dense one says, but only if every token meets the experts that it chose."""
    model = upcycle(smollm2, tmp_path / "moe", Upcycling(groups=2, slices=2))
    given = real_prompts(oracle.tokenizer, [5, 16, 40, 90, 150, 256])
    Engine(
        EngineConfig(dtype="float32", num_blocks=1), prepare_model(str(model))
    )  # packs the weights, once for all
    async with LocalCluster(model, prefill=prefill, decode=size, expert_parallel=size) as cluster:
        answers = await cluster.ask_all(given, max_tokens=48, ignore_eos=True)
        for prompt, answer in zip(given, answers, strict=True):
            assert oracle.fault(prompt, answer.tokens) is None
        assert all(rank.members == list(range(size)) for rank in Groups(cluster).ranks())

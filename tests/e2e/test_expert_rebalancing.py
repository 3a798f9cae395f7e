"""A router places the experts of real ranks anew by what they really do, and the tokens stay those of transformers."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.e2e.local_cluster import LocalCluster
from tests.e2e.oracle import Oracle
from workers.models.random_model import write_random_model

# Looks often, needs little, and takes any gain: what is tested is the way, not the judgement.
EAGER = {
    "interval_s": 0.2,
    "window_s": 0.4,
    "min_tokens": 200,
    "min_gain": 0.001,
    "pause_s": 1.0,
    "half_life_s": 5.0,
}


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "max_position_embeddings": 2048,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    return write_random_model(tmp_path_factory.mktemp("moe"), config, seed=5)


@pytest.mark.timeout(180)
async def test_real_counts_make_a_router_place_experts_anew(moe_model: Path) -> None:
    rng, oracle = random.Random(7), Oracle(moe_model)
    async with LocalCluster(
        moe_model, prefill=0, decode=2, expert_parallel=2, experts={"slots": 6}, router={"experts": EAGER}
    ) as cluster:
        end = time.monotonic() + 60
        group = None
        turn = 0
        while group is None or group["posted_by"] is None or group["version"] < group["posted"]:
            assert time.monotonic() < end, group
            prompts = [[rng.randrange(3, 250) for _ in range(60)] for _ in range(4)]
            turn += 1
            answers = await cluster.ask_all(prompts, name=f"t{turn}-", max_tokens=24, ignore_eos=True)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert oracle.fault(prompt, answer.tokens) is None
            groups = (await cluster.dispatcher.experts_view())["groups"]
            group = groups[0] if groups else None
            await asyncio.sleep(0.1)
        assert group["posted_by"] == cluster.dispatcher.router_id
        assert sum(len(rank) for rank in group["placement"][0]) > 8, "hot experts have copies"
        assert group["counts_lost"] == 0
        assert [rank["state"] for rank in group["ranks"]] == ["in use", "in use"]
        prompts = [[rng.randrange(3, 250) for _ in range(60)] for _ in range(4)]
        answers = await cluster.ask_all(prompts, name="last-", max_tokens=24, ignore_eos=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert oracle.fault(prompt, answer.tokens) is None
        await cluster.assert_at_rest()

"""Every token through prefill and decode workers is the one that transformers gives with the same float32 weights."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.local_cluster import LocalCluster
from tests.e2e.oracle import Oracle, real_prompts
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling

GREEDY = {"temperature": 0.0, "ignore_eos": True}

CLUSTERS = {
    "shm": {"transfer": {"channels": ["shm"]}},
    "three tcp streams, chunks of 96, preemption": {
        "transfer": {"channels": ["tcp"], "tcp_streams": 3},
        "engine": {"num_blocks": 110, "max_num_batched_tokens": 96},
        "router": {"policy": {"local_prefill_max": 0}},
    },
    "two and two, by layer": {
        "prefill": 2,
        "decode": 2,
        "transfer": {"channels": ["shm", "tcp"], "layer_groups": 6},
    },
}


@pytest.fixture(scope="module")
def prompts(oracle: Oracle) -> list[list[int]]:
    return real_prompts(oracle.tokenizer)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("longest", "new_tokens"),
    [
        pytest.param(520, 32, id="short"),
        pytest.param(1500, 64, id="long", marks=pytest.mark.slow),
    ],
)
async def test_greedy_tokens_are_those_of_transformers(
    name: str, longest: int, new_tokens: int, oracle: Oracle, prompts: list[list[int]]
) -> None:
    prompts = [prompt for prompt in prompts if len(prompt) <= longest]
    async with LocalCluster(oracle.model_path, **CLUSTERS[name]) as cluster:  # type: ignore[arg-type]
        first = await cluster.ask_all(prompts, name="first", max_tokens=new_tokens, **GREEDY)
        again = await cluster.ask_all(prompts, name="again", max_tokens=new_tokens, **GREEDY)
        await cluster.assert_at_rest()
        status = await cluster.status()
    for answers in (first, again):
        assert [len(a.tokens) for a in answers] == [new_tokens] * len(prompts)
        assert {a.finish_reason for a in answers} == {"length"}
        faults = [oracle.fault(p, a.tokens) for p, a in zip(prompts, answers, strict=True)]
        assert not any(faults), faults
    assert sum(a.cached_tokens for a in again) > sum(a.cached_tokens for a in first)
    decode = [reply for worker_id, reply in status.items() if worker_id.startswith("decode")]
    prefill = [reply for worker_id, reply in status.items() if worker_id.startswith("prefill")]
    assert sum(reply.load.output_tokens for reply in prefill) > len(prompts) / 2, (
        "prompts were prefilled elsewhere"
    )
    if "preemption" in name:
        assert sum(reply.load.preemptions for reply in decode) > 0
    if "two and two" in name:
        assert all(reply.load.output_tokens for reply in status.values()), "every worker took part"


def test_the_oracle_itself_agrees_with_generate(oracle: Oracle, prompts: list[list[int]]) -> None:
    """One forward pass over prompt and output judges like generating token by token does."""
    for prompt in (prompts[3], prompts[16]):
        tokens = oracle.generate(prompt, 12)
        assert oracle.fault(prompt, tokens) is None
        wrong = [*tokens[:6], (tokens[6] + 1) % 1000, *tokens[7:]]
        assert "output token 6" in (oracle.fault(prompt, wrong) or "")


async def test_a_seed_gives_the_same_tokens_in_any_batch_and_placement(
    oracle: Oracle, prompts: list[list[int]]
) -> None:
    chosen = prompts[2:18:2]
    options = [
        {"temperature": 0.8 + 0.05 * i, "top_p": 0.95, "top_k": 50 if i % 3 else 0, "seed": 1000 + i}
        | ({"frequency_penalty": 0.4, "repetition_penalty": 1.1} if i % 4 == 0 else {})
        for i in range(len(chosen))
    ]
    torch.set_num_threads(1)
    engine = Engine(
        EngineConfig(dtype="float32", num_blocks=256, num_threads=1), prepare_model(str(oracle.model_path))
    )
    alone = [
        engine.generate([p], Sampling(max_tokens=24, ignore_eos=True, **o))[0].tokens
        for p, o in zip(chosen, options, strict=True)
    ]
    together = engine.generate(chosen, [Sampling(max_tokens=24, ignore_eos=True, **o) for o in options])
    assert [c.tokens for c in together] == alone
    async with LocalCluster(oracle.model_path, prefill=1, decode=2) as cluster:
        import asyncio

        answers = await asyncio.gather(
            *(
                cluster.ask(f"s{i}", p, max_tokens=24, ignore_eos=True, **o)
                for i, (p, o) in enumerate(zip(chosen, options, strict=True))
            )
        )
    assert [a.tokens for a in answers] == alone
    assert len({tuple(t) for t in alone}) == len(alone)

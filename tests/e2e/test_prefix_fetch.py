"""A prefix that another worker holds travels to where it is needed, and the tokens stay the same."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.e2e.local_cluster import LocalCluster
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling

LONG = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}
SHORT = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}


async def test_what_was_said_is_fetched_by_the_prefill_worker_of_the_next_turn(tiny_model: Path) -> None:
    """The prefill worker knows the first question, not the answer: that only the decode worker has."""
    rng = random.Random(1)
    question = [rng.randrange(3, 250) for _ in range(200)]
    async with LocalCluster(tiny_model) as cluster:
        first = await cluster.ask("first", question, **LONG)
        turn = [*question, *first.tokens, *(rng.randrange(3, 250) for _ in range(100))]
        await cluster.assert_at_rest()
        second = await cluster.ask("second", turn, **SHORT)
        await cluster.assert_at_rest()
        status = await cluster.status()
    alone = Engine(
        EngineConfig(dtype="float32", num_blocks=64, num_threads=1), prepare_model(str(tiny_model))
    )
    assert second.tokens == alone.generate([turn], Sampling(seed=0, **SHORT))[0].tokens
    fetched = status["decode-0"].load.peers["prefill-0"]
    assert fetched.sent_bytes > 0
    computed = status["prefill-0"].load.prompt_tokens
    assert computed < len(question) + 150, "the answer was not computed again"
    assert second.cached_tokens >= 490


async def test_a_decode_worker_fetches_from_another_that_is_excluded_or_busy(tiny_model: Path) -> None:
    """Without a prefill worker: whoever gets the second request fetches what the first computed."""
    rng = random.Random(2)
    shared = [rng.randrange(3, 250) for _ in range(400)]
    router = {"policy": {"cache_credit": 0.0, "decode_block_weight": 100.0}}  # only load counts
    async with LocalCluster(tiny_model, prefill=0, decode=2, router=router) as cluster:
        first = await cluster.ask("first", shared, **SHORT)
        await cluster.assert_at_rest()
        others = await asyncio.gather(*(cluster.ask(f"o{i}", [*shared, i], **SHORT) for i in range(3, 7)))
        await cluster.assert_at_rest()
        status = await cluster.status()
    alone = Engine(
        EngineConfig(dtype="float32", num_blocks=64, num_threads=1), prepare_model(str(tiny_model))
    )
    for answer, prompt in zip((first, *others), (shared, *([*shared, i] for i in range(3, 7))), strict=True):
        assert answer.tokens == alone.generate([prompt], Sampling(seed=0, **SHORT))[0].tokens
    computed = sum(reply.load.prompt_tokens for reply in status.values())
    assert computed < 2 * len(shared), "the shared prefix was computed once"
    assert any(peer.sent_bytes for reply in status.values() for peer in reply.load.peers.values())

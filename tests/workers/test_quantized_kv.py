"""int8 and fp8 KV caches of torch: the engine and a pair of workers, models of several kinds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.paged_kv import PagedKv
from tests.workers.parallel.teams import replica
from tests.workers.tiers.test_engine_tiers import conversations, make_engine
from tests.workers.worker_pair import worker_pair
from workers.config import EngineConfig
from workers.engine.backend import open_backend
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.kv_cache import wire_of
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling
from workers.protocol.tiers import HOST

KINDS = ("llama", "deepseek_v3", "gpt_oss")
DTYPES = ("int8", "fp8")
GREEDY = Sampling(max_tokens=12, temperature=0.0, seed=0, ignore_eos=True)
PROMPT = [int(token) for token in np.random.default_rng(3).integers(3, 200, 75)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_random_model(tmp_path_factory.mktemp(name), name, seed=1) for name in KINDS}


def settings(kv_cache_dtype: Any, **others: Any) -> EngineConfig:
    given = {"device": "cpu", "kernels": "torch", "dtype": "float32", "num_threads": 1, "num_blocks": 32}
    return EngineConfig(kv_cache_dtype=kv_cache_dtype, **(given | others))


def generate(model: Path, config: EngineConfig) -> tuple[list[int], Engine]:
    engine = Engine(config, prepare_model(str(model)))
    (done,) = engine.generate([PROMPT], GREEDY)
    return done.tokens, engine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_in_any_chunks(models: dict[str, Path], kind: str, dtype: str) -> None:
    whole, engine = generate(models[kind], settings(dtype))
    assert engine.layout.dtype == dtype
    kv_cache = engine.runner.kv_cache
    assert kv_cache.dtype == torch.uint8
    assert kv_cache.nbytes == 32 * engine.layout.block_bytes
    chunked, _ = generate(models[kind], settings(dtype, max_num_batched_tokens=64, max_num_seqs=8))
    assert chunked == whole
    again = engine.generate([PROMPT], GREEDY)[0]
    assert again.tokens == whole  # with most of the prompt from the cache


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_holds_about_what_one_of_floats_holds(models: dict[str, Path], dtype: Any) -> None:
    """Keys and values of the first layer, which hang on nothing that was rounded before."""
    caches = []
    for wanted in ("auto", dtype):
        tokens, engine = generate(models["llama"], settings(wanted))
        layout = engine.layout
        held = PagedKv.held_in(engine.runner.kv_cache, layout.head_dim, wire_of(wanted))
        caches.append(held.values()[:, 0].flatten(0, -2))
        assert len(tokens) == 12
    exact, got = caches
    blocks = len(exact) // 32
    written = range(blocks * (len(PROMPT) // layout.block_size))  # generated tokens may differ
    exact, got = exact[: len(written)], got[: len(written)]
    assert exact.any()
    largest = exact.abs().amax(-1, keepdim=True)
    step = largest / 254 if dtype == "int8" else (exact.abs() / 16).maximum(largest / 448 / 512)
    assert ((got - exact).abs() <= step * 1.01 + 1e-12).all()
    assert not torch.equal(got, exact)


@pytest.mark.parametrize("road", ["shm", "tcp"])
def test_decode_goes_on_from_blocks_that_were_handed_over(models: dict[str, Path], road: str) -> None:
    alone, _ = generate(models["llama"], settings("fp8"))
    with worker_pair(models["llama"], settings("fp8"), road) as pair:
        tokens, done = pair.generate(PROMPT, 12)
    assert tokens == alone
    blocks = -(-len(PROMPT) // 16)
    assert (done.channel, done.transfer_bytes) == (road, blocks * pair.decode.info.layout.block_bytes)


def test_what_has_no_such_cache_says_so(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"kv_cache_dtype is fp8, which needs a GPU or engine\.kernels torch"
    ):
        open_backend(EngineConfig(device="cpu", kv_cache_dtype="fp8"), prepare_model(str(models["llama"])))
    odd = prepare_model(str(write_random_model(tmp_path, {"model_type": "llama", "head_dim": 6}, seed=1)))
    with pytest.raises(
        ValueError, match=r"kv_cache_dtype is int8: heads must be of a multiple of 4 .* are of 6"
    ):
        open_backend(settings("int8"), odd)


def test_ranks_hold_their_heads_of_it(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = write_random_model(tmp_path, {"model_type": "llama", **heads}, seed=1)
    alone, _ = generate(model, settings("fp8"))
    with replica(model, 2, kv_cache_dtype="fp8", kernels="torch") as ranks:
        assert ranks.engine.generate([PROMPT], GREEDY)[0].tokens == alone
        layout, kv_cache = ranks.engine.layout, ranks.engine.runner.kv_cache
        assert layout.dtype == "fp8"
        assert kv_cache[0].nbytes * 2 == layout.block_bytes
        (memory,) = ranks.team.memories(layout, kv_cache)
        assert len(b"".join(memory.outgoing([0, 1]))) == layout.block_bytes


def test_evicted_blocks_come_back_from_host_memory(models: dict[str, Path]) -> None:
    prompts = conversations(1, count=4, turns=2)
    large, small = settings("fp8", num_blocks=200), settings("fp8", num_blocks=12)
    whole = Engine(large, prepare_model(str(models["llama"])))
    expected = [done.tokens for done in whole.generate(prompts, GREEDY)]
    host = 100 * whole.layout.block_bytes
    engine = make_engine(models["llama"], **small.model_dump() | {"host_cache_memory": host})
    assert [done.tokens for done in engine.generate(prompts, GREEDY)] == expected
    assert engine.scheduler.hit_tokens / engine.scheduler.query_tokens > 0.3
    assert engine.tiers is not None
    assert engine.tiers.stats()[HOST].stored_blocks > 0
    engine.close()

"""A decoder on 2 and 4 tensor-parallel ranks says what it says alone: every family, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from kernels.attention_step import AttentionStep
from tests.workers.parallel.ranks import ranks
from workers.models.decoder import Decoder, load_decoder
from workers.models.random_model import write_random_model
from workers.parallel.collectives import ALONE, Parallel
from workers.parallel.process_group import GroupError, RankGroup
from workers.parallel.shard import Shard

BLOCK, CPU = 4, torch.device("cpu")
FOUR_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": FOUR_HEADS,
    "qwen2": FOUR_HEADS,  # biases of q, k, v; embedding and head are one
    "qwen3": FOUR_HEADS,  # norms of each head
    "mixtral": FOUR_HEADS,
    "qwen2_moe": FOUR_HEADS,  # shared experts behind a gate
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gpt_oss": FOUR_HEADS,  # sinks; biases of all projections
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(path: Path, parallel: Parallel) -> torch.Tensor:
    """Of a prompt read in two chunks beside another one: float32 [7, vocab]."""
    decoder = load_decoder(path, torch.float32, CPU, parallel=parallel)
    cache = decoder.new_kv_cache(8, BLOCK)
    ids = torch.arange(3, 16) * 17 % 257
    return torch.cat((_first(decoder, cache, ids), _second(decoder, cache, ids)))


def _first(decoder: Decoder, cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Six tokens in blocks 1 and 2, three in block 4."""
    step = AttentionStep.of(
        [0, 6, 9], [6, 3], torch.tensor([[1, 2], [4, 0]]), torch.tensor([4, 5, 6, 7, 8, 9, 16, 17, 18])
    )
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])
    return decoder.logits(decoder.forward(ids[:9], positions, cache, step, torch.tensor([5, 6, 7, 8])))


def _second(decoder: Decoder, cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    step = AttentionStep.of(
        [0, 3, 4], [9, 4], torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([10, 11, 12, 19])
    )
    positions = torch.tensor([6, 7, 8, 3])
    return decoder.logits(decoder.forward(ids[9:], positions, cache, step, torch.tensor([1, 2, 3])))


@pytest.mark.parametrize("family", MODELS)
def test_ranks_say_what_one_says(tmp_path: Path, family: str) -> None:
    # 257 rows of vocabulary: the last rank has fewer than the others.
    path = write_random_model(tmp_path, {"model_type": family, "vocab_size": 257, **MODELS[family]}, seed=5)
    whole = logits(path, ALONE)
    for size in (2, 4):
        with ranks(size) as group:
            parts = group.each(lambda parallel: logits(path, parallel))
        assert all(torch.equal(part, parts[0]) for part in parts)
        torch.testing.assert_close(parts[0], whole, rtol=1e-4, atol=1e-4)  # sums are taken in another order


def test_ranks_that_do_not_come_are_not_waited_for_for_ever() -> None:
    store = torch.distributed.HashStore()
    with pytest.raises(GroupError, match="2 ranks on cpu did not come together"):
        RankGroup(store, Shard(0, 2), CPU, timeout_s=0.3)


def test_collectives() -> None:
    with ranks(3) as group:
        sums = group.each(lambda one: one.all_reduce(torch.full((2, 2), 1.5 + one.shard.rank)))
        assert all(torch.equal(total, torch.full((2, 2), 7.5)) for total in sums)
        rows = group.each(lambda one: one.all_gather(torch.full((2, 2), one.shard.rank)))
        assert all(torch.equal(row, torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)) for row in rows)
        given = [torch.full((3,), rank) for rank in range(3)]
        group.each(lambda one: one.broadcast(given[one.shard.rank]))
        assert all(torch.equal(one, torch.zeros(3, dtype=torch.int64)) for one in given)

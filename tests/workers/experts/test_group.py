"""Ranks of a group write what one engine with all experts writes, whatever happens meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workers.experts.engines import Group, expected
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

GREEDY = Sampling(max_tokens=24, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", seed=3)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 40))] for _ in range(count)]


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_tokens_on_any_number_of_ranks(model: Path, size: int) -> None:
    given = prompts(6)
    wanted = expected(model, given, GREEDY)
    with Group(model, size) as group:
        waiting = [group.ranks[i % size].submit(prompt, GREEDY) for i, prompt in enumerate(given)]
        assert [result() for result in waiting] == wanted

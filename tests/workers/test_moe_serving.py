"""Mixture-of-experts models through the whole engine and between two workers: transformers' greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.oracle import Oracle
from tests.workers.experts.engines import Group
from tests.workers.worker_pair import worker_pair
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.checkpoint import read_json
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
ON_TORCH = ("deepseek_v2", "deepseek_v3", "gpt_oss")  # no native kernels
GREEDY = Sampling(max_tokens=16, seed=1, temperature=0.0, ignore_eos=True)
START = list(range(3, 60))
PROMPTS = [[*START, 99, 98], [*START, 97], list(range(200, 120, -1)), [5, 6, 7], [40] * 20]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("m"), {"model_type": request.param}, seed=3)


def model_type(path: Path) -> str:
    return str(read_json(path / "config.json")["model_type"])


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def settings(**engine: Any) -> EngineConfig:
    return EngineConfig(
        **(
            {"device": "cpu", "dtype": "float32", "num_blocks": 64, "num_threads": 1, "max_num_seqs": 8}
            | engine
        )
    )


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_the_engine_says_what_transformers_says(model: Path, oracle: Oracle, kernels: str) -> None:
    """Prompts in chunks beside decoded tokens, and so few blocks that requests are preempted."""
    if kernels == "auto" and model_type(model) in ON_TORCH:
        pytest.skip("auto is torch")
    engine = Engine(
        settings(kernels=kernels, num_blocks=16, block_size=8, max_num_batched_tokens=24),
        prepare_model(str(model)),
    )
    assert (engine.runner.kernels == "torch") == (kernels == "torch")
    for _ in range(2):  # the second time out of the prefix cache, as far as it reaches
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
            assert len(answer.tokens) == 16
            assert oracle.fault(prompt, answer.tokens) is None
    assert engine.scheduler.preemptions > 0
    assert engine.pool.num_referenced == 0
    [again] = engine.generate([PROMPTS[2]], GREEDY)
    assert oracle.fault(PROMPTS[2], again.tokens) is None
    assert engine.scheduler.hit_tokens > 0


@pytest.mark.parametrize("road", ["shm", "tcp"])
def test_between_a_prefill_and_a_decode_worker(model: Path, oracle: Oracle, road: str) -> None:
    prompt = list(range(3, 100))
    with worker_pair(model, settings(max_num_batched_tokens=40), road) as pair:
        tokens, done = pair.generate(prompt, max_tokens=12)
        assert (done.channel, done.transfer_bytes) == (road, 7 * pair.decode.info.layout.block_bytes)
    assert oracle.fault(prompt, tokens) is None


@pytest.mark.parametrize(("size", "kernels"), [(2, "auto"), (4, "torch")])
def test_spread_over_the_ranks_of_a_group(model: Path, oracle: Oracle, size: int, kernels: str) -> None:
    with Group(model, size, engine={"kernels": kernels}) as group:
        waiting = [group.ranks[i % size].submit(prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
        for prompt, result in zip(PROMPTS, waiting, strict=True):
            assert oracle.fault(prompt, result()) is None

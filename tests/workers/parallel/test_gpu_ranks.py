"""Two ranks as processes: on two GPUs over NCCL, on the one GPU that there is through gloo, and everywhere on CPUs, so that
the program of these tests is known to work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.parallel.teams import config_of
from workers.engine.engine import Completion, Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.parallel.process_group import own_device
from workers.parallel.team import Team
from workers.protocol.messages import Sampling

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = [list(range(3, 60)), [*range(3, 50), 99], list(range(200, 120, -1)), [5, 6, 7]]
MIXED = [
    Sampling(max_tokens=24, seed=1, temperature=0.0, ignore_eos=True),
    Sampling(max_tokens=24, seed=7, temperature=0.9, top_k=20, top_p=0.9, ignore_eos=True),
    Sampling(max_tokens=24, seed=8, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    Sampling(max_tokens=24, seed=9, temperature=1.2, min_p=0.05, ignore_eos=True),
]
GPUS = torch.cuda.device_count()


@contextmanager
def two_ranks(model: Path, **settings: Any) -> Iterator[tuple[Engine, Team]]:
    """Rank 0 is this process."""
    given = {"size": 2, "epoch": int(time.time() * 1000)} | settings
    config = config_of(model, rank=0, **given)
    follows = json.dumps({"model": str(model), "rank": 1} | given)
    follower = subprocess.Popen(
        [sys.executable, "-m", "tests.workers.parallel.follower_process", follows], cwd=ROOT
    )
    team: Team | None = None
    try:
        team = Team(config, own_device(torch.device(settings["device"]), 0))
        yield Engine(config.engine, prepare_model(str(model)), share_kv=True, team=team), team
        team.close()
        assert follower.wait(60) == 0
    finally:
        if team is not None:
            team.close()
        follower.kill()
        follower.wait()


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def check(model: Path, **settings: Any) -> None:
    alone = Engine(config_of(model, 0, 2, 0, kernels="torch").engine, prepare_model(str(model)))
    expected = tokens(alone.generate(PROMPTS, MIXED))
    with two_ranks(model, max_num_batched_tokens=48, **settings) as (engine, team):
        for _ in range(2):  # the second time out of the prefix cache
            assert tokens(engine.generate(PROMPTS, MIXED)) == expected
        layout = engine.layout
        (other,) = team.memories(layout, engine.runner.kv_cache)
        blocks = [2, 0, 3]
        (sent,) = other.outgoing(blocks, heads=range(1))
        assert any(sent), "the other rank wrote its keys and values there"
        given = bytes(255 - byte for byte in sent)
        with other.incoming(blocks, heads=range(1)) as (view,):
            view.cast("B")[:] = given
        (read,) = other.outgoing(blocks, heads=range(1))
        assert bytes(read) == given


@pytest.fixture
def model(tmp_path: Path) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    return write_random_model(tmp_path / "m", heads, seed=3)


@pytest.mark.slow
def test_on_cpus(model: Path) -> None:
    check(model, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="torch sees no GPU")
def test_on_one_gpu(model: Path) -> None:
    check(model, device="cuda", collectives="gloo", graphs="none")


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"NCCL needs a GPU for each rank, torch sees {GPUS}")
@pytest.mark.parametrize("graphs", ["none", "all"])
def test_on_two_gpus(model: Path, graphs: str) -> None:
    check(model, device="cuda", graphs=graphs)

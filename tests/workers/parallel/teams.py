"""A worker's ranks as threads of one process: its engine on rank 0, the others beside it, over their real connections."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.config import EngineConfig, TensorRankConfig, WorkerConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.parallel.follower import Follower
from workers.parallel.team import Team

SECRET = "a secret of the tests, long enough"
_epochs = itertools.count(os.getpid() * 1000)  # no two lives of one name at a time


@dataclass
class Replica:
    engine: Engine
    team: Team
    followers: list[Follower]


def config_of(
    model: Path, rank: int, size: int, epoch: int, collectives: str = "auto", **engine: Any
) -> WorkerConfig:
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "num_threads": 1, "max_num_seqs": 8}
    return WorkerConfig(
        worker_id="decode-0",
        epoch=epoch,
        role="decode",
        model_path=model,
        served_name="model",
        cluster="ranks",
        secret=SECRET,
        heartbeat_s=0.2,
        timeout_s=20.0,
        engine=EngineConfig(**settings | engine),
        tensor_rank=TensorRankConfig(rank=rank, size=size, collectives=collectives),  # type: ignore[arg-type]
    )


@contextmanager
def replica(model: Path, size: int, *, share_kv: bool = False, **engine: Any) -> Iterator[Replica]:
    epoch = next(_epochs)
    configs = [config_of(model, rank, size, epoch, **engine) for rank in range(size)]
    followers = [Follower(config) for config in configs[1:]]
    with ThreadPoolExecutor(size) as pool:
        started = [pool.submit(follower.start) for follower in followers]
        team = Team(configs[0], torch.device("cpu"))
        try:
            whole = Engine(configs[0].engine, prepare_model(str(model)), share_kv=share_kv, team=team)
            for one in started:
                one.result()
            yield Replica(whole, team, followers)
        finally:
            team.close()
            for follower in followers:
                follower.stop()

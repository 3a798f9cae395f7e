"""An engine over several ranks: the tokens of one process, and what happens when a rank is lost."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.workers.parallel.teams import config_of, replica
from workers.engine.backend import open_backend
from workers.engine.engine import Completion, Engine
from workers.engine.pending import Pending
from workers.engine.step_input import StepBuilder, StepInput
from workers.gpu import backend
from workers.gpu.runner import DeviceRunner
from workers.models.catalog import prepare_model
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model
from workers.parallel.follower import Follower
from workers.parallel.link import RankDoor
from workers.parallel.lockstep import RankLost, followed_step, step_message
from workers.parallel.process_group import GroupError
from workers.parallel.shard import Shard
from workers.parallel.team import Team, introduction
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import KvLayout, Sampling
from workers.worker import Worker

START = list(range(3, 60))
PROMPTS = [[*START, 99, 98], [*START, 97], list(range(200, 120, -1)), [5, 6, 7], [40] * 20]
GREEDY = Sampling(max_tokens=16, seed=1, temperature=0.0, ignore_eos=True)
MIXED = [
    GREEDY,
    Sampling(max_tokens=12, seed=7, temperature=0.9, top_k=20, top_p=0.9, ignore_eos=True),
    Sampling(max_tokens=9, seed=8, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    GREEDY,
    Sampling(max_tokens=20, seed=9, temperature=1.2, min_p=0.05, ignore_eos=True),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return write_random_model(tmp_path_factory.mktemp("m"), {"model_type": "llama", **heads}, seed=3)


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    engine = Engine(config_of(model, 0, 2, 0, kernels="torch").engine, prepare_model(str(model)))
    return tokens(engine.generate(PROMPTS, MIXED))


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("size", [2, 4])
def test_the_tokens_of_one_process(model: Path, alone: list[list[int]], size: int) -> None:
    """Prompts in chunks beside decoded tokens, so few blocks that requests are preempted; four ranks for two KV heads.

    Twice: the second time out of the prefix cache as far as it reaches.
    """
    with replica(model, size, num_blocks=16, block_size=8, max_num_batched_tokens=24) as ranks:
        for few in (PROMPTS, PROMPTS) if size == 2 else (PROMPTS[:2],):
            assert tokens(ranks.engine.generate(few, MIXED[: len(few)])) == alone[: len(few)]
        assert ranks.engine.runner.kernels == f"torch, {size} ranks"
        ranks.engine.pool.check([])


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype": "int8"},
        {"speculation": {"method": "ngram", "ngram_min": 1}},
    ],
    ids=["int8 cache", "speculation"],
)
def test_with_other_settings_too(model: Path, settings: dict[str, Any]) -> None:
    given, sampling = [[*START, 99, 98], [40] * 20], MIXED[:2]
    engine = Engine(config_of(model, 0, 2, 0, kernels="torch", **settings).engine, prepare_model(str(model)))
    expected = tokens(engine.generate(given, sampling))
    with replica(model, 2, **settings) as ranks:
        assert tokens(ranks.engine.generate(given, sampling)) == expected


def test_the_rank_with_the_least_room_decides(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(self: backend.DeviceBackend) -> int:
        return 64 - 8 * self._parallel.shard.rank

    monkeypatch.setattr(backend.DeviceBackend, "num_blocks", measured)
    with replica(model, 4) as ranks:
        assert ranks.engine.num_blocks == 40
        memories = ranks.team.memories(ranks.engine.layout, ranks.engine.runner.kv_cache)
        assert [len(memory.outgoing(range(40))) for memory in memories] == [40] * 3


def test_tiers_hold_every_kv_head_once(model: Path) -> None:
    config = config_of(model, 0, 4, 0, host_cache_memory=2**20)
    worker = Worker(config)
    worker.engine = SimpleNamespace(layout=KvLayout(2, 2, 8, 16, "float32", "00"))  # type: ignore[assignment]
    worker._check_tiers(ranks=2)
    with pytest.raises(
        ValueError, match="host_cache_memory cannot be had with 4 tensor-parallel ranks for 2 KV"
    ):
        worker._check_tiers(ranks=4)


def test_steps_that_overlap(model: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step begins before what the one before it sampled is known to the host, or to any rank but the first."""
    carried: list[int] = []

    class Overlapping(DeviceRunner):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named | {"overlaps": True})
            self._is_first = named["parallel"].shard.first

        def submit(self, step: StepInput) -> Pending:
            if not self._is_first:
                carried.append(len(step.carried))
            return super().submit(step)

    monkeypatch.setattr(backend, "DeviceRunner", Overlapping)
    with replica(model, 2, max_num_batched_tokens=24) as ranks:
        assert tokens(ranks.engine.generate(PROMPTS, MIXED)) == alone
    assert sum(carried) > 20, "nothing was in flight"


def test_rank_0_reads_and_writes_every_ranks_blocks(model: Path) -> None:
    with replica(model, 2) as ranks:
        ranks.engine.generate([START], GREEDY)
        layout = ranks.engine.layout
        memory = ranks.team.memories(layout, ranks.engine.runner.kv_cache)[0]
        blocks = range(4)
        before = [bytes(view) for view in memory.outgoing(blocks)]
        assert len(b"".join(before)) == 4 * layout.block_bytes // 2
        assert any(map(any, before)), "the follower wrote its keys and values there"
        with memory.incoming(blocks) as views:
            for view in views:
                view.cast("B")[:] = bytes(len(view.cast("B")))
        assert not any(map(any, map(bytes, memory.outgoing(blocks))))


def test_a_lost_rank_ends_the_replica(model: Path) -> None:
    with replica(model, 2) as ranks:
        ranks.followers[0].stop()
        with pytest.raises(RankLost, match="rank"):
            ranks.engine.generate([START], GREEDY)
        assert ranks.team.lost is not None


def test_a_failing_rank_says_why(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for it in the middle of the step."""
    with replica(model, 2) as ranks:
        group = ranks.followers[0]._group
        assert group is not None

        def fail(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("its memory has gone bad")

        monkeypatch.setattr(group, "all_gather", fail)
        with pytest.raises(RankLost):
            ranks.engine.generate([START], GREEDY)
        assert "its memory has gone bad" in str(ranks.team.lost)
        with pytest.raises(RuntimeError, match="its memory has gone bad"):
            ranks.followers[0].wait()


def test_a_rank_that_can_not_load_its_part_says_why(model: Path, tmp_path: Path) -> None:
    configs = [config_of(model, rank, 2, 78) for rank in range(2)]
    follower = Follower(configs[1].model_copy(update={"model_path": tmp_path / "nowhere"}))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(follower.start)
        team = Team(configs[0], torch.device("cpu"))
        with pytest.raises(GroupError, match=r"rank 1 could not start: .*nowhere"):
            Engine(configs[0].engine, prepare_model(str(model)), team=team)
        with pytest.raises(ModelError):
            starting.result()


def test_the_end_of_rank_0_ends_the_others(model: Path) -> None:
    with replica(model, 2) as ranks:
        ranks.team.lose("rank 0 has had enough")
        with pytest.raises(RuntimeError, match="rank 0 is gone"):
            ranks.followers[0].wait()


def test_an_ordered_end_is_none_that_is_complained_of(model: Path) -> None:
    with replica(model, 2) as ranks:
        ranks.team.close()
        ranks.followers[0].wait()


def test_a_rank_that_does_not_hold_the_secret_is_not_let_in(model: Path) -> None:
    config = config_of(model, 0, 2, 77)
    stranger = config_of(model, 1, 2, 77).model_copy(update={"secret": "another secret, long enough"})
    door = RankDoor(config)
    with ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(door.gather, introduction(config), 2, time.monotonic() + 0.5)
        with pytest.raises(ProtocolError, match="wrong cluster secret"):
            Follower(stranger).start()
        with pytest.raises(TimeoutError, match="rank 1 of 2 did not come"):
            gathering.result()
    door.close()


def test_what_ranks_cannot_compute_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.kernels is portable, tensor_parallel is 2: .* use auto"):
        open_backend(
            config_of(model, 0, 2, 0, kernels="portable").engine, prepare_model(str(model)), parallel=Two()
        )
    nine = write_random_model(
        tmp_path, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    )
    with pytest.raises(ModelError, match="9 query heads cannot be shared out evenly among 2"):
        open_backend(config_of(nine, 0, 2, 0).engine, prepare_model(str(nine)), parallel=Two())


class Two:
    """The first of two ranks, of which the other never comes."""

    shard = Shard(0, 2)
    all_reduce = all_gather = broadcast = None


def test_a_step_arrives_as_it_was_sent() -> None:
    builder = StepBuilder(4)
    builder.add([7, 8, 9], 2, array("i", (3, 1)), 1)
    builder.add([5], 4, array("i", (2, 0)), 1)
    step = StepInput(builder.arrays(), [], [(3, 0)])
    came = followed_step(step_message(step))
    for name in type(step.arrays).__dataclass_fields__:
        sent, received = getattr(step.arrays, name), getattr(came.arrays, name)
        assert sent.dtype == received.dtype
        assert sent.tolist() == received.tolist()
    assert [tuple(pair) for pair in came.carried] == [(3, 0)]

"""The supervisor's decisions, with hands that only note what they were told to do."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import SupervisorConfig, load_config
from cluster.supervisor import Died, Event, Started, Supervisor
from cluster.topology import Host, Inventory, Replica, plan

START_TIMEOUT_S = 100.0


class Hands:
    """Lives start when the test says so; leases are those of running lives unless a worker is stopped."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.killed: list[str] = []
        self.drained: list[tuple[str, float]] = []
        self.released: list[str] = []
        self.news: list[Event] = []
        self.alive: dict[str, int] = {}
        self.stopped: set[str] = set()
        self.redis = True

    def start(self, replica: Replica, epoch: int) -> None:
        self.started.append((replica.worker_id, epoch))

    def kill(self, worker_id: str) -> None:
        self.killed.append(worker_id)
        self.alive.pop(worker_id, None)

    def drain(self, worker_id: str, timeout_s: float) -> None:
        self.drained.append((worker_id, timeout_s))

    def release(self, replica: Replica) -> None:
        self.released.append(replica.worker_id)

    def events(self, timeout_s: float) -> list[Event]:
        news, self.news = self.news, []
        return news

    def leases(self) -> Mapping[str, int] | None:
        if not self.redis:
            return None
        return {worker: epoch for worker, epoch in self.alive.items() if worker not in self.stopped}


class World:
    def __init__(self, **settings: Any) -> None:
        self.now = 1000.0
        self.hands = Hands()
        replicas = plan(load_config(), Inventory((Host("local", "", 2),))).replicas
        self.supervisor = Supervisor(
            replicas,
            self.hands,
            SupervisorConfig(**settings),
            START_TIMEOUT_S,
            clock=lambda: self.now,
            wall_ms=lambda: int(self.now * 1000),
        )
        self.supervisor.launching = False
        self.supervisor.start_all()

    def tick(self, seconds: float = 0.0) -> list[Event]:
        self.now += seconds
        return self.supervisor.tick(0.0)

    def epoch(self, worker_id: str = "decode-0") -> int:
        return self.supervisor.watched[worker_id].epoch

    def phase(self, worker_id: str = "decode-0") -> str:
        return self.supervisor.watched[worker_id].phase

    def comes_up(self, *worker_ids: str) -> None:
        for worker_id in worker_ids or ("prefill-0", "decode-0"):
            self.hands.alive[worker_id] = self.epoch(worker_id)
            self.hands.news.append(Started(worker_id, self.epoch(worker_id), "127.0.0.1:1", 77))
        self.tick()

    def dies(self, worker_id: str = "decode-0", reason: str = "its process died") -> None:
        self.hands.alive.pop(worker_id, None)
        self.hands.news.append(Died(worker_id, self.epoch(worker_id), reason))
        self.tick()


def test_all_are_started_at_once() -> None:
    world = World()
    assert [worker for worker, _ in world.hands.started] == ["prefill-0", "decode-0"]
    assert not world.supervisor.all_running()
    world.comes_up()
    assert world.supervisor.all_running()
    assert world.supervisor.watched["decode-0"].pid == 77


def test_a_death_is_answered_at_once_with_a_higher_epoch() -> None:
    world = World()
    world.comes_up()
    old = world.epoch()
    world.tick(60)
    world.dies()
    assert world.phase() == "starting"
    assert world.epoch() > old
    assert world.hands.started[-1] == ("decode-0", world.epoch())
    assert world.phase("prefill-0") == "running"


def test_epochs_grow_even_when_the_clock_goes_back() -> None:
    world = World()
    world.comes_up()
    old = world.epoch()
    world.now -= 500
    world.dies()
    world.tick(0)
    assert world.epoch() == old + 1


def test_pauses_double_up_to_their_cap() -> None:
    world = World(backoff_initial_s=1.0, backoff_max_s=5.0, stable_after_s=30.0)
    pauses = []
    for _ in range(6):
        world.comes_up("decode-0")
        world.dies()
        waited = 0.0
        while world.phase() == "waiting":
            world.tick(0.5)
            waited += 0.5
        pauses.append(waited)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_stable_life_forgives_earlier_deaths() -> None:
    world = World(stable_after_s=30.0)
    for _ in range(3):
        world.comes_up("decode-0")
        world.dies()
        world.tick(100)
    world.comes_up("decode-0")
    world.tick(31)
    world.dies()
    assert world.phase() == "starting"


def test_it_never_gives_up_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    world = World(backoff_max_s=1.0)
    with caplog.at_level(logging.INFO, logger="cluster.supervisor"):
        for _ in range(20):
            world.tick(2)
            world.dies(reason="ModelError: the weights are gone")
    assert len(world.hands.started) >= 20
    assert len(caplog.records) == 20
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[-1].levelno == logging.ERROR
    assert "the weights are gone" in caplog.records[-1].message
    assert "20 deaths in a row" in caplog.records[-1].message


def test_news_of_an_earlier_life_is_ignored() -> None:
    world = World()
    world.comes_up()
    old = world.epoch()
    world.dies()
    world.hands.news.append(Died("decode-0", old, "late"))
    world.hands.news.append(Started("decode-0", old, "x", 1))
    assert world.tick() == []
    assert world.phase() == "starting"


def test_a_worker_that_stops_renewing_its_lease_is_put_down() -> None:
    world = World(hang_timeout_s=3.0)
    world.comes_up()
    world.hands.stopped.add("decode-0")
    world.tick(2.9)
    assert world.hands.killed == []
    old = world.epoch()
    events = world.tick(0.2)
    assert world.hands.killed == ["decode-0"]
    assert events == [Died("decode-0", old, "hung: its process lives, but its lease in Redis ran out")]
    assert world.epoch() > old


def test_a_lease_of_another_epoch_does_not_count() -> None:
    world = World(hang_timeout_s=3.0)
    world.comes_up()
    world.hands.alive["decode-0"] = world.epoch() - 1
    world.tick(3.1)
    assert world.hands.killed == ["decode-0"]


def test_without_redis_nobody_is_called_hung() -> None:
    world = World(hang_timeout_s=3.0)
    world.comes_up()
    world.hands.redis = False
    for _ in range(100):
        world.tick(1.0)
    world.hands.redis = True
    world.hands.stopped |= {"decode-0", "prefill-0"}  # leases are gone, workers have not written new ones yet
    world.tick(0.1)
    world.tick(2.0)
    assert world.hands.killed == []
    world.hands.stopped.clear()
    world.tick(5.0)
    assert world.hands.killed == []


def test_a_start_that_takes_too_long_is_a_death() -> None:
    world = World()
    world.comes_up("prefill-0")
    world.tick(START_TIMEOUT_S + 1)
    assert world.hands.killed == ["decode-0"]
    assert world.phase() == "starting"


@given(st.lists(st.sampled_from(["up", "die", "stop", "go", "second", "redis"]), max_size=60))
def test_whatever_happens_epochs_grow_and_every_worker_is_kept(moves: list[str]) -> None:
    world = World(backoff_max_s=4.0)
    for move in moves:
        if move == "up" and world.phase() == "starting":
            world.comes_up("decode-0")
        elif move == "die" and world.phase() != "waiting":
            world.dies()
        elif move in ("stop", "go"):
            (world.hands.stopped.add if move == "stop" else world.hands.stopped.discard)("decode-0")
        elif move == "redis":
            world.hands.redis = not world.hands.redis
        world.tick(1.0)
    epochs = [epoch for worker, epoch in world.hands.started if worker == "decode-0"]
    assert epochs == sorted(set(epochs))
    world.hands.stopped.clear()
    world.tick(5.0)
    world.tick(5.0)
    assert world.phase() in ("starting", "running")


# --- workers that come and go while the cluster runs ------------------------------------------------------------------


def extra(world: World) -> Replica:
    return dataclasses.replace(world.supervisor.watched["decode-0"].replica, worker_id="decode-1")


def test_a_worker_that_is_added_is_kept_alive_like_the_others() -> None:
    world = World()
    world.comes_up()
    world.supervisor.add(extra(world))
    assert world.hands.started[-1][0] == "decode-1"
    world.comes_up("decode-1")
    world.tick(60)
    world.dies("decode-1")
    assert world.phase("decode-1") == "starting"
    with pytest.raises(ValueError, match="is here already"):
        world.supervisor.add(extra(world))


def test_a_worker_that_retires_drains_and_is_not_started_again() -> None:
    world = World()
    world.comes_up()
    world.supervisor.add(extra(world))
    world.comes_up("decode-1")
    world.supervisor.retire("decode-1", 100.0)
    assert world.hands.drained == [("decode-1", 100.0)]
    assert world.supervisor.count("decode", ("draining",)) == 1
    world.tick(50)
    assert world.hands.killed == []
    world.dies("decode-1", "it ended without being asked to")
    assert "decode-1" not in world.supervisor.watched
    assert world.hands.released == ["decode-1"]
    world.tick(100)
    assert world.hands.started[-1][0] == "decode-1"
    assert [worker for worker, _ in world.hands.started].count("decode-1") == 1
    assert world.supervisor.all_running()


def test_a_worker_that_does_not_end_its_streams_in_time_is_put_down_and_stays_away() -> None:
    world = World(hang_timeout_s=1000.0)
    world.comes_up()
    world.supervisor.retire("decode-0", 20.0)
    world.tick(29)
    assert world.hands.killed == []
    world.tick(2)
    assert world.hands.killed == ["decode-0"]
    assert world.hands.released == ["decode-0"]
    assert "decode-0" not in world.supervisor.watched


def test_a_worker_that_never_came_up_leaves_at_once() -> None:
    world = World()
    world.comes_up()
    world.supervisor.add(extra(world))
    world.supervisor.retire("decode-1", 100.0)
    assert world.hands.drained == []
    assert world.hands.killed == world.hands.released == ["decode-1"]

from __future__ import annotations

import asyncio
import time

import pytest

from router.admission.turns import Admission
from router.config import AdmissionConfig
from router.generation import DeadlineExceeded, Overloaded, Unavailable


def admission(max_queue: int = 100, queue_timeout_s: float = 5.0) -> Admission:
    return Admission(AdmissionConfig(max_queue=max_queue, queue_timeout_s=queue_timeout_s))


class Cluster:
    """Places that can be taken; whoever finds none waits."""

    def __init__(self, line: Admission, places: int) -> None:
        self.line = line
        self.places = places
        self.placed: list[str] = []
        self.at_once = self.most_at_once = 0  # on a round trip

    async def request(self, name: str, *, priority: int = 0, need: int = 1, **kwargs) -> None:
        turn = self.line.enter(priority=priority, need_blocks=need, **kwargs)
        try:
            while True:
                await turn.mine()
                self.at_once += 1
                self.most_at_once = max(self.at_once, self.most_at_once)
                await asyncio.sleep(0)  # the round trip to a worker
                self.at_once -= 1
                if self.places >= need:
                    self.places -= need
                    break
                await turn.no_room()
            self.placed.append(name)
            turn.leave(placed=True)
        finally:
            turn.leave()

    def free(self, count: int) -> None:
        self.places += count
        self.line.room(self.places)

    async def start(self, *names: str, **kwargs) -> list[asyncio.Task]:
        tasks = [asyncio.create_task(self.request(name, **kwargs)) for name in names]
        await settle()
        return tasks


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def test_with_room_nobody_waits():
    cluster = Cluster(admission(), 10)
    await asyncio.gather(*await cluster.start(*"abcde"))
    assert cluster.line.waiting == 0


async def test_priority_then_resumed_then_first_come():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start("b1", "b2", priority=1)
    tasks += await cluster.start("a1", "a2", priority=0)
    tasks += await cluster.start("r", priority=0, resumed=True)
    tasks += await cluster.start("c", priority=2)
    assert cluster.line.waiting == 6
    for _ in range(6):
        cluster.free(1)
        await settle()
    assert cluster.placed == ["r", "a1", "a2", "b1", "b2", "c"]
    await asyncio.gather(*tasks)
    assert cluster.line.waiting == 0


async def test_nobody_overtakes_and_a_large_request_is_not_starved():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start("large", need=5)
    tasks += await cluster.start("small1", "small2", need=1)
    for _ in range(4):
        cluster.free(1)
        await settle()
        assert cluster.placed == []
    cluster.free(3)
    await settle()
    assert cluster.placed == ["large", "small1", "small2"]
    await asyncio.gather(*tasks)


async def test_who_comes_while_a_woken_request_tries_waits_behind_it():
    line = admission()
    first = line.enter(priority=0, need_blocks=1)
    await first.mine()
    waiting = asyncio.create_task(first.no_room())
    await settle()
    line.room(1)
    await waiting  # it is on its way to a worker now
    second = line.enter(priority=0, need_blocks=1)
    behind = asyncio.create_task(second.mine())
    urgent = line.enter(priority=-1, need_blocks=1)
    await asyncio.wait_for(urgent.mine(), 0.1)
    await settle()
    assert not behind.done()
    first.leave(placed=True)
    urgent.leave(placed=True)
    await asyncio.wait_for(behind, 0.1)
    second.leave()
    assert line.waiting == 0


async def test_room_for_many_wakes_many():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start(*(str(n) for n in range(50)))
    cluster.free(50)
    await asyncio.wait_for(asyncio.gather(*tasks), 1)
    assert cluster.placed == [str(n) for n in range(50)]
    assert cluster.most_at_once > 10  # woken together, they need not wait for each other's round trip


async def test_room_that_appears_while_the_answer_travels_is_not_missed():
    line = admission()
    turn = line.enter(priority=0, need_blocks=1)
    await turn.mine()
    line.room(4)
    await asyncio.wait_for(turn.no_room(), 0.5)
    turn.leave(placed=True)


async def test_a_full_line_turns_new_requests_away():
    cluster = Cluster(admission(max_queue=2), 0)
    tasks = await cluster.start("a", "b")
    with pytest.raises(Overloaded) as overloaded:
        await cluster.request("c")
    assert overloaded.value.status == 429
    assert overloaded.value.retry_after_s >= 1
    resumed = await cluster.start("r", resumed=True)
    assert cluster.line.waiting == 3
    cluster.free(3)
    await asyncio.gather(*tasks, *resumed)
    assert cluster.placed == ["r", "a", "b"]


async def test_max_queue_zero_still_serves_when_there_is_room():
    cluster = Cluster(admission(max_queue=0), 1)
    await cluster.request("a")
    with pytest.raises(Overloaded):
        await cluster.request("b")


async def test_waiting_too_long_is_unavailable():
    cluster = Cluster(admission(queue_timeout_s=0.05), 0)
    with pytest.raises(Unavailable) as unavailable:
        await cluster.request("a")
    assert unavailable.value.status == 503
    assert cluster.line.waiting == 0


async def test_who_gives_up_leaves_the_line_and_wakes_the_next():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start("a", "b", "c")
    tasks[1].cancel()
    await settle()
    assert cluster.line.waiting == 2
    cluster.places = 5
    cluster.line.room(1)  # wakes a, who is cancelled before it can use the room
    tasks[0].cancel()
    await settle()
    assert cluster.placed == ["c"]
    assert cluster.line.waiting == 0


async def test_who_steps_aside_lets_others_pass():
    cluster = Cluster(admission(), 1)
    aside = cluster.line.enter(priority=0, need_blocks=1, resumed=True)
    await aside.mine()
    pause = asyncio.create_task(aside.step_aside(0.05))
    await settle()
    await asyncio.wait_for(cluster.request("a"), 0.04)
    await pause
    await aside.mine()
    aside.leave(placed=True)
    assert cluster.line.waiting == 0


async def test_stepping_aside_ends_with_the_queue_timeout():
    line = admission(queue_timeout_s=0.05)
    turn = line.enter(priority=0, need_blocks=1)
    await turn.mine()
    with pytest.raises(Unavailable):
        await turn.step_aside(1.0)
    turn.leave()


async def test_close_ends_all_waiting():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start("a", "b")
    cluster.line.close()
    assert all(isinstance(r, Unavailable) for r in await asyncio.gather(*tasks, return_exceptions=True))
    with pytest.raises(Unavailable):
        await cluster.request("c")
    assert cluster.line.waiting == 0


async def test_who_waits_too_long_for_its_own_deadline_is_told_so():
    line = admission()
    turn = line.enter(priority=0, need_blocks=1, deadline=time.monotonic() + 0.05)
    await turn.mine()
    with pytest.raises(DeadlineExceeded, match="timeout has passed"):
        await turn.no_room()
    turn.leave()
    late = line.enter(priority=0, need_blocks=1, deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded, match=r"passed 1\.0 s ago"):
        await late.mine()
    late.leave()
    assert line.waiting == 0


async def test_who_is_put_out_of_a_full_line_is_told_at_once():
    cluster = Cluster(admission(max_queue=2), 0)
    flood = await cluster.start("f1", "f2", tenant="flood")
    quiet = await cluster.start("q1", tenant="quiet")
    assert isinstance(flood[1].exception(), Overloaded)
    cluster.free(2)
    await asyncio.gather(flood[0], *quiet)
    assert cluster.placed == ["f1", "q1"]
    assert cluster.line.waiting == 0


async def test_work_is_asked_for_only_when_somebody_waits():
    asked = []
    cluster = Cluster(admission(), 1)
    await cluster.request("a", work=lambda: asked.append("a") or 1.0)
    assert not asked
    (task,) = await cluster.start("b", work=lambda: asked.append("b") or 1.0)
    assert asked == ["b"]
    cluster.free(1)
    await task


async def test_tenants_take_turns():
    cluster = Cluster(admission(), 0)
    tasks = await cluster.start(*(f"f{n}" for n in range(20)), tenant="flood")
    tasks += await cluster.start("q0", "q1", tenant="quiet")
    for _ in range(22):
        cluster.free(1)
        await settle()
    await asyncio.gather(*tasks)
    assert max(cluster.placed.index(name) for name in ("q0", "q1")) <= 4
    assert [name for name in cluster.placed if name[0] == "f"] == [f"f{n}" for n in range(20)]


async def test_metrics_by_tenant():
    waited = []

    class Metrics:
        def waited(self, tenant: str, seconds: float) -> None:
            waited.append((tenant, seconds > 0))

    line = Admission(AdmissionConfig(), metrics=Metrics())
    cluster = Cluster(line, 1)
    await cluster.request("a", tenant="x")
    tasks = await cluster.start("b", tenant="y")
    assert (line.waiting_of("x"), line.waiting_of("y")) == (0, 1)
    cluster.free(1)
    await asyncio.gather(*tasks)
    assert waited == [("x", False), ("y", True)]

"""Thousands of transfers between processes that are killed, stopped and told to forget them, at any moment.

At rest nothing is held, and no wrong byte was ever committed.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.transfer_process import Process
from tests.nursery import Nursery
from tests.workers.transfer.pair import BLOCK, OWN_LAYOUTS

IO_TIMEOUT_S = 0.4  # a process that stands still for longer is given up
LEASE_S = 1.0
AT_ONCE = 24


class Storm:
    def __init__(self, nursery: Nursery, seed: int, prefill: int, decode: int) -> None:
        self.rng = random.Random(seed)
        self.nursery = nursery
        self.names = [f"p{i}" for i in range(prefill)], [f"d{i}" for i in range(decode)]
        self.up: dict[str, Process] = {}
        self.past: list[Process] = []
        self.over = False
        self.ended = 0  # transfers
        self.outcomes: Counter[str] = Counter()
        self.stems = [[self.rng.randrange(1000) for _ in range(60)] for _ in range(6)]

    async def launch(self, worker_id: str) -> None:
        rng = self.rng
        own = rng.choice(OWN_LAYOUTS)
        self.up[worker_id] = await Process(
            self.nursery,
            worker_id,
            num_blocks=rng.choice([160, 400]),
            ranks=rng.choice([1, 1, 2, 4, 8]),
            own=own,
            staged=own == "blkhtd" and rng.random() < 0.4,
            channels=rng.choice([["shm"], ["tcp"], ["shm", "tcp"]]),
            tcp_streams=rng.choice([1, 2, 3]),
            layer_groups=rng.choice([1, 2]),
            ring_memory=rng.choice([4096, 1 << 16]),
            io_timeout_s=IO_TIMEOUT_S,
            lease_s=LEASE_S,
        ).start()

    async def run(self, transfers: int, calm: float) -> None:
        """`calm`: transfers, on average, between two faults of a role: by the clock a fast machine would see few."""
        await asyncio.gather(*(self.launch(name) for name in (*self.names[0], *self.names[1])))
        left = iter(range(transfers))
        chaos = asyncio.gather(*(self.chaos(calm, names) for names in self.names))
        await asyncio.gather(*(self.client(left) for _ in range(AT_ONCE)))
        self.over = True
        await chaos
        await asyncio.gather(*(process.at_rest(30) for process in self.up.values()))
        for process in self.up.values():
            await process.kill()
        assert not [name for process in (*self.past, *self.up.values()) for name in process.wrong]

    async def client(self, left: Iterator[int]) -> None:
        for i in left:
            kind = self.fetch if self.rng.random() < 0.2 else self.hand_over
            self.outcomes[await asyncio.wait_for(kind(f"t{i}"), 60)] += 1
            self.ended += 1

    def prompt(self) -> list[int]:
        if self.rng.random() < 0.03:  # so that some prefixes are not everywhere yet
            self.stems[self.rng.randrange(6)] = [self.rng.randrange(1000) for _ in range(60)]
        stem = self.rng.choice(self.stems)[: self.rng.randrange(61)]
        return [*stem, *(self.rng.randrange(1000) for _ in range(self.rng.randrange(1, 80)))]

    async def hand_over(self, name: str) -> str:
        rng, prompt = self.rng, self.prompt()
        p, d = self.up[rng.choice(self.names[0])], self.up[rng.choice(self.names[1])]
        landed, left = d.event("landed", name), p.event("left", name)
        given: dict[str, Any] = {"ticket": None}
        while given.get("ticket") is None:
            given = await d.ask("reserve", "ticket", name=name, prompt=prompt, lease_s=LEASE_S)
            if given["event"] == "died":
                return "receiver died"
            await asyncio.sleep(0 if given["ticket"] else 0.02)
        p.tell("send", name=name, prompt=prompt, ticket=given["ticket"])
        whose = {0: [p], 1: [d], 2: [p, d]}.get(rng.randrange(12), [])
        if whose:
            await asyncio.wait([landed], timeout=rng.expovariate(1 / 0.02))
            for side in whose:
                await side.ask("cancel", "cancelled", name=name)
            if d in whose and not landed.done():
                return "cancelled"
        end = await landed
        if end["event"] == "died":
            return "receiver died"
        if end["right"] is None:
            return "lost"
        assert end["right"], name
        if p not in whose:
            told = await left  # committed: the sender hears so, or that the way broke behind it
            assert told["event"] == "died" or told["code"] in (None, "transfer_failed"), told
        return "committed"

    async def fetch(self, name: str) -> str:
        rng = self.rng
        stem = rng.choice(self.stems)
        holder, asks = rng.sample(list(self.up.values()), 2)
        prompt = [*stem, 1]
        end = await asks.ask(
            "fetch",
            "fetched",
            name=name,
            prompt=prompt,
            holder=holder.holder | {"num_blocks": len(stem) // BLOCK},
            give_up_s=rng.choice([rng.expovariate(1 / 0.3), 30.0]),
        )
        if end["event"] == "died":
            return "receiver died"
        assert end["right"], name
        return "fetched" if end["count"] else "not fetched"

    async def chaos(self, calm: float, names: list[str]) -> None:
        while not self.over:
            due = self.ended + calm * self.rng.uniform(0.5, 1.5)
            while self.ended < due and not self.over:  # noqa: ASYNC110 - nor right when one ends
                await asyncio.sleep(self.rng.random() * 0.01)
            worker_id = self.rng.choice(names)
            victim = self.up[worker_id]
            if self.rng.random() < 0.5:
                await victim.kill()
                self.past.append(victim)
                await self.launch(worker_id)
                self.outcomes["KILLED"] += 1
            else:
                victim.signal(signal.SIGSTOP)
                await asyncio.sleep(self.rng.choice([0.02, IO_TIMEOUT_S * 1.5, LEASE_S * 1.3]))
                victim.signal(signal.SIGCONT)
                self.outcomes["STOPPED"] += 1


def told(storm: Storm) -> dict[str, Any]:
    return dict(storm.outcomes.most_common())


@pytest.mark.timeout(60)
async def test_a_few_hundred_transfers(nursery: Nursery) -> None:
    storm = Storm(nursery, seed=1, prefill=2, decode=2)
    await storm.run(300, calm=75)
    print(told(storm))
    assert storm.outcomes["committed"] > 50, told(storm)
    assert storm.outcomes["fetched"] > 0, told(storm)
    assert storm.outcomes["KILLED"] + storm.outcomes["STOPPED"] > 1, told(storm)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_ten_thousand_transfers(nursery: Nursery) -> None:
    storm = Storm(nursery, seed=2, prefill=4, decode=4)
    await storm.run(10_000, calm=100)
    print(told(storm))
    assert storm.outcomes["committed"] > 3_000, told(storm)
    assert storm.outcomes["fetched"] > 100, told(storm)
    assert storm.outcomes["KILLED"] > 30, told(storm)
    assert storm.outcomes["STOPPED"] > 30, told(storm)

"""Workers of the KV plane as real processes that can be killed, stopped and told what to do.

They come from a nursery, as a new one has to cost milliseconds. Each is told what to do, and says what happened, in
lines of JSON on a socket of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import signal
import socket
import threading
import time
from typing import IO, Any, Self

import msgspec

from tests.nursery import Nursery
from tests.workers.transfer.pair import (
    BLOCK,
    DecodeSide,
    PatternEngine,
    PrefillSide,
    belongings,
    unrest,
    work,
)
from workers.engine.request import Request
from workers.protocol.messages import PrefixHolder, Ticket
from workers.transfer.remote_prefix import RemotePrefix


class Served:
    """One worker: sends, receives, fetches."""

    def __init__(self, sock: socket.socket, config: dict[str, Any]) -> None:
        self._told: IO[str] = sock.makefile("r")
        self._telling: IO[str] = sock.makefile("w")
        self._writing = threading.Lock()
        self._rng = random.Random(config["epoch"])
        self.engine = PatternEngine(config["num_blocks"], config["ranks"], config["own"])
        ways = {"staged": config["staged"], "io_timeout_s": config["io_timeout_s"]}
        self.out = PrefillSide(
            self.engine,
            config["channels"],
            worker_id=config["worker_id"],
            lease_s=config["lease_s"],
            ring_memory=config["ring_memory"],
            tcp_streams=config["tcp_streams"],
            layer_groups=config["layer_groups"],
            **ways,
        )
        self.into = DecodeSide(
            self.engine,
            ["shm", "tcp"],
            worker_id=config["worker_id"],
            epoch=config["epoch"],
            on_fetch=self.out.handoffs.send_prefix,
            on_end=self._landed,
            **ways,
        )
        self.out.on_end = self._left
        self._running = True
        self._fetching = 0
        threading.Thread(target=self._step, daemon=True).start()

    def say(self, event: str, **fields: Any) -> None:
        with self._writing, contextlib.suppress(OSError, ValueError):
            self._telling.write(json.dumps({"event": event} | fields) + "\n")
            self._telling.flush()

    def _landed(self, name: str) -> None:
        right = self.into.committed.pop(name, None)
        self.into.lost.pop(name, None)
        self.say("landed", name=name, right=right, reason=self.into.lost_reasons.pop(name, ""))

    def _left(self, name: str) -> None:
        self.say("left", name=name, code=self.out.ended.pop(name), reason=self.out.reasons.pop(name))

    def _step(self) -> None:
        while self._running:
            if not self.out.step():
                time.sleep(0.002)

    def serve(self) -> None:
        endpoints = msgspec.to_builtins(self.into.receiver.endpoints)
        self.say("up", endpoints=endpoints, ranks=len(self.engine.ranks))
        for line in self._told:
            message = json.loads(line)
            getattr(self, "do_" + message.pop("do"))(**message)
        os._exit(0)

    def do_reserve(self, name: str, prompt: list[int], lease_s: float) -> None:
        ticket = self.into.reserve(work(name, prompt), lease_s)
        self.say("ticket", name=name, ticket=msgspec.to_builtins(ticket))

    def do_send(self, name: str, prompt: list[int], ticket: Any) -> None:
        try:
            self.out.accept(work(name, prompt), msgspec.convert(ticket, Ticket))
        except ValueError as error:
            self.say("left", name=name, code="refused", reason=str(error))

    def do_cancel(self, name: str) -> None:
        self.into.cancel(name)
        self.out.cancel(name)
        self.say("cancelled", name=name)

    def do_fetch(self, name: str, prompt: list[int], holder: Any, give_up_s: float) -> None:
        self._fetching += 1
        holder = msgspec.convert(holder, PrefixHolder)
        threading.Thread(target=self._fetch, args=(name, prompt, holder, give_up_s), daemon=True).start()

    def _fetch(self, name: str, prompt: list[int], holder: PrefixHolder, give_up_s: float) -> None:
        request, scheduler = Request(work(name, prompt)), self.engine.scheduler
        with self.engine.lock:
            fill = scheduler.begin_fill(request, holder.num_blocks)
        count, right = 0, True
        if fill is not None:
            source: Any = RemotePrefix(request, holder, BLOCK, self.into.tickets, self.out.handoffs)
            end = time.monotonic() + give_up_s
            count = source.read(fill.hashes, fill.blocks, lambda: time.monotonic() < end)
            with self.engine.lock:
                for i, block in enumerate(fill.blocks[:count], fill.first_index + 1):
                    right = right and self.engine.block_holds(block, prompt[: i * BLOCK])
                scheduler.end_fill(fill, count)
        self._fetching -= 1
        self.say("fetched", name=name, count=count, right=right)

    def do_rest(self) -> None:
        held = unrest(self.into) | unrest(self.out) | ({"fetching": self._fetching} if self._fetching else {})
        peers = [[peer.worker_id, peer.epoch] for peer in self.out.handoffs._peers.values()]
        self.say("rest", held=held, peers=peers)

    def do_stop(self) -> None:
        """All but the process itself."""
        self.out.stop()
        self.into.stop()
        self._running = False

    def do_belongings(self) -> None:
        gc.collect()
        found = belongings()
        found["sockets"] -= 1  # this one
        found["memory"] -= 2 * len(self.engine.ranks)  # the caches, and what a mapping keeps open of each
        self.say("belongings", found={name: count for name, count in found.items() if count})


def serve(config: dict[str, Any], fd: int) -> None:
    """A child of the nursery."""
    logging.disable(
        logging.ERROR
    )  # being killed and cut off is what they are here for; tracebacks are still told
    faulthandler.register(signal.SIGUSR1)  # for whoever looks for what it waits for
    Served(socket.socket(fileno=fd), config).serve()


# --- on the side of the test -----------------------------------------------------------------------------------------

_next_epoch = iter(range(1, 1 << 40))


class Process:
    """A worker of the KV plane; a new one in its place has a new epoch."""

    def __init__(self, nursery: Nursery, worker_id: str, **config: Any) -> None:
        self.worker_id, self.epoch, self._nursery = worker_id, next(_next_epoch), nursery
        self.config: dict[str, Any] = {
            "worker_id": worker_id,
            "epoch": self.epoch,
            "num_blocks": 128,
            "ranks": 1,
            "own": "blkhtd",
            "staged": False,
            "channels": ["shm", "tcp"],
            "tcp_streams": 2,
            "layer_groups": 1,
            "ring_memory": 1 << 16,
            "io_timeout_s": 1.0,
            "lease_s": 1.0,
        } | config
        self.endpoints: list[Any] = []
        self.dead = False
        self.wrong: list[str] = []  # names of what was committed and not right
        self._waiting: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}

    async def start(self) -> Self:
        ours, theirs = socket.socketpair()
        self._child = self._nursery.fork(self.config, theirs.fileno())
        theirs.close()
        up = self.event("up")
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._listening = asyncio.create_task(self._listen())
        self.endpoints = (await up)["endpoints"]
        return self

    async def _listen(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self._heard(json.loads(line))
        self.dead = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"event": "died"})
        self._waiting.clear()

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("right") is False:
            self.wrong.append(message["name"])
        waiting = self._waiting.pop((message["event"], message.get("name", "")), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def event(self, event: str, name: str = "") -> asyncio.Future[dict[str, Any]]:
        """What comes next of this kind; or that the process has died."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if self.dead:
            future.set_result({"event": "died"})
        else:
            self._waiting[event, name] = future
        return future

    def tell(self, do: str, **fields: Any) -> None:
        if not self.dead:
            self._writer.write((json.dumps({"do": do} | fields) + "\n").encode())

    async def ask(self, do: str, event: str, **fields: Any) -> dict[str, Any]:
        answer = self.event(event, fields.get("name", ""))
        self.tell(do, **fields)
        return await answer

    @property
    def holder(self) -> dict[str, Any]:
        return {
            "worker_id": self.worker_id,
            "epoch": self.epoch,
            "endpoints": self.endpoints,
            "ranks": self.config["ranks"],
        }

    def signal(self, how: signal.Signals) -> None:
        self._child.signal(how)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self._listening
        self._writer.close()

    async def lets_go(self, timeout_s: float = 15.0) -> None:
        """Nothing is held any more."""
        end = time.monotonic() + timeout_s
        while held := (await self.ask("rest", "rest"))["held"]:
            assert time.monotonic() < end, f"{self.worker_id} holds {held}"
            await asyncio.sleep(0.05)

    async def at_rest(self, timeout_s: float = 15.0) -> None:
        """Nothing held; and nothing left, when it has stopped."""
        end = time.monotonic() + timeout_s
        await self.lets_go(timeout_s)
        self.tell("stop")
        while found := (await self.ask("belongings", "belongings"))["found"]:
            assert time.monotonic() < end, f"{self.worker_id} has left {found}"
            await asyncio.sleep(0.05)

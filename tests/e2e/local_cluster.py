"""A cluster of real processes without Ray: workers out of a nursery, a Valkey, and a dispatcher in the test's loop."""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.dispatch_metrics import DispatchMetrics
from router.generation import Generation, TokenChunk
from tests.nursery import Child, Nursery
from tests.valkey_server import EmbeddedValkey
from workers.protocol.messages import Sampling, StatusReply

SECRET = "a secret of the tests, long enough"
_names = itertools.count()


@functools.cache
def nursery() -> Nursery:
    """One for all tests, from the first that needs it on."""
    made = Nursery("tests.e2e.worker_process:serve")
    atexit.register(made.close)
    return made


@dataclass
class Process:
    worker_id: str
    role: str
    settings: dict[str, Any]
    child: Child | None = None
    followers: list[Child] = field(default_factory=list)  # its other tensor-parallel ranks
    epoch: int = 0


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)

    @property
    def cached_tokens(self) -> int:
        return max((chunk.cached_tokens for chunk in self.chunks), default=0)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


class LocalCluster:
    def __init__(
        self,
        model_path: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        engine: dict[str, Any] | None = None,
        prefill_engine: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        timeout_s: float = 5.0,
        expert_parallel: int = 1,
        experts: dict[str, Any] | None = None,
        tensor_parallel: dict[str, int] | None = None,
    ) -> None:
        """`expert_parallel`: workers of a pool that share the experts of the model; `experts`: an ExpertsConfig.
        `tensor_parallel`: ranks of each worker, by role."""
        self.model_path = model_path
        self._tensor_parallel = tensor_parallel or {}
        self._expert_parallel, self._experts = expert_parallel, experts or {}
        self.timeout_s = timeout_s
        self.received_tokens = 0
        base = {"num_threads": 1, "dtype": "float32", "num_blocks": 512} | (engine or {})
        self._transfer = transfer or {}
        self._router = RouterConfig.model_validate(router or {})
        self.name = f"test-{os.getpid()}-{next(_names)}"
        self.valkey = EmbeddedValkey()
        self._directory = tempfile.TemporaryDirectory(prefix="headrace-test-")
        self.processes = {
            f"{role}-{index}": Process(f"{role}-{index}", role, base | extra)
            for role, count, extra in (("prefill", prefill, prefill_engine or {}), ("decode", decode, {}))
            for index in range(count)
        }

    async def __aenter__(self) -> Self:
        self.valkey.start()
        for process in self.processes.values():
            self.launch(process.worker_id)
        self.dispatcher = Dispatcher(
            self._router,
            cluster=self.name,
            secret=SECRET,
            redis_url=self.valkey.url,
            metrics=DispatchMetrics(CollectorRegistry()),
            lease_s=float(self._transfer.get("lease_s", 10.0)),
        )
        await self.dispatcher.start()
        await self.wait_for_workers()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.stop()
        for process in self.processes.values():
            if process.child is not None:
                process.child.signal(signal.SIGCONT)
                process.child.signal(signal.SIGTERM)
        for process in self.processes.values():
            if process.child is not None and not process.child.ended(30):
                process.child.signal(signal.SIGKILL)
                raise AssertionError(f"{process.worker_id} did not end on SIGTERM")
            for rank, follower in enumerate(process.followers, 1):
                follower.signal(signal.SIGCONT)
                if not follower.ended(30):
                    follower.signal(signal.SIGKILL)
                    raise AssertionError(f"{process.worker_id} rank {rank} did not end with rank 0")
        self.valkey.close()
        self._directory.cleanup()

    # --- processes ---------------------------------------------------------------------------------------------------

    def launch(self, worker_id: str) -> None:
        process = self.processes[worker_id]
        process.epoch = max(int(time.time() * 1000), process.epoch + 1)
        ranks = self._tensor_parallel.get(process.role, 1)
        started = [self._start(process, rank, ranks) for rank in range(ranks)]
        process.child, process.followers = started[0], started[1:]

    def _start(self, process: Process, rank: int, ranks: int) -> Child:
        worker_id = process.worker_id
        config = {
            "worker_id": worker_id,
            "epoch": process.epoch,
            "role": process.role,
            "model_path": str(self.model_path),
            "served_name": "model",
            "cluster": self.name,
            "secret": SECRET,
            "redis_url": self.valkey.url,
            "heartbeat_s": 0.2,
            "timeout_s": self.timeout_s,
            "engine": process.settings,
            "transfer": self._transfer,
            "experts": self._experts,
            "expert_rank": self._expert_rank(process),
            "tensor_rank": {"rank": rank, "size": ranks} if ranks > 1 else None,
        }
        path = Path(self._directory.name) / f"{worker_id}-{rank}.json"
        path.write_text(json.dumps(config))
        with (Path(self._directory.name) / f"{worker_id}.log").open("ab") as log:
            return nursery().fork({"arguments": [str(path)]}, log.fileno())

    def _expert_rank(self, process: Process) -> dict[str, Any] | None:
        size = self._expert_parallel
        if size == 1:
            return None
        group, rank = divmod(int(process.worker_id.rpartition("-")[2]), size)
        return {"group": f"{process.role}-ep{group}", "rank": rank, "size": size}

    def kill(self, worker_id: str, how: signal.Signals = signal.SIGKILL) -> None:
        child = self.processes[worker_id].child
        assert child is not None
        child.signal(how)
        if how is signal.SIGKILL:
            assert child.ended(30)

    def log(self, worker_id: str) -> str:
        return (Path(self._directory.name) / f"{worker_id}.log").read_text()

    async def wait_for_workers(self, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while True:
            up = {
                (m.info.worker_id, m.info.epoch)
                for m in self.dispatcher.fleet.members()
                if m.link.state == "up"
            }
            if up == {(p.worker_id, p.epoch) for p in self.processes.values()}:
                return
            for process in self.processes.values():
                if process.child is None or process.child.ended():
                    raise AssertionError(f"{process.worker_id} died:\n{self.log(process.worker_id)}")
            missing = [p for p in self.processes.values() if (p.worker_id, p.epoch) not in up]
            assert time.monotonic() < end, "\n".join(
                f"{p.worker_id} does not come up:\n{self.log(p.worker_id)}" for p in missing
            )
            await asyncio.sleep(0.05)

    # --- requests ----------------------------------------------------------------------------------------------------

    async def ask(self, name: str, prompt: list[int], **sampling: Any) -> Answer:
        options = {"max_tokens": 16, "seed": 0, "temperature": 0.0} | sampling
        cache_salt = options.pop("cache_salt", "")
        answer = Answer()
        async for chunk in self.dispatcher.generate(
            Generation(name, prompt, Sampling(**options), cache_salt=cache_salt)
        ):
            answer.chunks.append(chunk)
            answer.tokens += chunk.tokens
            self.received_tokens += len(chunk.tokens)
        return answer

    async def ask_all(self, prompts: list[list[int]], *, name: str = "r", **sampling: Any) -> list[Answer]:
        return list(
            await asyncio.gather(*(self.ask(f"{name}{i}", p, **sampling) for i, p in enumerate(prompts)))
        )

    async def wait_for_tokens(self, count: int, timeout_s: float = 30.0) -> None:
        """Until the open requests have received `count` tokens more."""
        goal, end = self.received_tokens + count, time.monotonic() + timeout_s
        while self.received_tokens < goal:
            assert time.monotonic() < end, f"{self.received_tokens} of {goal} tokens"
            await asyncio.sleep(0.002)

    async def status(self) -> dict[str, StatusReply]:
        links = [m.link for m in self.dispatcher.fleet.members() if m.link.state == "up"]
        replies = await asyncio.gather(*(link.query(want_hashes=True, timeout_s=10) for link in links))
        return {link.worker_id: reply for link, reply in zip(links, replies, strict=True)}

    async def assert_at_rest(self, timeout_s: float = 15.0) -> None:
        """Nothing referenced, leased, booked or owned anywhere, and the index is what the workers hold."""
        end = time.monotonic() + timeout_s
        while True:
            problems = await self._unrest()
            if not problems:
                return
            assert time.monotonic() < end, problems
            await asyncio.sleep(0.1)

    async def _unrest(self) -> list[str]:
        problems = []
        for worker_id, reply in (await self.status()).items():
            for what in ("referenced_blocks", "leases", "requests"):
                if getattr(reply, what):
                    problems.append(f"{worker_id}: {getattr(reply, what)} {what}")
            load = reply.load
            if load.running or load.waiting or load.reserved or load.sending:
                problems.append(f"{worker_id}: {load}")
            if set(reply.hashes) != set(self.dispatcher.index.hashes(worker_id)):
                problems.append(
                    f"{worker_id}: index has {len(self.dispatcher.index.hashes(worker_id))} hashes, "
                    f"the worker {len(reply.hashes)}"
                )
        if self.dispatcher.book.num_open:
            problems.append(f"{self.dispatcher.book.num_open} bookings are open")
        if self.dispatcher.admission.waiting:
            problems.append(f"{self.dispatcher.admission.waiting} requests wait")
        return problems

"""Fake workers registered in a real Valkey by the real publisher, and a real dispatcher in front of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from router.config import AdmissionConfig, PolicyConfig, RouterConfig
from router.dispatch import Dispatcher
from router.dispatch_metrics import DispatchMetrics
from router.generation import Generation
from tests.router.fake_worker import SECRET, FakeWorker, expected_output
from workers.protocol.messages import Role, Sampling
from workers.publisher import Publisher

LEASE_S = 0.9


class FakeCluster:
    def __init__(
        self,
        redis_url: str,
        *,
        policy: PolicyConfig | None = None,
        admission: AdmissionConfig | None = None,
        timeout_s: float = 1.0,
        lease_s: float = 1.0,
    ) -> None:
        self.redis_url = redis_url
        self.peers: dict[str, FakeWorker] = {}  # workers that are alive
        self.workers: list[FakeWorker] = []  # every life of every worker
        self.publishers: dict[FakeWorker, Publisher] = {}
        self.restart_after_s: float | None = None
        self._epoch = 0
        self._restarts: set[asyncio.Task] = set()
        self.registry = CollectorRegistry()
        self.dispatcher = Dispatcher(
            RouterConfig(
                policy=policy or PolicyConfig(),
                admission=admission or AdmissionConfig(queue_timeout_s=10, stall_timeout_s=5),
                heartbeat_s=0.1,
                timeout_s=timeout_s,
            ),
            cluster="test",
            secret=SECRET.decode(),
            redis_url=redis_url,
            lease_s=lease_s,
            poll_s=0.03,
            metrics=DispatchMetrics(self.registry),
            rng=random.Random(0),
        )

    async def __aenter__(self) -> FakeCluster:
        await self.dispatcher.start()
        return self

    async def __aexit__(self, *exc) -> None:
        self.restart_after_s = None
        for task in self._restarts:
            task.cancel()
        await self.dispatcher.stop()
        for worker in self.workers:
            worker.die()
        for publisher in self.publishers.values():
            await asyncio.to_thread(publisher.close)

    # --- workers ----------------------------------------------------------------------------------------------------

    async def add(self, worker_id: str, role: Role, **kwargs) -> FakeWorker:
        self._epoch += 1
        worker = FakeWorker(
            worker_id, role, epoch=self._epoch, peers=self.peers, on_death=self._died, **kwargs
        )
        info = await worker.start()
        publisher = Publisher(info, self.redis_url, "test", LEASE_S, worker.cached)
        worker.on_cache = publisher.publish
        publisher.start()
        worker.kwargs = kwargs
        self.workers.append(worker)
        self.publishers[worker] = publisher
        return worker

    async def start(self, *, decodes: int = 1, prefills: int = 1, **kwargs) -> None:
        for n in range(decodes):
            await self.add(f"d{n}", "decode", **kwargs)
        for n in range(prefills):
            await self.add(f"p{n}", "prefill", **kwargs)
        await self.all_up()

    def __getitem__(self, worker_id: str) -> FakeWorker:
        """Its present life."""
        return self.peers[worker_id]

    def _died(self, worker: FakeWorker) -> None:
        publisher = self.publishers.get(worker)
        if publisher is not None:  # its thread dies with it: the lease runs out, nothing is said
            publisher._closing = True
        if self.restart_after_s is not None:
            task = asyncio.create_task(self._restart(worker))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _restart(self, worker: FakeWorker) -> None:
        await asyncio.sleep(self.restart_after_s)
        await self.add(worker.worker_id, worker.role, **worker.kwargs)

    async def all_up(self) -> None:
        await until(
            lambda: (
                {m.info.worker_id for m in self.dispatcher.fleet.members() if m.state == "up"}
                == set(self.peers)
            )
        )

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(self, generation: Generation) -> list[int]:
        """The whole answer; checks that the stream is well-formed."""
        tokens: list[int] = []
        finished = None
        async for chunk in self.dispatcher.generate(generation):
            assert finished is None, "a chunk after the last"
            tokens += chunk.tokens
            finished = chunk.finish_reason
        assert finished is not None
        return tokens

    async def check(self, generation: Generation) -> None:
        assert await self.generate(generation) == expected_output(generation.prompt, generation.sampling)

    async def at_rest(self) -> None:
        """Nothing is booked, held or waited for, anywhere."""
        book, dispatcher = self.dispatcher.book, self.dispatcher
        await until(
            lambda: all(worker.num_held == 0 for worker in self.workers if not worker.stalled),
            message=lambda: str([(w.worker_id, w.epoch, w.held, w.prefills) for w in self.workers]),
        )
        assert book.num_open == 0
        assert dispatcher.admission.waiting == 0
        assert dispatcher._in_flight == 0
        for member in dispatcher.fleet.members():
            assert member.link.num_requests == 0

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def generation(
    number: int = 0, *, prompt: int = 200, max_tokens: int = 20, seed: int = 7, **kwargs
) -> Generation:
    tokens = [(number * 7919 + i * 31) % 50_000 for i in range(prompt)]
    sampling = Sampling(max_tokens=max_tokens, seed=seed, **kwargs)
    return Generation(request_id=f"r{number}", prompt=tokens, sampling=sampling)


async def until(
    condition: Callable[[], bool],
    timeout_s: float = 30.0,
    message: Callable[[], str] = lambda: "did not come true",
) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, message()
        await asyncio.sleep(0.005)

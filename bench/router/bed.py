"""The processes that stand for one measurement: Valkey, simulated workers, the router, the plain app; and one window.

The router, and the plain app when it is its turn, has the first core for itself. All the others share the second.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.router.grpc_load import GrpcLoad
from bench.router.load import HttpLoad
from bench.router.process import Child, cpu_seconds, pin, resident_bytes
from bench.router.work import Scenario, Work
from cluster.valkey import EmbeddedValkey
from router.chat.tokenizer import TextTokenizer

SERVER_CORE, OTHER_CORE = 0, 1
_OPEN_S = 120.0  # for thousands of streams to be open


@dataclass(frozen=True)
class Window:
    """What happened in a span of time. CPU seconds are those of processes, not of the clock on the wall."""

    seconds: float
    answers: int
    events: int
    server_cpu_s: float
    worker_cpu_s: float
    client_cpu_s: float
    latencies_s: list[float]  # of whole answers
    ages_s: list[float]  # of streamed tokens, from being sent by the worker (the plain app) to the client

    @property
    def busy(self) -> float:
        """Share of its core that the server used."""
        return self.server_cpu_s / self.seconds


class Bed:
    """`with Bed(...) as bed:` The processes end with the block."""

    def __init__(
        self,
        model_path: Path,
        *,
        prefill: int,
        decode: int,
        tells_index: bool,
        profile: Path | None,
        seed: int,
    ) -> None:
        self._model_path = model_path
        self._told = {"prefill": prefill, "decode": decode, "tells_index": tells_index}
        self._profile = profile
        self._seed = seed
        self._stack = ExitStack()

    def __enter__(self) -> Bed:
        pin(OTHER_CORE)
        tokenizer = TextTokenizer(self._model_path)
        self.work = Work(tokenizer, self._seed)
        self._clock = self.work.clock_of_text()
        secret = secrets.token_hex(16)
        with ExitStack() as stack:
            valkey = EmbeddedValkey()
            valkey.start()
            stack.callback(valkey.stop)
            self.worker = stack.enter_context(
                Child(
                    "bench.router.simulated_worker",
                    OTHER_CORE,
                    secret=secret,
                    redis_url=valkey.url,
                    clock_ids=[token_id for token_id, _ in self.work.clock],
                    vocab_size=tokenizer.vocab_size,
                    **self._told,
                )
            )
            self.router = stack.enter_context(
                Child(
                    "bench.router.router_process",
                    SERVER_CORE,
                    secret=secret,
                    redis_url=valkey.url,
                    model_path=str(self._model_path),
                    workers=self._told["prefill"] + self._told["decode"],
                    profile=None if self._profile is None else str(self._profile),
                )
            )
            self.plain = stack.enter_context(Child("bench.router.plain_app", SERVER_CORE))
            self._teach_plain()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _teach_plain(self) -> None:
        """The bytes that the router sends."""
        answers = []
        for scenario in (self.work.whole("ids", 1), self.work.stream("", 1, 0.0)):
            response = httpx.post(
                f"http://127.0.0.1:{self.router.answer['http_port']}{scenario.path}", json=scenario.bodies[0]
            )
            response.raise_for_status()
            answers.append(response.content)
        told = self.work.plain_answers(*answers)
        usage = json.loads(answers[0])["usage"]
        assert usage["completion_tokens"] == scenario_tokens(self.work.whole("ids", 1)), usage
        self.plain.tell(**told)

    async def measure(self, server: str, scenario: Scenario, warm_s: float, seconds: float) -> Window:
        """`server`: router, grpc (the router again) or plain. Raises RuntimeError when a request fails."""
        child = self.plain if server == "plain" else self.router
        if server == "grpc":
            self.worker.tell(step_s=scenario.step_s)
            return await self._measure_grpc(scenario, warm_s, seconds)
        if server == "router":
            self.worker.tell(step_s=scenario.step_s)
            load = HttpLoad(scenario.requests(), self._clock, scenario.streams)
        else:
            self.plain.tell(step_s=scenario.step_s, num_tokens=scenario_tokens(scenario))
            load = HttpLoad(
                scenario.requests("/stream" if scenario.streams else "/whole"), self._clock, scenario.streams
            )
        await load.open(child.answer["http_port"], scenario.connections)
        try:
            await asyncio.sleep(warm_s)
            return await self._window(child, load, seconds)
        finally:
            load.close()
            self.plain.tell()
            await asyncio.sleep(0.3)  # for what is open to be cancelled

    async def _measure_grpc(self, scenario: Scenario, warm_s: float, seconds: float) -> Window:
        load = GrpcLoad(scenario.bodies)
        await load.open(self.router.answer["grpc_port"], scenario.connections)
        try:
            await asyncio.sleep(warm_s)
            return await self._window(self.router, load, seconds)
        finally:
            await load.close()
            await asyncio.sleep(0.3)

    async def memory(self, streams: int) -> dict[str, Any]:
        """Of the router, before and while so many streams are open and get a token a second."""
        before = resident_bytes(self.router.pid)
        self.worker.tell(step_s=1.0)
        load = HttpLoad(self.work.stream("", streams, 1.0).requests(), self._clock, True)
        try:
            await load.open(self.router.answer["http_port"], streams)
            async with asyncio.timeout(_OPEN_S):
                # Each has its role and some tokens. Asked ten times a second: an event for each would cost the client.
                while load.counts.events < 4 * streams:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            during = resident_bytes(self.router.pid)
            if load.counts.failures:
                raise RuntimeError(f"{len(load.counts.failures)} streams failed: {load.counts.failures[0]!r}")
        finally:
            load.close()
            await asyncio.sleep(2.0)
        after = resident_bytes(self.router.pid)
        return {"streams": streams, "before_bytes": before, "open_bytes": during, "after_bytes": after}

    async def _window(self, child: Child, load: HttpLoad | GrpcLoad, seconds: float) -> Window:
        counts = load.counts
        counts.latencies_s.clear()
        counts.ages_s.clear()
        answers, events = counts.answers, counts.events
        cpu = cpu_seconds(child.pid), cpu_seconds(self.worker.pid), time.process_time()
        begun = time.perf_counter()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - begun
        now = cpu_seconds(child.pid), cpu_seconds(self.worker.pid), time.process_time()
        if counts.failures:
            raise RuntimeError(f"{len(counts.failures)} requests failed: {counts.failures[0][:500]!r}")
        return Window(
            took,
            counts.answers - answers,
            counts.events - events,
            *(after - before for before, after in zip(cpu, now, strict=True)),
            latencies_s=sorted(counts.latencies_s),
            ages_s=sorted(counts.ages_s),
        )


def scenario_tokens(scenario: Scenario) -> int:
    tokens: Any = scenario.bodies[0]["max_tokens"]
    return int(tokens)

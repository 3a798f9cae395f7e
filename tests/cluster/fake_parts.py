"""Stand-ins for what runs inside the processes: a worker without a model, a router without a fleet."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from cluster.parts import Parts
from cluster.router_replica import RouterSettings
from workers.config import WorkerConfig
from workers.protocol import redis_keys
from workers.protocol.messages import KvLayout, WorkerInfo

WORKER = "tests.cluster.fake_parts:FakeWorker"
NOTES = "HEADRACE_TEST_NOTES"  # a directory where each life writes its epoch and process id
ROUTER = "tests.cluster.fake_parts:FakeRouter"


class FakeWorker:
    """Registers and renews its lease like a real one. served_name `broken` fails to start."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._rank = config.tensor_rank.rank if config.tensor_rank else 0
        self._over = threading.Event()

    def start(self) -> WorkerInfo:
        config = self._config
        if config.served_name == "broken":
            raise ValueError("this model is broken")
        assert config.redis_url is not None
        self._redis = redis.Redis.from_url(config.redis_url)
        self._lease = redis_keys.lease(config.cluster, config.worker_id)
        if self._rank == 0:  # the others register nowhere
            self._renew()
            threading.Thread(target=self._beat, daemon=True).start()
        if directory := os.environ.get(NOTES):
            name = f"{config.worker_id}.{self._rank}" if self._rank else config.worker_id
            (Path(directory) / name).write_text(f"{config.epoch} {os.getpid()}")
        logging.getLogger("workers.fake").info("fake worker is up, threads %s", os.environ["OMP_NUM_THREADS"])
        return WorkerInfo(
            worker_id=config.worker_id,
            epoch=config.epoch,
            role=config.role,
            address="127.0.0.1:1",
            model=config.served_name,
            layout=KvLayout(1, 1, 8, 16, "float32", "00"),
            hash_root=b"\0" * 16,
            num_blocks=1,
            max_model_len=16,
            max_num_seqs=1,
            vocab_size=8,
            device=config.engine.device,
            pid=os.getpid(),
        )

    def _renew(self) -> None:
        self._redis.set(self._lease, self._config.epoch, px=int(self._config.timeout_s * 1000))

    def _beat(self) -> None:
        while not self._over.wait(self._config.heartbeat_s):
            try:
                self._renew()
            except redis.RedisError:
                continue  # it comes back

    def wait(self) -> None:
        self._over.wait()

    def drain(self, timeout_s: float) -> bool:
        return True

    def stop(self) -> None:
        self._over.set()
        if self._rank == 0:
            self._redis.delete(self._lease)


class FakeRouter:
    """Answers /ready and /cluster."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        http = self._settings.router.http
        self._server = await asyncio.start_server(self._answer, http.host, http.port, reuse_port=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(
            {"model": {"name": "fake"}, "redis": "ok", "workers": [], "queue": 0, "in_flight": 0}
        )
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()


@dataclass(frozen=True)
class FakePrepared:
    path: Path = Path("/nowhere")
    served_name: str = "fake"


def fake_prepare(name: str, say: Callable[[str], None]) -> Any:
    directory = Path(os.environ.get(NOTES, "/nowhere")).parent
    return FakePrepared(directory / "model", name)


def fake_parts() -> Parts:
    return Parts(worker_class=WORKER, router_class=ROUTER, prepare=fake_prepare)

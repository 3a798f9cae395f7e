"""When blocks leave: with the end of each chunk of a prompt, or layer by layer while it is computed.

A prefill and a decode worker with the default model, and a router that is only this program: seconds from the
reservation to the first token, over wires of different speed. A slow wire is made by pacing the sender's sockets.
"""

from __future__ import annotations

import multiprocessing
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.spread import interleaved
from workers.config import EngineConfig, TransferConfig, WorkerConfig
from workers.models.catalog import prepare_model
from workers.protocol.frames import from_worker, greet, recv_frame, send_frame
from workers.protocol.messages import Cancel, Heartbeat, Prefill, Reserve, Sampling, Ticketed, Tokens, Work
from workers.transfer import channel
from workers.worker import Worker

_SECRET = "a secret of the benchmark's own"
_SO_MAX_PACING_RATE = 47
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Wire:
    name: str
    road: str
    bytes_per_s: int | None = None  # None: as fast as it goes


WIRES = (
    Wire("shm", "shm"),
    Wire("tcp, loopback", "tcp"),
    Wire("tcp, 10 Gbit/s", "tcp", 1_250_000_000),
    Wire("tcp, 1 Gbit/s", "tcp", 125_000_000),
)


def _serve(conn: Any, role: str, name: str, wire: Wire, groups: int, threads: int) -> None:
    if wire.bytes_per_s is not None:
        connect = channel._connect

        def paced(*arguments: Any) -> socket.socket:
            sock = connect(*arguments)
            sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, wire.bytes_per_s)
            return sock

        channel._connect = paced
    worker = Worker(
        WorkerConfig(
            worker_id=name,
            epoch=1,
            role=role,  # type: ignore[arg-type]
            model_path=prepare_model(MODEL).path,
            served_name="model",
            cluster="bench",
            secret=_SECRET,
            timeout_s=600.0,  # nobody sends pings here
            engine=EngineConfig(num_threads=threads),
            # One stream: pacing is for each socket.
            transfer=TransferConfig(channels=[wire.road], layer_groups=groups, tcp_streams=1),  # type: ignore[list-item]
        )
    )
    conn.send(worker.start().address)
    conn.recv()
    worker.stop()


class _Link:
    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._sock = socket.create_connection((host, int(port)), timeout=60)
        greet(self._sock, _SECRET.encode(), "bench", from_worker)

    def send(self, message: Any) -> None:
        send_frame(self._sock, message)

    def next(self, kind: type) -> Any:
        while not isinstance(message := recv_frame(self._sock, from_worker), kind):
            if not isinstance(message, Heartbeat | Tokens):
                raise RuntimeError(f"{message} where {kind.__name__} was due")
        return message


class _Setup:
    """Two workers of their own for one wire and one number of layer groups."""

    def __init__(self, wire: Wire, groups: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._conns, self._links = [], []
        for role in ("prefill", "decode"):
            conn, theirs = context.Pipe()
            arguments = (theirs, role, f"{role}-0", wire, groups, threads)
            context.Process(target=_serve, args=arguments, daemon=True).start()
            self._conns.append(conn)
        self._prefill, self._decode = (_Link(conn.recv()) for conn in self._conns)
        self._count = 0

    def first_token(self, prompt: list[int]) -> float:
        self._count += 1
        work = Work(f"r{self._count}", prompt, Sampling(max_tokens=4, seed=0, temperature=0.0))
        began = time.perf_counter()
        self._decode.send(Reserve(work, f"t{self._count}", 30.0, 0))
        ticket = self._decode.next(Ticketed).ticket
        self._prefill.send(Prefill(work, ticket))
        self._decode.next(Tokens)
        seconds = time.perf_counter() - began
        self._decode.send(Cancel(work.request_id))
        return seconds

    def stop(self) -> None:
        for conn in self._conns:
            conn.send(None)


def measure(lengths: Sequence[int], groups: Sequence[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    found = []
    for wire in WIRES:
        setups = {count: _Setup(wire, count, threads) for count in groups}
        try:
            for length in lengths:
                seconds: dict[int, list[float]] = {count: [] for count in groups}
                for number, count in interleaved(list(groups), rounds + 1):
                    prompt = [rng.randrange(1000, 40000) for _ in range(length)]
                    taken = setups[count].first_token(prompt)
                    if number:  # the first opens the channels
                        seconds[count].append(taken)
                found.append({"wire": wire.name, "prompt_tokens": length, "seconds": seconds})
        finally:
            for setup in setups.values():
                setup.stop()
    return found

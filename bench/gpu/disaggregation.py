"""What prompts of others do to streams: read by the worker that writes them, or by another process on the same GPU.

python -m bench.gpu.disaggregation [--model DIRECTORY] [--json FILE]

A decode worker in this process writes many streams while prompts of 8,192 tokens arrive: none; read here, in chunks
between the streams' tokens; or read by a prefill worker, a process of its own on the same GPU, whose blocks come over
CUDA IPC. Both are what `headrace serve` runs, below the sockets for tokens: Serving, Receiver, Handoffs.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import model
from bench.gpu.engine import settings
from bench.gpu.rows import Rows, parser
from workers.config import TransferConfig, WorkerConfig
from workers.engine.engine import Engine
from workers.metrics import WorkerMetrics
from workers.protocol.messages import (
    Failed,
    Prefill,
    PrefillDone,
    Reserve,
    Role,
    Sampling,
    Ticketed,
    Tokens,
    Work,
    WorkerInfo,
)
from workers.serving import Serving
from workers.transfer.block_memory import block_memory
from workers.transfer.receiver import Receiver

_SECRET = "a secret of the benchmark's own"
_HERE, _ELSEWHERE = 1 << 30, 0  # prompt tokens that the decode worker reads itself
_START_S, _ANSWER_S = 180.0, 60.0


@dataclass(frozen=True)
class Sizes:
    streams: int = 32
    context: int = 1024
    stream_tokens: int = 4096  # more than the time is enough for
    seconds: float = 6.0
    prompt: int = 8192
    every_s: float = 0.75
    written: int = 16  # tokens after each prompt
    chunk: int = 2048  # that the decode worker reads at a time
    num_blocks: int = 9_000


TINY = Sizes(
    streams=3,
    context=20,
    stream_tokens=1000,
    seconds=0.6,
    prompt=90,
    every_s=0.2,
    written=3,
    chunk=32,
    num_blocks=300,
)


class Side:
    """A worker without its server for routers."""

    def __init__(self, role: Role, path: Path, sizes: Sizes, rehearse: bool, changes: dict[str, Any]) -> None:
        config = WorkerConfig(
            worker_id=role,
            epoch=1,
            role=role,
            model_path=path,
            served_name="random",
            cluster="bench",
            secret=_SECRET,
            engine=settings(
                rehearse,
                num_blocks=sizes.num_blocks,
                max_num_seqs=sizes.chunk if sizes.chunk < 64 else 64,
                max_num_batched_tokens=sizes.chunk if role == "decode" else sizes.prompt,
                **changes,
            ),
            transfer=TransferConfig(channels=["cuda_ipc", "shm", "tcp"], lease_s=30.0, io_timeout_s=30.0),
        )
        self.engine = engine = Engine(config.engine, model.prepared(path), share_kv=role == "prefill")
        memories = [block_memory(engine.runner.kv_cache, engine.layout, engine.runner.shared)]
        self.serving = Serving(config, engine, memories, WorkerMetrics(role, role, "random"))
        self._receiver = Receiver(
            self.serving.tickets,
            memories,
            engine.layout,
            config.transfer,
            secret=_SECRET.encode(),
            on_fetch=self.serving.handoffs.send_prefix,
        )
        self.serving.tickets.endpoints = self._receiver.endpoints
        self._receiver.start(
            WorkerInfo(
                worker_id=role,
                epoch=1,
                role=role,
                address="",
                model="random",
                layout=engine.layout,
                hash_root=engine.hash_root,
                num_blocks=engine.num_blocks,
                max_model_len=engine.max_model_len,
                max_num_seqs=engine.max_num_seqs,
                vocab_size=engine.vocab_size,
                device=str(engine.device),
                pid=0,
            )
        )
        self.serving.start()

    def stop(self) -> None:
        self.serving.stop()
        self._receiver.stop()
        self.engine.close()


class Outbox:
    """The router's end: what is said of a request, and when. Called under the engine's lock."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.times: dict[str, list[float]] = {}
        self.tokens: list[int] = []  # of all its requests
        self.failures: list[str] = []

    def send(self, message: Any) -> None:
        if isinstance(message, Tokens):
            now = time.perf_counter()
            for delta in message.deltas:
                self.times.setdefault(delta.request_id, []).extend([now] * len(delta.tokens))
                self.tokens += delta.tokens
            return
        if isinstance(message, Failed):
            self.failures.append(f"{message.request_id}: {message.message}")
        self.said.put(message)


def _prefill_process(conn: Any, path: Path, sizes: Sizes, rehearse: bool, changes: dict[str, Any]) -> None:
    side = Side("prefill", path, sizes, rehearse, changes)
    outbox = Outbox()
    threading.Thread(target=_pass_on, args=(outbox, conn), daemon=True).start()
    conn.send("ready")
    while (message := conn.recv()) is not None:
        side.serving.prefill(outbox, message)
    side.stop()


def _pass_on(outbox: Outbox, conn: Any) -> None:
    while True:
        conn.send(outbox.said.get())


class Bench:
    def __init__(self, path: Path, rows: Rows, rehearse: bool, **changes: Any) -> None:
        """`changes`: of EngineConfig."""
        self._rows, self._tiny = rows, rehearse
        self._sizes = TINY if rehearse else Sizes()
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        args = (theirs, path, self._sizes, rehearse, changes)
        self._process = context.Process(target=_prefill_process, args=args, daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed
        self._side = Side("decode", path, self._sizes, rehearse, changes)
        if not self._conn.poll(_START_S):
            raise RuntimeError(f"the prefill worker is not ready after {_START_S:.0f} s")
        self._conn.recv()
        self._rng = random.Random(0)
        self._names = map(str, itertools.count())
        self._roads: set[str] = set()

    def run(self) -> None:
        with self._rows.part("the same prompts"):  # which also compiles, captures and opens channels
            prompts = [self._ids(self._sizes.prompt - short) for short in range(3)]
            same = [self._answer(prompt, "here") == self._answer(prompt, "elsewhere") for prompt in prompts]
            # On a GPU in bfloat16 not all need be: other chunks round otherwise.
            self._rows.add(case="the same prompts", prompts=len(prompts), same_tokens=sum(same) / len(same))
        for where, name in (
            ("", "no prompts"),
            ("here", "read by the same worker"),
            ("elsewhere", "read by a prefill worker"),
            ("", "no prompts"),
        ):
            with self._rows.part(name) as time_left:
                if time_left:
                    self._measure(name, where)

    def _answer(self, prompt: list[int], where: str) -> list[int]:
        outbox, wanted = Outbox(), self._sizes.written
        self._reserve(outbox, prompt, wanted, where)
        _until(lambda: _whole(outbox, wanted), outbox, self._hear)
        return outbox.tokens

    def _measure(self, name: str, where: str) -> None:
        sizes, serving = self._sizes, self._side.serving
        streams = Outbox()
        ids = [
            self._reserve(streams, self._ids(sizes.context), sizes.stream_tokens, "here")
            for _ in range(sizes.streams)
        ]
        _until(lambda: all(len(streams.times.get(one, ())) > 4 for one in ids), streams)
        began = time.perf_counter()
        prompts: list[tuple[float, Outbox]] = []
        while (now := time.perf_counter()) < began + sizes.seconds:
            if where and now >= began + len(prompts) * sizes.every_s:
                outbox = Outbox()
                prompts.append((now, outbox))
                self._reserve(outbox, self._ids(sizes.prompt), sizes.written, where)
            self._hear()
            time.sleep(0.001)
        ended = time.perf_counter()
        for one in ids:
            serving.cancel(one)
        for _, outbox in prompts:
            _until(lambda outbox=outbox: _whole(outbox, sizes.written), outbox, self._hear)  # type: ignore[misc]
        gaps = sorted(
            after - before
            for one in ids
            for before, after in itertools.pairwise(t for t in streams.times[one] if began <= t <= ended)
        )
        first = sorted(next(iter(outbox.times.values()))[0] - at for at, outbox in prompts)
        row: dict[str, Any] = {
            "case": name,
            "batch": sizes.streams,
            "context": sizes.context,
            "prompts": len(prompts),
        }
        if where == "elsewhere":
            row["road"] = ", ".join(sorted(self._roads))
        if not self._tiny:
            row |= {
                "itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
                "itl_p99_ms": gaps[len(gaps) * 99 // 100] * 1e3,
                "itl_max_ms": gaps[-1] * 1e3,
                "tokens_per_s": len(gaps) / (ended - began),
                "prompt_ttft_ms": first[len(first) // 2] * 1e3 if first else None,
            }
        self._rows.add(**row)

    def _ids(self, count: int) -> list[int]:
        return self._rng.choices(range(self._side.engine.vocab_size), k=count)

    def _reserve(self, outbox: Outbox, ids: list[int], tokens: int, where: str) -> str:
        """Its name. Where it is read elsewhere, that is asked for, too."""
        name, read_here = next(self._names), _HERE if where == "here" else _ELSEWHERE
        sampling = Sampling(max_tokens=tokens, seed=0, temperature=0.0, ignore_eos=True)
        work = Work(request_id=name, prompt=ids, sampling=sampling)
        self._side.serving.reserve(outbox, Reserve(work, f"t{name}", 30.0, read_here))
        answer = outbox.said.get(timeout=_ANSWER_S)
        if isinstance(answer, Failed):
            raise RuntimeError(answer.message)
        if isinstance(answer, Ticketed):
            self._conn.send(Prefill(work, answer.ticket))
        return name

    def _hear(self) -> None:
        """What the prefill worker says."""
        while self._conn.poll():
            message = self._conn.recv()
            if isinstance(message, Failed):
                raise RuntimeError(f"the prefill worker: {message.message}")
            if isinstance(message, PrefillDone):
                self._roads.add(message.channel)

    def stop(self) -> None:
        self._conn.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
        self._side.stop()


def _whole(outbox: Outbox, tokens: int) -> bool:
    return any(len(times) >= tokens for times in outbox.times.values())


def _until(done: Any, outbox: Outbox, meanwhile: Any = lambda: None) -> None:
    end = time.monotonic() + _ANSWER_S
    while not done():
        meanwhile()
        if outbox.failures:
            raise RuntimeError(outbox.failures[0])
        if time.monotonic() > end:
            raise RuntimeError(f"no end after {_ANSWER_S:.0f} s")
        time.sleep(0.002)


def main() -> None:
    options = parser("bench.gpu.disaggregation", __doc__).parse_args()
    rows = Rows(options.json, options.seconds)
    if not options.rehearse and not torch.cuda.is_available():
        rows.note(skipped="torch sees no GPU")
        rows.end()
        return
    with model.model_at(options.model, model.TINY if options.rehearse else model.LLAMA_8B) as path:
        bench = Bench(path, rows, options.rehearse)
        try:
            bench.run()
        finally:
            bench.stop()
    rows.end()


if __name__ == "__main__":
    main()

"""A prefill and a decode worker in this process, and one request that goes through both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.workers.test_worker import SECRET, Client, at_rest, remote, until, work
from workers.config import EngineConfig, TransferConfig, WorkerConfig
from workers.protocol.messages import Prefill, PrefillDone, Ticketed
from workers.worker import Worker


@dataclass(frozen=True)
class WorkerPair:
    prefill: Worker
    decode: Worker

    def generate(self, prompt: list[int], max_tokens: int) -> tuple[list[int], PrefillDone]:
        """Greedy tokens, and what the prefill worker says of the hand-over. Both are at rest behind it."""
        to_decode, to_prefill = Client(self.decode.info.address), Client(self.prefill.info.address)
        asked = work(prompt, max_tokens)
        to_decode.send(remote(asked))
        to_prefill.send(Prefill(asked, to_decode.next(Ticketed).ticket))
        done = to_prefill.next(PrefillDone)
        tokens = to_decode.tokens(asked.request_id)
        until(lambda: at_rest(self.decode) and at_rest(self.prefill))
        to_decode.close()
        to_prefill.close()
        return tokens, done


@contextmanager
def worker_pair(model: Path, engine: EngineConfig, road: str) -> Iterator[WorkerPair]:
    started: dict[str, Worker] = {}
    try:
        for role in ("prefill", "decode"):
            started[role] = Worker(
                WorkerConfig(
                    worker_id=role,
                    epoch=1,
                    role=role,  # type: ignore[arg-type]
                    model_path=model,
                    served_name="tiny",
                    cluster="c",
                    secret=SECRET,
                    heartbeat_s=0.1,
                    transfer=TransferConfig(channels=[road]),  # type: ignore[list-item]
                    engine=engine,
                )
            )
            started[role].start()
        yield WorkerPair(**started)
    finally:
        for worker in started.values():
            worker.stop()

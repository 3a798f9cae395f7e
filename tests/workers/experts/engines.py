"""Engines in one process, a thread each, that are the ranks of a group."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workers.config import EngineConfig, ExpertsConfig
from workers.engine.engine import Completion, Engine
from workers.engine.plan import StepResult
from workers.engine.request import Request
from workers.experts.messages import Member
from workers.experts.plane import ExpertPlane, Place
from workers.models.catalog import prepare_model
from workers.protocol.messages import KvLayout, Sampling, Work, WorkerInfo

SECRET = b"a secret of sixteen bytes"


class Noticeboard:
    """A directory without Redis."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}

    def enter(self, member: Member) -> None:
        self._members[member.rank] = member

    def read(self) -> list[Member]:
        return list(self._members.values())


class RankEngine:
    """One rank: an engine that steps on a thread of its own, as a worker's does."""

    def __init__(
        self,
        model: Path,
        board: Noticeboard,
        rank: int,
        size: int,
        epoch: int = 1,
        engine: dict[str, Any] | None = None,
        **experts: Any,
    ) -> None:
        place = Place("g", rank, size, f"rank-{rank}", epoch)
        self.plane = ExpertPlane(
            place,
            ExpertsConfig(**experts),
            board,
            host="127.0.0.1",
            secret=SECRET,
            heartbeat_s=0.2,
            timeout_s=5.0,
        )
        defaults = {
            "device": "cpu",
            "dtype": "float32",
            "kernels": "torch",
            "num_blocks": 64,
            "num_threads": 1,
        }
        config = EngineConfig(**(defaults | (engine or {})))
        self.engine = Engine(config, prepare_model(str(model)), experts=self.plane)
        self.group = self.plane.group
        self.steps = 0
        self.failure: BaseException | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._results: dict[str, tuple[Completion, threading.Event]] = {}
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.plane.on_wake = self._wake.set
        self.plane.start(_info(place, self.engine.layout))
        self._thread.start()

    def submit(self, prompt: list[int], sampling: Sampling) -> Callable[[], list[int]]:
        """What waits for the tokens."""
        name = f"request-{next(self._ids)}"
        completion, done = self._results[name] = Completion(), threading.Event()
        with self.engine.lock:
            self.engine.scheduler.add(Request(Work(request_id=name, prompt=prompt, sampling=sampling)))
        self._wake.set()

        def result() -> list[int]:
            deadline = time.monotonic() + 60
            while not done.wait(0.1):
                assert self.failure is None, self.failure
                assert time.monotonic() < deadline, f"{self.group.status}"
            return completion.tokens

        return result

    def stop(self) -> None:
        """Without a word to anybody but what the sockets say."""
        self._stopping = True
        self.plane.close()
        self._wake.set()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if self.engine.step(self._deliver):
                    self.steps += 1
                else:
                    self._wake.wait(0.1)
        except BaseException as error:  # noqa: BLE001
            self.failure = error

    def _deliver(self, result: StepResult) -> None:
        for new in result.tokens:
            completion, done = self._results[new.request.request_id]
            completion.tokens.append(new.token)
            if new.request.finish_reason is not None:
                done.set()


class Group:
    """All ranks; `with` stops them."""

    def __init__(self, model: Path, size: int, **settings: Any) -> None:
        self._model, self._size, self._settings = model, size, settings
        self.board = Noticeboard()
        self.ranks = [self.make(rank) for rank in range(size)]

    def make(self, rank: int, epoch: int = 1) -> RankEngine:
        return RankEngine(self._model, self.board, rank, self._size, epoch, **self._settings)

    def __enter__(self) -> Group:
        until(lambda: all(rank.group.status.view > 0 for rank in self.ranks), "the ranks do not meet")
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.stop()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def expected(model: Path, prompts: Sequence[list[int]], sampling: Sampling, **engine: Any) -> list[list[int]]:
    """What one engine with all experts writes."""
    defaults = {"device": "cpu", "dtype": "float32", "kernels": "torch", "num_blocks": 64, "num_threads": 1}
    whole = Engine(EngineConfig(**(defaults | engine)), prepare_model(str(model)))
    return [completion.tokens for completion in whole.generate(prompts, sampling)]


def _info(place: Place, layout: KvLayout) -> WorkerInfo:
    return WorkerInfo(
        worker_id=place.worker_id,
        epoch=place.epoch,
        role="decode",
        address="",
        model="m",
        layout=layout,
        hash_root=b"",
        num_blocks=1,
        max_model_len=1,
        max_num_seqs=1,
        vocab_size=1,
        device="cpu",
        pid=0,
    )

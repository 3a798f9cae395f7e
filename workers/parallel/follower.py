"""The process of a rank that is not 0: it computes its part of every step that rank 0 tells it of."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from typing import Any

import msgspec
import torch

from workers.config import WorkerConfig
from workers.engine.backend import Runner, choose_device, open_backend
from workers.engine.pending import Pending
from workers.models.catalog import prepare_model
from workers.parallel.link import RankLink, find_leader
from workers.parallel.lockstep import followed_step
from workers.parallel.messages import Beat, Begin, Broken, Fits, Meet, Step, Stop
from workers.parallel.process_group import RankGroup, open_store, own_device
from workers.parallel.rank_memory import lend
from workers.parallel.shard import Shard
from workers.parallel.team import CLOSE_S, JOIN_S, START_S
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import WorkerInfo

logger = logging.getLogger(__name__)


class Follower:
    """To whoever starts and ends it, a worker. It serves nobody."""

    def __init__(self, config: WorkerConfig) -> None:
        assert config.tensor_rank is not None, "there is nobody to follow"
        self.config = config
        self._shard = Shard(config.tensor_rank.rank, config.tensor_rank.size)
        self._ending, self._over = threading.Lock(), False
        self._ended = threading.Event()
        self._closing: threading.Thread | None = None
        self._failure: str | None = None
        self._link: RankLink | None = None
        self._group: RankGroup | None = None
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()

    def start(self) -> WorkerInfo:
        """Meet rank 0, load this rank's part of the model. What is answered is rank 0's, but for the process.

        Raises ModelError, ValueError, OSError, ProtocolError, GroupError.
        """
        name = f"{self.config.worker_id}:{self.config.epoch} rank {self._shard.rank}"
        self._link, info = find_leader(
            self.config, self._shard.rank, time.monotonic() + START_S, self._heed_stop
        )
        threading.Thread(target=self._beat, name="rank-beat", daemon=True).start()
        try:
            runner = self._prepare(self._link)
        except Exception as error:
            self._end(f"rank {self._shard.rank} could not start: {error}")
            raise
        threading.Thread(target=self._receive, name="rank-receive", daemon=True).start()
        threading.Thread(target=self._run, args=(runner,), name="rank-steps", daemon=True).start()
        logger.info("%s of %d follows, with %s", name, self._shard.size, runner.kernels)
        return msgspec.structs.replace(info, pid=os.getpid(), device=str(runner.device))

    def wait(self) -> None:
        """Until `stop`, or until rank 0 says so. Raises RuntimeError when something was amiss."""
        self._ended.wait()
        if self._closing is not None:
            self._closing.join(CLOSE_S)
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def drain(self, timeout_s: float) -> bool:
        """Requests are rank 0's affair."""
        return True

    def stop(self) -> None:
        self._end(None)

    # --- start -------------------------------------------------------------------------------------------------------

    def _prepare(self, link: RankLink) -> Runner:
        config = self.config
        device = own_device(choose_device(config.engine.device), self._shard.rank)
        meet = _expect(link, Meet)
        assert config.tensor_rank is not None, "there is nobody to follow"
        store, collectives = open_store(meet.at, JOIN_S), config.tensor_rank.collectives
        self._group = RankGroup(store, self._shard, device, JOIN_S, collectives)
        backend = open_backend(config.engine, prepare_model(str(config.model_path)), parallel=self._group)
        link.send(Fits(backend.num_blocks()))
        runner = backend.runner(_expect(link, Begin).num_blocks, share_kv=True)
        ready, fd = lend(runner.shared)
        try:
            link.send(ready, fd)
        finally:
            if fd is not None:
                os.close(fd)
        return runner

    def _heed_stop(self) -> None:
        if self._over:
            raise ConnectionError("this rank was stopped")

    # --- life --------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        assert self._link is not None
        with contextlib.suppress(OSError):  # rank 0 is gone: whoever reads from it says so
            while not self._ended.wait(self.config.heartbeat_s):
                self._link.send(Beat())

    def _receive(self) -> None:
        assert self._link is not None
        try:
            while True:
                message, _ = self._link.receive()
                if isinstance(message, Stop):
                    self._end(None)
                    return
                if not isinstance(message, Step):
                    raise ProtocolError(f"it says {type(message).__name__} between steps")
                self._steps.put(message)
        except (OSError, ProtocolError) as error:
            self._end(f"rank 0 is gone: {error}")

    def _run(self, runner: Runner) -> None:
        if runner.device.type == "cuda":
            torch.cuda.set_device(runner.device)  # of this thread
        try:
            running: Pending | None = None
            while (step := self._steps.get()) is not None:
                pending = runner.submit(followed_step(step))
                if running is not None:
                    running.wait()
                running = pending
                if not runner.overlaps:
                    running.wait()
                    running = None
        except Exception as error:
            if not self._over:
                logger.exception("a step failed on rank %d", self._shard.rank)
            self._end(f"a step failed on rank {self._shard.rank}: {error}")

    def _end(self, failure: str | None) -> None:
        """Once; what comes after the first is its consequence."""
        with self._ending:
            if self._over:
                return
            self._over, self._failure = True, failure
        self._steps.put(None)
        if self._link is not None:
            if failure is not None:
                with contextlib.suppress(OSError):
                    self._link.send(Broken(failure))
            self._link.close()
        if self._group is not None:
            self._closing = self._group.close()
        self._ended.set()


def _expect(link: RankLink, kind: type[Any]) -> Any:
    message, _ = link.receive()
    if not isinstance(message, kind):
        raise ProtocolError(f"rank 0 says {type(message).__name__}, not {kind.__name__}")
    return message

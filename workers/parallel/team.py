"""Rank 0 and its followers: how a replica's ranks come together, what rank 0 tells them, and how it notices a loss.

Rank 0 is the worker: scheduler, token server and transfer are there. A follower computes its part of each step that it
is told of, and lends rank 0 its KV cache, which so can send and receive the blocks of all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from workers.config import WorkerConfig
from workers.engine.backend import Backend, Runner
from workers.experts.gloo import GlooStore
from workers.parallel.link import RankDoor, RankLink
from workers.parallel.lockstep import LockstepRunner, RankLost
from workers.parallel.messages import Beat, Begin, Broken, Fits, Meet, Ready, Step, Stop
from workers.parallel.process_group import GroupError, RankGroup, open_store
from workers.parallel.rank_memory import lent_memory
from workers.parallel.shard import Shard
from workers.protocol.frames import ProtocolError, encode
from workers.protocol.messages import KvLayout, WorkerInfo
from workers.transfer.block_memory import BlockMemory

logger = logging.getLogger(__name__)

CLOSE_S = 5.0  # for connections between ranks to be given back
JOIN_S = 60.0  # for ranks that have met to connect with each other
START_S = 600.0  # for another rank to come, or to make its KV cache; the supervisor ends whoever takes longer


class Team:
    """Of a worker whose configuration has `tensor_rank`."""

    def __init__(self, config: WorkerConfig, device: torch.device) -> None:
        """Returns when all ranks are here. Raises TimeoutError, OSError, GroupError."""
        assert config.tensor_rank is not None, "there are other ranks"
        self.size = config.tensor_rank.size
        self.lost: str | None = None
        self._timeout_s = config.timeout_s
        self._changed = threading.Condition()
        self._fits: dict[int, int] = {}
        self._ready: dict[int, tuple[Ready, int | None]] = {}
        self._links: list[RankLink] = []
        self._group: RankGroup | None = None
        self._closing: threading.Thread | None = None
        door = RankDoor(config)
        try:
            self._links = door.gather(introduction(config), self.size, time.monotonic() + START_S)
        finally:
            door.close()
        for rank, link in enumerate(self._links, 1):
            link.expect_within(None)  # who loads a model or compiles may be silent for long
            threading.Thread(target=self._listen, args=(rank, link), name="rank", daemon=True).start()
        self._store = GlooStore("127.0.0.1", JOIN_S)
        with _at_start():
            self._tell(Meet(self._store.at))
        store, shard = open_store(self._store.at, JOIN_S), Shard(0, self.size)
        self._group = RankGroup(store, shard, device, JOIN_S, config.tensor_rank.collectives)

    @property
    def group(self) -> RankGroup:
        if self._group is None:
            raise GroupError(f"the ranks were parted: {self.lost}")
        return self._group

    def lead(self, backend: Backend) -> Backend:
        return _LockstepBackend(backend, self)

    def num_blocks(self, backend: Backend) -> int:
        """Of which each rank has room for its part. What is measured for it, all measure at a time. Raises GroupError."""
        own = backend.num_blocks()
        self._await(self._fits, "loaded")
        return min(own, *self._fits.values())

    def begin(self, backend: Backend, num_blocks: int, share_kv: bool) -> Runner:
        """All ranks make their KV caches and whatever a runner needs besides. Raises GroupError."""
        with _at_start():
            self._tell(Begin(num_blocks))
            runner = backend.runner(num_blocks, share_kv)
        self._await(self._ready, "ready")
        return LockstepRunner(runner, self, self.size)

    def memories(self, layout: KvLayout, like: torch.Tensor) -> list[BlockMemory]:
        """The KV caches of the ranks behind this one, in order; `like`: that of rank 0. Called once."""
        return [
            lent_memory(*self._ready[rank], layout, Shard(rank, self.size), like)
            for rank in range(1, self.size)
        ]

    def tell(self, step: Step) -> None:
        self._tell(step)

    def lose(self, reason: str) -> RankLost:
        with self._changed:
            first, self.lost = self.lost is None, self.lost or reason
            self._changed.notify_all()
        if first:
            logger.error("the ranks part: %s", reason)
            self._part()
        return RankLost(self.lost)

    def close(self) -> None:
        """In order. Idempotent."""
        with self._changed:
            if self.lost is not None:
                return
            self.lost = "the worker has stopped"
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(Stop())
        self._part()
        if self._closing is not None:
            self._closing.join(CLOSE_S)

    def _await(self, told: Mapping[int, object], what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.lost or len(told) == self.size - 1, START_S)
        if self.lost or len(told) < self.size - 1:
            raise GroupError(str(self.lose(f"not all ranks were {what} after {START_S:g} s")))

    def _part(self) -> None:
        """Followers see the end of their connections, and whoever waits for one of them here is woken."""
        for link in self._links:
            link.close()
        self._closing = None if self._group is None else self._group.close()

    def _tell(self, message: Any) -> None:
        frame = encode(message)
        for rank, link in enumerate(self._links, 1):
            try:
                link.send_frame(frame)
            except OSError as error:
                raise self.lose(f"rank {rank} takes nothing: {error}") from error

    def _listen(self, rank: int, link: RankLink) -> None:
        try:
            while True:
                message, fd = link.receive()
                if isinstance(message, Broken):
                    raise ProtocolError(message.reason)
                with self._changed:
                    if isinstance(message, Fits):
                        self._fits[rank] = message.num_blocks
                    elif isinstance(message, Ready):
                        self._ready[rank] = message, fd
                        link.expect_within(self._timeout_s)
                    elif not isinstance(message, Beat):
                        raise ProtocolError(f"it says {type(message).__name__}")
                    self._changed.notify_all()
        except TimeoutError:
            self.lose(f"rank {rank} gives no sign of life")
        except (OSError, ProtocolError) as error:
            self.lose(f"rank {rank} is gone: {error}")


@contextlib.contextmanager
def _at_start() -> Iterator[None]:
    """Nothing runs yet that a lost rank would have to be told apart from."""
    try:
        yield
    except RankLost as error:
        raise GroupError(str(error)) from error


class _LockstepBackend:
    def __init__(self, backend: Backend, team: Team) -> None:
        self._backend, self._team = backend, team
        self.layout = backend.layout

    def num_blocks(self) -> int:
        return self._team.num_blocks(self._backend)

    def runner(self, num_blocks: int, share_kv: bool = False) -> Runner:
        return self._team.begin(self._backend, num_blocks, share_kv)


def introduction(config: WorkerConfig) -> WorkerInfo:
    """Before anything of the model is known."""
    return WorkerInfo(
        worker_id=config.worker_id,
        epoch=config.epoch,
        role=config.role,
        address="",
        model=config.served_name,
        layout=KvLayout(0, 0, 0, 0, "", ""),
        hash_root=b"",
        num_blocks=0,
        max_model_len=0,
        max_num_seqs=0,
        vocab_size=0,
        device="",
        pid=os.getpid(),
    )

"""Tensor-parallel ranks as threads of one process: the real group over gloo, without the start of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed

from workers.parallel.process_group import RankGroup
from workers.parallel.shard import Shard

T = TypeVar("T")


class Ranks:
    """`each` calls a function on every rank at a time and gives what they return, rank by rank."""

    def __init__(self, size: int, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        store = torch.distributed.HashStore()
        cpu = torch.device("cpu")
        begun = [pool.submit(RankGroup, store, Shard(rank, size), cpu, 60.0) for rank in range(size)]
        self.groups = [one.result() for one in begun]

    def each(self, call: Callable[[RankGroup], T]) -> list[T]:
        running = [self._pool.submit(call, group) for group in self.groups]
        return [one.result() for one in running]


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    with ThreadPoolExecutor(size) as pool:
        found = Ranks(size, pool)
        yield found
        for group in found.groups:
            group.close()

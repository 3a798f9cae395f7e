"""What tensor-parallel ranks compute together. `ALONE` is the one rank of a whole model: nothing is exchanged."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.parallel.shard import WHOLE, Shard


class Parallel(Protocol):
    """This rank among the others, all of which make the same calls in the same order.

    On a GPU nothing is waited for: the work is queued on the current stream, and can be captured in a graph.
    """

    @property
    def shard(self) -> Shard: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place, the same bits on each. `x` is contiguous."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, n] of each rank -> [R, size * n]."""

    def broadcast(self, x: Tensor) -> None:
        """What rank 0 has in `x`, contiguous, everybody has."""


class _Alone:
    shard = WHOLE

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> None:
        pass


ALONE: Parallel = _Alone()

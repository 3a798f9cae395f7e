"""Every step of rank 0 is a step of all ranks: it hands them the arrays before it begins."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kernels.cpu.decoder import StepArrays
from workers.engine.backend import Runner
from workers.engine.pending import Pending
from workers.engine.plan import Sampled
from workers.engine.step_input import StepInput
from workers.parallel.messages import Step

_INT32 = ("token_ids", "positions", "query_start", "lengths", "blocks", "block_start", "rows")


class RankLost(BaseException):
    """The ranks don't compute together any more.

    No Exception: one that a step raises fails the step's requests, but these go on elsewhere when the worker ends.
    """


class Others(Protocol):
    """The other ranks."""

    def tell(self, step: Step) -> None:
        """Raises RankLost."""

    def lose(self, reason: str) -> RankLost:
        """From here on the ranks don't compute together; what is to be raised."""


class LockstepRunner:
    """Rank 0's runner of the engine. `kv_cache` is this rank's part."""

    def __init__(self, runner: Runner, others: Others, size: int) -> None:
        self._runner, self._others = runner, others
        self.device, self.weights = runner.device, runner.weights
        self.kernels, self.overlaps = f"{runner.kernels}, {size} ranks", runner.overlaps
        self.kv_cache, self.shared = runner.kv_cache, runner.shared
        self.captured = runner.captured

    def watch_next(self) -> None:
        return None

    def submit(self, step: StepInput) -> Pending:
        self._others.tell(step_message(step))
        try:
            return _Watched(self._runner.submit(step), self._others)
        except Exception as error:  # the others are in the middle of this step, and wait for this rank
            raise self._others.lose(f"a step failed on rank 0: {error}") from error

    def run(self, step: StepInput) -> list[Sampled]:
        return self.submit(step).wait()


class _Watched:
    def __init__(self, pending: Pending, others: Others) -> None:
        self._pending, self._others = pending, others

    def wait(self) -> list[Sampled]:
        try:
            return self._pending.wait()
        except Exception as error:
            raise self._others.lose(f"a step failed on rank 0: {error}") from error


def step_message(step: StepInput) -> Step:
    arrays = {name: getattr(step.arrays, name).tobytes() for name in ("slots", *_INT32)}
    return Step(carried=list(step.carried), **arrays)


def followed_step(message: Step) -> StepInput:
    """Raises ValueError for bytes that are no whole numbers of integers."""
    # Copies: what came is not writable, and torch refuses such arrays.
    int32 = {name: np.frombuffer(getattr(message, name), np.int32).copy() for name in _INT32}
    arrays = StepArrays(slots=np.frombuffer(message.slots, np.int64).copy(), **int32)
    return StepInput(arrays, [], message.carried)

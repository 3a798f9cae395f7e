"""Calls that must end in time. A collective that hangs sits in C where no exception reaches it: it is aborted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kernels.nccl_tests.errors import CollectiveFailed, CollectiveTimeout, NcclTestError

T = TypeVar("T")
_LOOK_S = 0.5  # between two looks for an error in the background
_GRACE_S = 5.0  # that an aborted call gets to return


class Watched:
    """A thread of its own for one rank's calls, which the caller watches.

    It is a daemon: a call that not even `abort` frees keeps nobody from leaving.
    """

    def __init__(
        self,
        timeout_s: float,
        abort: Callable[[], None],
        error: Callable[[], str | None] = lambda: None,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._abort = abort
        self._error = error
        self._grace_s = grace_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], _Outcome] | None] = queue.SimpleQueue()
        self.broken = False
        threading.Thread(target=self._serve, name="collectives", daemon=True).start()

    def call(self, what: str, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """`what` is said of the function in errors. Raises CollectiveTimeout, CollectiveFailed.

        `timeout_s` 0 waits without end, for what is no collective.
        """
        if self.broken:
            raise CollectiveFailed(f"{what}: not started, an earlier collective was aborted")
        limit = self._timeout_s if timeout_s is None else timeout_s
        outcome = _Outcome()
        self._calls.put((function, outcome))
        deadline = time.monotonic() + limit
        while not outcome.done.wait(
            min(_LOOK_S, max(0.0, deadline - time.monotonic())) if limit else _LOOK_S
        ):
            if limit and time.monotonic() >= deadline:
                self._give_up(outcome)
                raise CollectiveTimeout(f"{what}: not done after {limit:g} s, aborted")
            if (error := self._error()) is not None:
                self._give_up(outcome)
                raise CollectiveFailed(f"{what}: {error}")
        if isinstance(outcome.error, NcclTestError):
            raise outcome.error
        if outcome.error is not None:
            raise CollectiveFailed(f"{what}: {outcome.error}") from outcome.error
        result: T = outcome.result
        return result

    def close(self) -> None:
        self._calls.put(None)

    def _give_up(self, outcome: _Outcome) -> None:
        self.broken = True
        # abort() may itself wait for what hangs.
        threading.Thread(target=self._abort, name="abort", daemon=True).start()
        outcome.done.wait(self._grace_s)

    def _serve(self) -> None:
        while (job := self._calls.get()) is not None:
            function, outcome = job
            try:
                outcome.result = function()
            except Exception as error:  # noqa: BLE001 - handed to the caller
                outcome.error = error
            outcome.done.set()


class _Outcome:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

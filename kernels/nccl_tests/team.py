"""All ranks together, wherever they are: each step is asked of every member at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kernels.nccl_tests.collectives import About
from kernels.nccl_tests.errors import NcclTestError
from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.rank import Repeats, Result

_MORE_S = 1.0  # that others get to say what they saw once a rank has failed
_MOST_MESSAGES = 4


class Member(Protocol):
    """A rank in this process, behind a socket, or in a Ray actor."""

    def about(self) -> About: ...

    def make_id(self) -> str: ...

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None: ...

    def allocate(self, send_bytes: int, recv_bytes: int) -> None: ...

    def measure(self, case: Case, repeats: Repeats) -> Result: ...

    def close(self) -> None: ...


class TeamError(NcclTestError):
    """What one or more ranks said when they failed."""


class Team:
    """Members in the order of their ranks."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    def about(self) -> list[About]:
        return self._ask(lambda member, rank: member.about())

    def join(self) -> None:
        unique_id = self._members[0].make_id()
        self._ask(lambda member, rank: member.join(unique_id, rank, len(self)))

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._ask(lambda member, rank: member.allocate(send_bytes, recv_bytes))

    def measure(self, case: Case, repeats: Repeats) -> list[Result]:
        return self._ask(lambda member, rank: member.measure(case, repeats))

    def close(self) -> None:
        self._ask(lambda member, rank: member.close())

    def _ask(self, what: Callable[[Member, int], Any]) -> list[Any]:
        """Answers by rank. Raises TeamError as soon as one fails: the others may hang for that very reason."""
        answers: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()

        def run(member: Member, rank: int) -> None:
            try:
                answers.put((rank, what(member, rank), None))
            except Exception as error:  # noqa: BLE001 - raised by the one who asked
                answers.put((rank, None, error))

        for rank, member in enumerate(self._members):
            threading.Thread(target=run, args=(member, rank), daemon=True).start()
        found: dict[int, Any] = {}
        while len(found) < len(self._members):
            rank, answer, error = answers.get()
            if error is not None:
                self._fail(error, answers, len(self._members) - len(found) - 1)
            found[rank] = answer
        return [found[rank] for rank in range(len(self._members))]

    def _fail(self, first: Exception, answers: queue.SimpleQueue[Any], outstanding: int) -> None:
        errors = [first]
        deadline = time.monotonic() + _MORE_S
        for _ in range(outstanding):
            try:
                _, _, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if error is not None:
                errors.append(error)
        messages = list(dict.fromkeys(str(error) or type(error).__name__ for error in errors))
        more = len(messages) - _MOST_MESSAGES
        tail = [f"and {more} ranks more"] if more > 0 else []
        raise TeamError("\n  ".join([*messages[:_MOST_MESSAGES], *tail])) from first

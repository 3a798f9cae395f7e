"""What this replica has booked on each worker: load that is on its way, before any heartbeat can tell of it.

Booked once, released exactly once; at rest everything is zero. The book answers what a worker carries *now*: its
last report tells of everybody's requests but is old, the book tells only of ours but is fresh. So

    load now  =  max(reported − ours at the time of the report, 0)  +  ours now

where the first term is what other replicas have there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.protocol.messages import Load


@dataclass(frozen=True, slots=True)
class Booked:
    """Work of this replica on one worker."""

    prefill_tokens: int = 0  # to be computed before a first token
    decode_blocks: int = 0  # KV blocks in use
    requests: int = 0


@dataclass(slots=True)
class _Account:
    prefill_tokens: int = 0
    decode_blocks: int = 0
    requests: int = 0
    reported: Load = field(default_factory=Load)
    at_report: Booked = field(default_factory=Booked)

    def booked(self) -> Booked:
        return Booked(self.prefill_tokens, self.decode_blocks, self.requests)


class Booking:
    """One entry of the book. Whoever made it releases it, once."""

    __slots__ = ("_account", "_book", "decode_blocks", "prefill_tokens", "released", "worker_id")

    def __init__(
        self, book: LoadBook, worker_id: str, account: _Account, prefill_tokens: int, decode_blocks: int
    ) -> None:
        self.worker_id = worker_id
        self.prefill_tokens = prefill_tokens
        self.decode_blocks = decode_blocks
        self.released = False
        self._book = book
        self._account = account
        book.num_open += 1
        account.prefill_tokens += prefill_tokens
        account.decode_blocks += decode_blocks
        account.requests += 1

    def release(self) -> None:
        """Raises RuntimeError the second time: a double release would hide load from the policy for ever."""
        if self.released:
            raise RuntimeError(f"booking on {self.worker_id} released twice")
        self.released = True
        self._book.num_open -= 1
        self._account.prefill_tokens -= self.prefill_tokens
        self._account.decode_blocks -= self.decode_blocks
        self._account.requests -= 1


class LoadBook:
    """Reports and bookings by worker. Pure; not thread-safe."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self.num_open = 0  # bookings not yet released, on workers that are gone too; zero at rest

    def book(self, worker_id: str, *, prefill_tokens: int = 0, decode_blocks: int = 0) -> Booking:
        return Booking(self, worker_id, self._account(worker_id), prefill_tokens, decode_blocks)

    def report(self, worker_id: str, load: Load) -> None:
        """A heartbeat came in."""
        account = self._account(worker_id)
        account.reported = load
        account.at_report = account.booked()

    def forget(self, worker_id: str) -> None:
        """The worker is gone. Bookings that are still open keep their account and are released as ever."""
        self._accounts.pop(worker_id, None)

    def booked(self, worker_id: str) -> Booked:
        account = self._accounts.get(worker_id)
        return Booked() if account is None else account.booked()

    def queued_prefill_tokens(self, worker_id: str) -> int:
        """Prompt tokens that wait to be computed there, now."""
        account = self._accounts.get(worker_id)
        if account is None:
            return 0
        others = account.reported.queued_prefill_tokens - account.at_report.prefill_tokens
        return max(others, 0) + account.prefill_tokens

    def active_blocks(self, worker_id: str) -> int:
        """KV blocks in use there, now."""
        account = self._accounts.get(worker_id)
        if account is None:
            return 0
        return (
            max(account.reported.active_blocks - account.at_report.decode_blocks, 0) + account.decode_blocks
        )

    def _account(self, worker_id: str) -> _Account:
        return self._accounts.setdefault(worker_id, _Account())

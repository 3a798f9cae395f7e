"""What this replica has booked on each worker: load that is on its way, before any heartbeat can tell of it.

Booked once, released exactly once; at rest everything is zero. The book answers what a worker carries *now*: its
last report tells of everybody's requests but is old, the book tells only of ours but is fresh. So

    load now  =  max(reported − ours at the time of the report, 0)  +  ours now

where the first term is what other replicas have there. What is ours shrinks while it is computed: reports say how many
prompt tokens a worker has computed in all, and it computes the oldest first. (Of several replicas each takes this for
progress of its own, until there is none left to make; the first term then grows by as much, so that the sum holds.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.protocol.messages import Load, prefill_pairs

_SAME_PACE = (
    0.15  # a pace that differs by less is the same: policies sort by it, and measuring is never quiet
)


@dataclass(frozen=True, slots=True)
class Booked:
    """Work of this replica on one worker."""

    prefill_tokens: int = 0  # to be computed before a first token
    prefill_pairs: int = 0  # of these and the positions that they attend to
    decode_blocks: int = 0  # KV blocks in use
    requests: int = 0


@dataclass(slots=True)
class Account:
    """What is known of the load of one life of one worker."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_blocks: int = 0
    requests: int = 0
    reported: Load = field(default_factory=Load)
    at_report: Booked = field(default_factory=Booked)
    prefill_token_s: float = 0.0  # as reported, small changes left out
    prefill_pair_s: float = 0.0
    decode_step_s: float = 0.0
    _prefills: dict[Booking, None] = field(default_factory=dict)  # with tokens left to compute, oldest first
    _heard: bool = False
    _recent: float = 0.0  # time average of `requests`, as of `_since`
    _since: float = 0.0

    def booked(self) -> Booked:
        return Booked(self.prefill_tokens, self.prefill_pairs, self.decode_blocks, self.requests)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens that wait to be computed there, now."""
        others = self.reported.queued_prefill_tokens - self.at_report.prefill_tokens
        return max(others, 0) + self.prefill_tokens

    @property
    def queued_prefill_pairs(self) -> int:
        """The same in pairs of a token and a position that it attends to: what attention takes grows with these."""
        return max(self.reported.queued_prefill_pairs - self.at_report.prefill_pairs, 0) + self.prefill_pairs

    @property
    def active_blocks(self) -> int:
        """KV blocks in use there, now."""
        return max(self.reported.active_blocks - self.at_report.decode_blocks, 0) + self.decode_blocks

    def recent_requests(self, now: float, window_s: float) -> float:
        """Requests of ours in flight there: the time average, older times weighing exponentially less."""
        self._recent = self.requests + (self._recent - self.requests) * math.exp(
            (self._since - now) / window_s
        )
        self._since = now
        return self._recent

    def hear(self, load: Load) -> None:
        if self._heard:
            self._computed(load.prompt_tokens - self.reported.prompt_tokens)
        self._heard = True
        self.reported = load
        self.at_report = self.booked()
        self.prefill_token_s = _steady(self.prefill_token_s, load.prefill_token_s)
        self.prefill_pair_s = _steady(self.prefill_pair_s, load.prefill_pair_s)
        self.decode_step_s = _steady(self.decode_step_s, load.decode_step_s)

    def add(self, booking: Booking) -> None:
        self.prefill_tokens += booking.prefill_tokens
        self.prefill_pairs += booking.prefill_pairs
        self.decode_blocks += booking.decode_blocks
        self.requests += booking.requests
        if booking.prefill_tokens:
            self._prefills[booking] = None

    def take(self, booking: Booking) -> None:
        self.prefill_tokens -= booking.prefill_tokens
        self.prefill_pairs -= booking.prefill_pairs
        self.decode_blocks -= booking.decode_blocks
        self.requests -= booking.requests
        self._prefills.pop(booking, None)

    def _computed(self, tokens: int) -> None:
        while tokens > 0 and self._prefills:
            oldest = next(iter(self._prefills))
            count = min(tokens, oldest.prefill_tokens)
            before = oldest.prefill_pairs
            oldest.prefill_tokens -= count
            self.prefill_tokens -= count
            self.prefill_pairs -= before - oldest.prefill_pairs
            tokens -= count
            if not oldest.prefill_tokens:
                del self._prefills[oldest]


def _steady(known: float, reported: float) -> float:
    return known if reported <= 0 or abs(reported - known) <= _SAME_PACE * known else reported


class Booking:
    """One entry of the book. Whoever made it releases it, once."""

    __slots__ = (
        "_account",
        "_book",
        "decode_blocks",
        "prefill_tokens",
        "prompt_tokens",
        "released",
        "requests",
        "worker_id",
    )

    def __init__(
        self,
        book: LoadBook,
        worker_id: str,
        account: Account,
        prefill_tokens: int,
        prompt_tokens: int,
        decode_blocks: int,
        requests: int,
    ) -> None:
        self.worker_id = worker_id
        self.prefill_tokens = prefill_tokens  # that are left to compute: the last ones of the prompt
        self.prompt_tokens = prompt_tokens
        self.decode_blocks = decode_blocks
        self.requests = requests
        self.released = False
        self._book = book
        self._account = account
        book.num_open += 1
        self._change(account.add)

    @property
    def prefill_pairs(self) -> int:
        return prefill_pairs(self.prefill_tokens, self.prompt_tokens)

    def release(self) -> None:
        """Raises RuntimeError the second time: a double release would hide load from the policy for ever."""
        if self.released:
            raise RuntimeError(f"booking on {self.worker_id} released twice")
        self.released = True
        self._book.num_open -= 1
        self._change(self._account.take)

    def _change(self, change: Callable[[Booking], None]) -> None:
        book = self._book
        self._account.recent_requests(book.clock(), book.window_s)  # up to now with what there was until now
        change(self)
        book.on_change(self.worker_id)


class LoadBook:
    """Reports and bookings by worker. Pure but for its clock; not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = 10.0) -> None:
        """`window_s`: how far back `recent_requests` looks."""
        self.clock = clock
        self.window_s = window_s
        self.num_open = 0  # bookings not yet released, on workers that are gone too; zero at rest
        self.on_change: Callable[[str], None] = lambda worker_id: (
            None
        )  # the load of this worker is another one now
        self._accounts: dict[str, Account] = {}

    def book(
        self,
        worker_id: str,
        *,
        prefill_tokens: int = 0,
        prompt_tokens: int | None = None,
        decode_blocks: int = 0,
        requests: int = 1,
    ) -> Booking:
        """`prefill_tokens` are to be computed, the last ones of `prompt_tokens` (None: there are no others).
        `requests`: 0 for more work of a request that is booked there already."""
        prompt = prefill_tokens if prompt_tokens is None else prompt_tokens
        return Booking(
            self, worker_id, self._account(worker_id), prefill_tokens, prompt, decode_blocks, requests
        )

    def report(self, worker_id: str, load: Load) -> None:
        """A heartbeat came in."""
        self._account(worker_id).hear(load)
        self.on_change(worker_id)

    def forget(self, worker_id: str) -> None:
        """The worker is gone. Bookings that are still open keep their account and are released as ever."""
        self._accounts.pop(worker_id, None)
        self.on_change(worker_id)

    def account(self, worker_id: str) -> Account:
        """To be read, not kept: the worker's next life has another one."""
        return self._accounts.get(worker_id) or Account()

    def booked(self, worker_id: str) -> Booked:
        return self.account(worker_id).booked()

    def queued_prefill_tokens(self, worker_id: str) -> int:
        return self.account(worker_id).queued_prefill_tokens

    def active_blocks(self, worker_id: str) -> int:
        return self.account(worker_id).active_blocks

    def recent_requests(self, worker_id: str) -> float:
        return self.account(worker_id).recent_requests(self.clock(), self.window_s)

    def _account(self, worker_id: str) -> Account:
        account = self._accounts.get(worker_id)
        if account is None:
            account = self._accounts[worker_id] = Account(_since=self.clock())
        return account

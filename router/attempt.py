"""One attempt of a request: on one decode worker D and perhaps one prefill worker P.

The attempt knows what each worker may still hold and what is booked on it, so that `release` can give everything
back, exactly once, wherever the attempt ended. Any way to fail is one exception that says whose fault it was.
"""

from __future__ import annotations

import time

from router.explain import Step
from router.inbox import Event, Inbox, LinkLost
from router.load import Booking
from router.worker_link import WorkerLink
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Failed,
    Prefill,
    PrefillDone,
    PrefixHolder,
    Reserve,
    Ticket,
    Ticketed,
    TokenDelta,
    Work,
)


class AttemptFailed(Exception):
    """`code` is a FailureCode, or "link_lost", "stalled", "no_prefill", "token_gap" (seen by the router itself).

    `blamed` should be left alone for a while. `suspect` may have had a part in it: a hand-over that broke can be the
    fault of either end.
    """

    def __init__(
        self, code: str, blamed: WorkerLink | None, message: str, suspect: WorkerLink | None = None
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.blamed = blamed
        self.suspect = suspect
        self.message = message


class Attempt:
    def __init__(
        self,
        work: Work,
        decode: WorkerLink,
        booking: Booking,
        step: Step,
        *,
        transfer_id: str,
        lease_s: float,
        answer_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """`booking` (on D) is released with the attempt; `step` is told when what happened.

        Seconds: D's answer to Reserve, silence after it.
        """
        self.work = work
        self.decode = decode
        self.prefill: WorkerLink | None = None
        self.step = step
        self.taken = False  # D said yes
        self.started = False  # D has sent a token
        self._booking = booking
        self._prefill_booking: Booking | None = None
        self._transfer_id = transfer_id
        self._lease_s = lease_s
        self._answer_timeout_s = answer_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._inbox = Inbox()
        self._decode_holds = False
        self._prefill_holds = False
        self._released = False

    @property
    def wire_id(self) -> str:
        return self.work.request_id

    async def reserve(self, local_prefill_max: int, holder: PrefixHolder | None = None) -> Ticket | None:
        """Ask D. A ticket when D waits for blocks, None when it has started by itself. Raises AttemptFailed.

        `holder`: who has a longer prefix than D.
        """
        times = self.step.times
        times.asked = time.monotonic()
        self.decode.open(self.wire_id, self._inbox)
        self._decode_holds = True
        self.decode.send(
            Reserve(
                work=self.work,
                transfer_id=self._transfer_id,
                lease_s=self._lease_s,
                local_prefill_max=local_prefill_max,
                holder=holder,
            )
        )
        event = await self._next(self._answer_timeout_s)
        if not isinstance(event, Ticketed | Accepted):
            raise self._breach(f"{type(event).__name__} came before an answer to Reserve")
        self.taken = True
        times.answered = time.monotonic()
        return event.ticket if isinstance(event, Ticketed) else None

    def hand_over(self, prefill: WorkerLink, ticket: Ticket, holder: PrefixHolder | None = None) -> None:
        """Tell P to compute the prompt and send D what the ticket lacks. `holder`: who has a longer prefix than P."""
        self.prefill = prefill
        prefill.open(self.wire_id, self._inbox)
        self._prefill_holds = True
        prefill.send(Prefill(work=self.work, ticket=ticket, holder=holder))

    def book_prefill(self, booking: Booking) -> None:
        """Work that ends with the first token. Replaces an earlier booking of this kind."""
        self._end_prefill_booking()
        self._prefill_booking = booking

    async def next_delta(self, known: int) -> TokenDelta:
        """Tokens that follow the `known` output tokens, or overlap them. Raises AttemptFailed."""
        event = await self._next(self._stall_timeout_s)
        if not isinstance(event, TokenDelta):
            raise self._breach(f"{type(event).__name__} came among the tokens")
        if event.index > known:
            message = f"{self.decode.worker_id} sent token {event.index}, but {known} was next"
            raise AttemptFailed("token_gap", self.decode, message)
        if not self.started:
            self.started = True
            self.step.times.first_token = time.monotonic()
            self._prefill_holds = False  # D has committed: every block has arrived, P is done
            self._end_prefill_booking()
        if event.finish_reason is not None:
            self._decode_holds = False
        return event

    def release(self) -> None:
        """Give everything back. Raises RuntimeError the second time."""
        if self._released:
            raise RuntimeError(f"attempt {self.wire_id} released twice")
        self._released = True
        self.decode.forget(self.wire_id)
        if self._decode_holds:
            self.decode.send(Cancel(self.wire_id))
        if self.prefill is not None:
            self.prefill.forget(self.wire_id)
            if self._prefill_holds:
                self.prefill.send(Cancel(self.wire_id))
        self._inbox.close()
        self._end_prefill_booking()
        self._booking.release()

    def _end_prefill_booking(self) -> None:
        booking, self._prefill_booking = self._prefill_booking, None
        if booking is not None:
            booking.release()

    # --- events -----------------------------------------------------------------------------------------------------

    async def _next(self, timeout_s: float) -> Event:
        """The next event that is not about P; P's end well is noted, its failure raises until D has everything."""
        while True:
            try:
                link, event = await self._inbox.get(timeout_s)
            except TimeoutError:
                message = f"{self.decode.worker_id} said nothing about the request for {timeout_s:g} s"
                raise AttemptFailed("stalled", self.decode, message) from None
            if isinstance(event, LinkLost | Failed):
                self._judge(link, event)
            elif isinstance(event, PrefillDone):
                self._prefill_holds = False
                self.step.times.prefill = event
            else:
                return event

    def _judge(self, link: WorkerLink, event: LinkLost | Failed) -> None:
        code = "link_lost" if isinstance(event, LinkLost) else event.code
        message = event.reason if isinstance(event, LinkLost) else event.message
        blamed, suspect = link, None
        if link is self.prefill:
            self._prefill_holds = False
            if self.started or self.step.times.prefill is not None:
                return
        else:
            self._decode_holds = False
        if code in ("lease_expired", "transfer_failed") and self.prefill is not None:
            # Without P the decode worker can prefill by itself, without D nothing goes on: so P is left out first.
            blamed, suspect = self.prefill, self.decode
        raise AttemptFailed(code, blamed, f"{link.info.role} worker {link.worker_id}: {message}", suspect)

    def _breach(self, message: str) -> AttemptFailed:
        return AttemptFailed("internal", self.decode, f"decode worker {self.decode.worker_id}: {message}")

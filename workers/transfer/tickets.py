"""The receiving side of transfers: tickets, their leases, and what has arrived for them.

A ticket names blocks that somebody waits for: a request in state RESERVED, or a prefix that is fetched. Its lease is
renewed by progress; the reaper, a thread of its own, ends the ones that have run out. Whoever writes bytes holds
references of its own on the blocks while it writes, so a ticket may be cancelled or reaped at any moment: its blocks are
reused only after the writer has let go, and what a late writer delivers is dropped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from workers.engine.engine import Engine
from workers.engine.request import NewToken, Request
from workers.protocol.messages import FailureCode, KvEndpoint, KvFirstToken, KvPrefix, Ticket
from workers.transfer.arrivals import Arrivals
from workers.transfer.shards import Part


class TicketGone(Exception):
    """The transfer is for a ticket that does not exist (any more), or not in this life of the worker."""


class Landing(Protocol):
    """Where a transfer's blocks go and what becomes of them. Both calls are made under the lock, one of them, once."""

    def blocks(self, first: int, count: int) -> list[int]:
        """Ids of the ticket's blocks [first, first + count)."""

    def land(self, message: KvFirstToken | KvPrefix, opened: float, num_bytes: int) -> None:
        """Everything has arrived. `opened`: monotonic seconds. Raises TicketGone when this is not what it waits for."""

    def lose(self, code: FailureCode, reason: str) -> None:
        """Nothing more will be written."""


@dataclass(slots=True)
class _Open:
    landing: Landing
    ticket: Ticket
    arrivals: Arrivals
    deadline: float
    opened: float
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A committed hand-over."""

    new: NewToken
    transfer_s: float  # from the ticket to the commit
    num_bytes: int


class Tickets:
    """Every method takes the engine's lock for as long as it runs."""

    def __init__(
        self,
        engine: Engine,
        worker_id: str,
        epoch: int,
        on_commit: Callable[[Arrival], None],
        on_lost: Callable[[Request, FailureCode, str], None],
    ) -> None:
        self._engine = engine
        self._worker_id = worker_id
        self.epoch = epoch
        self.endpoints: list[KvEndpoint] = []
        self.ranks = 1
        self._on_commit = on_commit  # called under the lock
        self._on_lost = on_lost  # called under the lock, after the request's blocks are free
        self._open: dict[str, _Open] = {}
        self._transfer_of: dict[str, str] = {}  # request id -> transfer id
        self.writing: list[list[int]] = []  # block references that writers hold
        self._stopping = threading.Event()
        self._reaper = threading.Thread(target=self._reap, name="lease-reaper", daemon=True)

    def start(self) -> None:
        self._reaper.start()

    def stop(self) -> None:
        self._stopping.set()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    def open(self, request: Request, transfer_id: str, lease_s: float) -> Ticket | None:
        """Reserve blocks for the request; None without room."""
        with self._engine.lock:
            if transfer_id in self._open:
                raise ValueError(f"transfer {transfer_id} is already open")
            first_block = self._engine.scheduler.reserve(request)
            if first_block is None:
                return None
            landing = _RequestLanding(self, request)
            ticket = self.expect(transfer_id, landing, first_block, len(request.block_table), lease_s)
            self._transfer_of[request.request_id] = transfer_id
            return ticket

    def expect(
        self, transfer_id: str, landing: Landing, first_block: int, num_blocks: int, lease_s: float
    ) -> Ticket:
        """A ticket for blocks [first_block, num_blocks) that the caller holds until it lands or is lost.

        Raises ValueError for a transfer that is open already.
        """
        with self._engine.lock:
            if transfer_id in self._open:
                raise ValueError(f"transfer {transfer_id} is already open")
            layout = self._engine.layout
            ticket = Ticket(
                transfer_id=transfer_id,
                worker_id=self._worker_id,
                epoch=self.epoch,
                first_block=first_block,
                num_blocks=num_blocks,
                lease_s=lease_s,
                layout=layout,
                endpoints=self.endpoints,
                ranks=self.ranks,
            )
            arrivals = Arrivals(first_block, num_blocks, layout.num_layers, layout.num_kv_heads, self.ranks)
            now = time.monotonic()
            self._open[transfer_id] = _Open(landing, ticket, arrivals, now + lease_s, now)
            return ticket

    @contextlib.contextmanager
    def writing_blocks(
        self,
        transfer_id: str,
        epoch: int,
        source_ranks: int,
        part: Part,
        blocks: range,
        layers: range,
        num_bytes: int,
    ) -> Iterator[list[int]]:
        """Block ids to write these blocks of the ticket into.

        Raises TicketGone before the context when there is no such ticket, and after it when the ticket went away
        while the bytes came in: they are void then. Each block of each part and layer comes once.
        """
        with self._engine.lock:
            opened = self._find(transfer_id, epoch)
            try:
                opened.arrivals.claim(source_ranks, part, blocks, layers)
            except ValueError as error:
                self._lose(transfer_id, "transfer_failed", str(error))
                raise TicketGone(str(error)) from error
            self._renew(opened)
            ids = opened.landing.blocks(blocks.start, len(blocks))
            self._engine.pool.acquire(ids)
            self.writing.append(ids)
        try:
            yield ids
        finally:
            with self._engine.lock:
                self._engine.pool.release(ids)
                self.writing.remove(ids)
        with self._engine.lock:
            if self._find(transfer_id, epoch) is not opened:
                raise TicketGone(f"the ticket {transfer_id} is another one now")
            opened.arrivals.arrived(blocks, layers)
            opened.num_bytes += num_bytes
            self._renew(opened)

    def land(self, message: KvFirstToken | KvPrefix) -> None:
        """Everything has arrived, says the sender: the request starts to decode. Raises TicketGone."""
        with self._engine.lock:
            opened = self._find(message.transfer_id, message.epoch)
            count = message.count if isinstance(message, KvPrefix) else None
            if not opened.arrivals.complete(count):
                what = "first token" if count is None else f"end of {count} blocks"
                reason = f"{what} after {opened.arrivals.progress}"
                self._lose(message.transfer_id, "transfer_failed", reason)
                raise TicketGone(reason)
            self._forget(message.transfer_id)
            opened.landing.land(message, opened.opened, opened.num_bytes)

    def renew(self, transfer_id: str, epoch: int) -> None:
        """The request is alive on the other side. Nothing happens when the ticket is gone."""
        with self._engine.lock:
            opened = self._open.get(transfer_id)
            if opened is not None and epoch == self.epoch:
                self._renew(opened)

    def abort(self, transfer_id: str, epoch: int, reason: str) -> None:
        """The other side gave up. Nothing happens when the ticket is gone."""
        with self._engine.lock:
            if transfer_id in self._open and epoch == self.epoch:
                self._lose(transfer_id, "transfer_failed", reason)

    def cancel(self, request_id: str) -> None:
        """The router no longer wants it. Nobody is told."""
        with self._engine.lock:
            transfer_id = self._transfer_of.get(request_id)
            if transfer_id is not None:
                self._forget(transfer_id)

    def withdraw(self, transfer_id: str) -> None:
        """Whoever expected it does so no longer. Idempotent; its landing hears nothing."""
        with self._engine.lock:
            if transfer_id in self._open:
                self._forget(transfer_id)

    def committed(self, request: Request, message: KvFirstToken, opened: float, num_bytes: int) -> None:
        cached = min(message.cached_tokens, request.num_given_tokens)
        new = self._engine.scheduler.commit(request, message.token, message.logprobs, cached)
        self._on_commit(Arrival(new, time.monotonic() - opened, num_bytes))

    def lost(self, request: Request, code: FailureCode, reason: str) -> None:
        self._engine.scheduler.cancel(request.request_id)
        self._on_lost(request, code, reason)

    def _find(self, transfer_id: str, epoch: int) -> _Open:
        if epoch != self.epoch:
            raise TicketGone(f"epoch {epoch} is over, this is {self.epoch}")
        opened = self._open.get(transfer_id)
        if opened is None:
            raise TicketGone(f"no ticket {transfer_id}")
        return opened

    def _renew(self, opened: _Open) -> None:
        opened.deadline = time.monotonic() + opened.ticket.lease_s

    def _forget(self, transfer_id: str) -> None:
        landing = self._open.pop(transfer_id).landing
        if isinstance(landing, _RequestLanding):
            del self._transfer_of[landing.request.request_id]

    def _lose(self, transfer_id: str, code: FailureCode, reason: str) -> None:
        landing = self._open[transfer_id].landing
        self._forget(transfer_id)
        landing.lose(code, reason)

    def _reap(self) -> None:
        while not self._stopping.wait(0.1):
            now = time.monotonic()
            with self._engine.lock:
                for transfer_id, opened in list(self._open.items()):
                    # The end of one may have ended another: who hears of it may do as he likes.
                    if opened.deadline < now and self._open.get(transfer_id) is opened:
                        reason = f"no progress for {opened.ticket.lease_s:g} s"
                        self._lose(transfer_id, "lease_expired", reason)


class _RequestLanding:
    """A request in state RESERVED."""

    def __init__(self, tickets: Tickets, request: Request) -> None:
        self._tickets = tickets
        self.request = request

    def blocks(self, first: int, count: int) -> list[int]:
        return self.request.block_table[first : first + count].tolist()

    def land(self, message: KvFirstToken | KvPrefix, opened: float, num_bytes: int) -> None:
        if not isinstance(message, KvFirstToken):
            self._refuse(f"{type(message).__name__} for a request")
        elif not 0 <= message.token < self._tickets.vocab_size:
            self._refuse(f"token {message.token} of a vocabulary of {self._tickets.vocab_size}")
        else:
            self._tickets.committed(self.request, message, opened, num_bytes)

    def _refuse(self, reason: str) -> None:
        self.lose("transfer_failed", reason)
        raise TicketGone(reason)

    def lose(self, code: FailureCode, reason: str) -> None:
        self._tickets.lost(self.request, code, reason)

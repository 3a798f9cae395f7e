"""The decode side of a hand-over: tickets, their leases, and what has arrived for them.

A ticket names a request in state RESERVED. Its lease is renewed by progress; the reaper, a thread of its own, ends the
ones that have run out. Whoever writes bytes holds references of its own on the blocks while it writes, so a ticket
may be cancelled or reaped at any moment: its blocks are reused only after the writer has let go, and what a late
writer delivers is dropped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workers.engine.engine import Engine
from workers.engine.request import NewToken, Request
from workers.protocol.messages import FailureCode, KvEndpoint, Ticket, TokenLogprobs


class TicketGone(Exception):
    """The transfer is for a ticket that does not exist (any more), or not in this life of the worker."""


@dataclass(slots=True)
class _Open:
    request: Request
    ticket: Ticket
    deadline: float
    next_block: int  # blocks before it have arrived
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

    def open(self, request: Request, transfer_id: str, lease_s: float) -> Ticket | None:
        """Reserve blocks for the request; None without room."""
        with self._engine.lock:
            if transfer_id in self._open:
                raise ValueError(f"transfer {transfer_id} is already open")
            first_block = self._engine.scheduler.reserve(request)
            if first_block is None:
                return None
            ticket = Ticket(
                transfer_id=transfer_id,
                worker_id=self._worker_id,
                epoch=self.epoch,
                first_block=first_block,
                num_blocks=len(request.block_table),
                lease_s=lease_s,
                layout=self._engine.layout,
                endpoints=self.endpoints,
            )
            now = time.monotonic()
            self._open[transfer_id] = _Open(request, ticket, now + lease_s, first_block, now)
            self._transfer_of[request.request_id] = transfer_id
            return ticket

    @contextlib.contextmanager
    def writing_blocks(self, transfer_id: str, epoch: int, first: int, count: int) -> Iterator[list[int]]:
        """Block ids to write [first, first + count) of the request into.

        Raises TicketGone before the context when there is no such ticket, and after it when the ticket went away
        while the bytes came in: they are void then. Blocks must come in order, each once.
        """
        with self._engine.lock:
            opened = self._find(transfer_id, epoch)
            if first != opened.next_block or count < 1 or first + count > opened.ticket.num_blocks:
                reason = (
                    f"blocks {first}..{first + count} were announced, {opened.next_block} is next of "
                    f"{opened.ticket.num_blocks}"
                )
                self._lose(transfer_id, "transfer_failed", reason)
                raise TicketGone(reason)
            self._renew(opened)
            blocks = opened.request.block_table[first : first + count].tolist()
            self._engine.pool.acquire(blocks)
            self.writing.append(blocks)
        try:
            yield blocks
        finally:
            with self._engine.lock:
                self._engine.pool.release(blocks)
                self.writing.remove(blocks)
        with self._engine.lock:
            opened = self._find(transfer_id, epoch)
            opened.next_block = first + count
            opened.num_bytes += count * opened.ticket.layout.block_bytes
            self._renew(opened)

    def commit(
        self, transfer_id: str, epoch: int, token: int, logprobs: TokenLogprobs | None, cached_tokens: int
    ) -> None:
        """Everything has arrived: the request starts to decode. Raises TicketGone."""
        with self._engine.lock:
            opened = self._find(transfer_id, epoch)
            if opened.next_block != opened.ticket.num_blocks:
                reason = f"first token after {opened.next_block} of {opened.ticket.num_blocks} blocks"
                self._lose(transfer_id, "transfer_failed", reason)
                raise TicketGone(reason)
            self._forget(transfer_id)
            new = self._engine.scheduler.commit(opened.request, token, logprobs, cached_tokens)
            self._on_commit(Arrival(new, time.monotonic() - opened.opened, opened.num_bytes))

    def renew(self, transfer_id: str, epoch: int) -> None:
        """The request is alive on the prefill side. Nothing happens when the ticket is gone."""
        with self._engine.lock:
            opened = self._open.get(transfer_id)
            if opened is not None and epoch == self.epoch:
                self._renew(opened)

    def abort(self, transfer_id: str, epoch: int, reason: str) -> None:
        """The prefill side gave up. Nothing happens when the ticket is gone."""
        with self._engine.lock:
            if transfer_id in self._open and epoch == self.epoch:
                self._lose(transfer_id, "transfer_failed", reason)

    def cancel(self, request_id: str) -> None:
        """The router no longer wants it. Nobody is told."""
        with self._engine.lock:
            transfer_id = self._transfer_of.get(request_id)
            if transfer_id is not None:
                self._forget(transfer_id)

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
        opened = self._open.pop(transfer_id)
        del self._transfer_of[opened.request.request_id]

    def _lose(self, transfer_id: str, code: FailureCode, reason: str) -> None:
        request = self._open[transfer_id].request
        self._forget(transfer_id)
        self._engine.scheduler.cancel(request.request_id)
        self._on_lost(request, code, reason)

    def _reap(self) -> None:
        while not self._stopping.wait(0.1):
            now = time.monotonic()
            with self._engine.lock:
                for transfer_id in [t for t, opened in self._open.items() if opened.deadline < now]:
                    lease_s = self._open[transfer_id].ticket.lease_s
                    self._lose(transfer_id, "lease_expired", f"no progress for {lease_s:g} s")

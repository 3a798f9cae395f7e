"""The sending side of transfers: blocks leave as soon as a step has computed them, then the first token.

What a step has computed holds references of its own until the receiver has acknowledged it; preempting, cancelling or
finishing the request takes nothing from under it. They are on the blocks before it as well, so that blocks come free
from the last to the first: the prefix cache must not lose a parent before its child. A first token is sent only if the
hand-over was not aborted at the moment of sending, and only behind the acknowledgement of all blocks or in order behind
them, so what a decode worker commits was whole.

Blocks that the prefix cache holds can be asked for too (`send_prefix`): by a worker that would have to compute them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.config import TransferConfig
from workers.engine.engine import Engine
from workers.engine.request import NewToken, Request
from workers.protocol.messages import (
    FailureCode,
    KvAbort,
    KvAck,
    KvFetch,
    KvFirstToken,
    KvPrefix,
    KvRenew,
    PeerStatus,
    Ticket,
)
from workers.transfer.block_memory import BlockMemory
from workers.transfer.compatibility import mismatch
from workers.transfer.peer import Peer, Piece, Sender

_PIECE_BYTES = 8 << 20  # of one frame: small enough that filling one overlaps with emptying the one before


@dataclass(slots=True, eq=False)
class Handoff:
    """One transfer. Without a request it is a prefix that somebody asked for."""

    ticket: Ticket
    request: Request | None
    next_block: int  # blocks before it have been queued for sending
    outstanding: int = 0  # pieces with blocks that are not acknowledged
    last: Piece | None = None  # the message that ends it, while it waits for acknowledgements
    ended: bool = False  # acknowledged whole, failed or cancelled
    num_bytes: int = 0
    road: str = ""
    ended_at: float = 0.0

    @property
    def transfer_id(self) -> str:
        return self.ticket.transfer_id


@dataclass(slots=True, eq=False)
class _Hold:
    """References on the first blocks of a request, up to what one step has computed; gone with the last piece."""

    blocks: list[int]
    num_pieces: int = 0


class Handoffs:
    """Everything that this worker sends. State is guarded by the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        memories: Sequence[BlockMemory],
        config: TransferConfig,
        *,
        worker_id: str,
        secret: bytes,
        on_end: Callable[[Request, Handoff, FailureCode | None, str], None],
        computing: Callable[[], bool] = lambda: True,
    ) -> None:
        """`memories`: one for each rank. `computing`: False when the engine is stuck, requests make no progress."""
        self._engine = engine
        self._config = config
        self._on_end = (
            on_end  # called under the lock, once for each hand-over of a request that was not cancelled
        )
        self._computing = computing
        self._sender = Sender(
            memories, engine.layout, config, worker_id, secret, engine.lock, self._acknowledged, self._lost
        )
        # Two pieces fit a ring: one is filled while the other is emptied.
        piece_bytes = min(_PIECE_BYTES, int(config.ring_memory) // 2)
        self._blocks_per_piece = max(1, piece_bytes // engine.layout.block_bytes)
        self._open: dict[str, Handoff] = {}  # by transfer id
        self._by_request: dict[str, Handoff] = {}
        self._peers: dict[tuple[str, int], Peer] = {}
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_leases, name="lease-keeper", daemon=True)
        self.holding: list[list[int]] = []  # block references that pieces hold

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._engine.lock:
            for peer in list(self._peers.values()):
                peer.drop("the worker stops")

    def __len__(self) -> int:
        return len(self._open)

    def peers(self) -> dict[str, PeerStatus]:
        """Under the lock: receiver -> the way to it."""
        return {peer.worker_id: peer.status() for peer in self._peers.values()}

    # --- called with requests and steps -----------------------------------------------------------------------------

    def open(self, request: Request, ticket: Ticket) -> None:
        """Before the request is scheduled. Raises ValueError when the two sides' ranks can't be matched."""
        with self._engine.lock:
            self._peer(ticket)
            handoff = Handoff(ticket, request, ticket.first_block)
            self._open[handoff.transfer_id] = handoff
            self._by_request[request.request_id] = handoff

    def advance(self, request: Request, token: NewToken | None) -> None:
        """Under the lock, right after a step: queue what it has computed. `token` when it was the last step."""
        handoff = self._by_request.get(request.request_id)
        if handoff is None:
            return
        ticket = handoff.ticket
        block_size = self._engine.layout.block_size
        ready = ticket.num_blocks if token else request.num_computed_tokens // block_size
        if handoff.next_block < ready:
            self._send_blocks(handoff, request.block_table[:ready].tolist(), 0)
        if token is not None:
            message = KvFirstToken(
                ticket.transfer_id, ticket.epoch, token.token, token.logprobs, request.num_cached_tokens
            )
            self._send_last(handoff, message)

    def cancel(self, request_id: str, reason: str = "cancelled") -> None:
        """The router no longer wants it, or the step failed: D is told, the router is not."""
        with self._engine.lock:
            handoff = self._by_request.get(request_id)
            if handoff is not None:
                peer = self._peer_of(handoff)
                self._end(handoff)
                peer.tell(KvAbort(handoff.transfer_id, handoff.ticket.epoch, reason))

    def send_prefix(self, fetch: KvFetch) -> str | None:
        """Send the blocks of a prefix that are held here. Why nothing will come; None when it will."""
        ticket = fetch.ticket
        with self._engine.lock:
            if reason := mismatch(self._engine.layout, ticket.layout, ticket.worker_id):
                return reason
            if fetch.transfer_id in self._open:
                return f"transfer {fetch.transfer_id} is already open"
            wanted = ticket.num_blocks - ticket.first_block
            blocks = self._engine.pool.match(fetch.hashes[: max(wanted, 0)])
            if not blocks:
                return "none of these blocks is held here"
            try:
                self._peer(ticket)
            except ValueError as error:
                return str(error)
            handoff = Handoff(ticket, None, ticket.first_block)
            self._open[fetch.transfer_id] = handoff
            self._send_blocks(handoff, blocks, ticket.first_block)
            self._send_last(handoff, KvPrefix(fetch.transfer_id, ticket.epoch, len(blocks)))
            return None

    def tell(self, ticket: Ticket, message: KvFetch, on_answer: Callable[[bool, str], None]) -> None:
        """Under the lock: ask another worker (`ticket` names it and its endpoints) for something.

        `on_answer` is called once, under the lock: with the acknowledgement, or when the way there is lost.
        """
        self._peer(ticket).put_last(Piece(on_answer, message.transfer_id, ticket.epoch, message=message))

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _send_blocks(self, handoff: Handoff, blocks: list[int], first: int) -> None:
        """`blocks`: of the ticket's blocks from `first` on. Those before `next_block` are not sent, but held as well."""
        peer, ticket = self._peer_of(handoff), handoff.ticket
        hold = _Hold(blocks)
        self._engine.pool.acquire(blocks)
        self.holding.append(blocks)
        layers = range(self._engine.layout.num_layers)
        end = first + len(blocks)
        while handoff.next_block < end:
            at = handoff.next_block
            some = blocks[at - first : at - first + self._blocks_per_piece]
            for part in peer.parts:
                hold.num_pieces += 1
                handoff.outstanding += 1
                peer.put(part, Piece(handoff, handoff.transfer_id, ticket.epoch, at, some, layers, hold))
            handoff.next_block += len(some)

    def _send_last(self, handoff: Handoff, message: KvFirstToken | KvPrefix) -> None:
        """Behind every block: in order where there is one channel, else when all are acknowledged."""
        peer = self._peer_of(handoff)
        piece = Piece(handoff, handoff.transfer_id, handoff.ticket.epoch, message=message)
        if peer.in_order or handoff.outstanding == 0:
            peer.put_last(piece)
        else:
            handoff.last = piece

    def _acknowledged(self, peer: Peer, piece: Piece, ack: KvAck) -> None:
        self._release(piece)
        handoff = piece.owner
        if not isinstance(handoff, Handoff):
            handoff(ack.ok, ack.reason)
            return
        if handoff.ended:
            return
        if not ack.ok:
            self._fail(handoff, f"refused by {peer.worker_id}: {ack.reason}")
        elif piece.message is not None:
            handoff.road = peer.road
            self._end(handoff)
            if handoff.request is not None:
                self._on_end(handoff.request, handoff, None, "")
        else:
            handoff.outstanding -= 1
            handoff.num_bytes += piece.num_bytes
            if handoff.outstanding == 0 and handoff.last is not None:
                peer.put_last(handoff.last)
                handoff.last = None

    def _lost(self, peer: Peer, pieces: list[Piece], reason: str) -> None:
        key = (peer.worker_id, peer.epoch)
        if self._peers.get(key) is peer:
            del self._peers[key]
        for piece in pieces:
            self._release(piece)
        for handoff in [h for h in self._open.values() if (h.ticket.worker_id, h.ticket.epoch) == key]:
            self._fail(handoff, reason)
        for piece in pieces:
            if not isinstance(piece.owner, Handoff):
                piece.owner(False, reason)

    def _release(self, piece: Piece) -> None:
        hold = piece.hold
        if hold is None:
            return
        hold.num_pieces -= 1
        if hold.num_pieces == 0:
            self._engine.pool.release(hold.blocks)
            self.holding.remove(hold.blocks)

    # --- the end of a transfer: one path ----------------------------------------------------------------------------

    def _peer(self, ticket: Ticket) -> Peer:
        key = (ticket.worker_id, ticket.epoch)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(ticket, self._sender)
        return peer

    def _peer_of(self, handoff: Handoff) -> Peer:
        return self._peers[(handoff.ticket.worker_id, handoff.ticket.epoch)]

    def _end(self, handoff: Handoff) -> None:
        handoff.ended = True
        handoff.ended_at = time.monotonic()
        handoff.last = None
        del self._open[handoff.transfer_id]
        if handoff.request is not None:
            del self._by_request[handoff.request.request_id]
        peer = self._peers.get((handoff.ticket.worker_id, handoff.ticket.epoch))
        if peer is not None:
            for piece in peer.withdraw(handoff.transfer_id):
                self._release(piece)

    def _fail(self, handoff: Handoff, reason: str) -> None:
        if handoff.ended:
            return
        self._end(handoff)
        if handoff.request is not None:
            self._engine.scheduler.cancel(handoff.request.request_id)
            self._on_end(handoff.request, handoff, "transfer_failed", reason)

    # --- leases -----------------------------------------------------------------------------------------------------

    def _keep_leases(self) -> None:
        """Tell decode workers that requests are alive which wait, compute, or queue to be sent here.

        Only as long as anything moves here: `computing` tells of the engine, the channel's time-out of the sending.
        """
        while not self._stopping.wait(min(1.0, self._config.lease_s / 4)):
            if not self._computing():
                continue
            with self._engine.lock:
                alive: dict[Peer, list[str]] = {}
                for handoff in self._open.values():
                    alive.setdefault(self._peer_of(handoff), []).append(handoff.transfer_id)
                for peer, transfer_ids in alive.items():
                    peer.renew(KvRenew(epoch=peer.epoch, transfer_ids=transfer_ids))

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
from workers.engine.plan import Plan
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
    PrefixHolder,
    Ticket,
)
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import Address
from workers.transfer.compatibility import mismatch
from workers.transfer.peer import Peer, Piece, Sender

_LAYER_POLL_S = 0.0005  # a layer of a prefill chunk takes milliseconds
_IDLE_S = 1.0
# Of one frame: small enough that filling one overlaps with emptying the one before, and that others get their turn. On
# a wire that takes milliseconds; within a host a piece is over soon, and its announcement is what costs.
_PIECE_BYTES, _LOCAL_PIECE_BYTES = 8 << 20, 16 << 20


@dataclass(slots=True, eq=False)
class Handoff:
    """One transfer. Without a request it is a prefix that somebody asked for."""

    ticket: Ticket
    request: Request | None
    next_block: int  # blocks before it have been queued for sending
    stream: _Stream | None = None  # what a running step computes of it
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
class _Stream:
    """Blocks that a running step completes; their layers leave as soon as they are written."""

    first: int
    blocks: list[int]  # from `first` on
    hold: _Hold
    layers_done: Callable[[], int]
    next_layer: int = 0  # layers before it have been queued for sending


@dataclass(slots=True, eq=False)
class _Hold:
    """References on the first blocks of a request, up to what one step has computed; gone with the last use."""

    blocks: list[int]
    num_uses: int = 1  # by pieces, and by whoever makes them


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
        self._layers = range(engine.layout.num_layers)
        self._layers_at_once = -(-len(self._layers) // config.layer_groups)
        self._open: dict[str, Handoff] = {}  # by transfer id
        self._by_request: dict[str, Handoff] = {}
        self._peers: dict[tuple[str, int], Peer] = {}
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_leases, name="lease-keeper", daemon=True)
        self._watcher = threading.Thread(target=self._watch_layers, name="kv-layers", daemon=True)
        self._streaming = threading.Condition(engine.lock)
        self.holding: list[list[int]] = []  # block references that pieces hold

    def start(self) -> None:
        self._keeper.start()
        if self._config.layer_groups > 1:
            self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._engine.lock:
            self._streaming.notify_all()
            for peer in list(self._peers.values()):
                peer.drop("the worker stops")

    def __len__(self) -> int:
        return len(self._open)

    def peers(self) -> dict[str, PeerStatus]:
        """Under the lock: receiver -> the way to it."""
        return {peer.worker_id: peer.status() for peer in self._peers.values()}

    # --- called with requests and steps -----------------------------------------------------------------------------

    def open(self, request: Request, ticket: Ticket) -> None:
        """Before the request is scheduled. Raises ValueError when the ticket can't be served: its ranks or its blocks."""
        with self._engine.lock:
            if ticket.transfer_id in self._open:
                raise ValueError(f"transfer {ticket.transfer_id} is already open")
            _check_blocks(ticket)
            self._peer(ticket)
            handoff = Handoff(ticket, request, ticket.first_block)
            self._open[handoff.transfer_id] = handoff
            self._by_request[request.request_id] = handoff

    def begin(self, plan: Plan, layers_done: Callable[[], int] | None) -> None:
        """Under the lock, right before a step runs: what it completes may leave layer by layer.

        `layers_done` tells how many layers of that step are written; None: nobody can tell.
        """
        if layers_done is None or self._config.layer_groups == 1:
            return
        for item in plan.items:
            handoff = self._by_request.get(item.request.request_id)
            if handoff is None:
                continue
            end = item.start + item.count
            ready = handoff.ticket.num_blocks if item.samples else end // self._engine.layout.block_size
            if handoff.next_block < ready:
                blocks = item.request.block_table[:ready].tolist()
                first, handoff.next_block = handoff.next_block, ready
                handoff.stream = _Stream(first, blocks[first:], self._take_hold(blocks), layers_done)
                self._streaming.notify_all()

    def advance(self, request: Request, token: NewToken | None) -> None:
        """Under the lock, right after a step: queue what it has computed. `token` when it was the last step."""
        handoff = self._by_request.get(request.request_id)
        if handoff is None:
            return
        self._end_stream(handoff, send=True)
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
            if fetch.transfer_id != ticket.transfer_id:
                return f"{fetch.transfer_id} is asked for with a ticket of {ticket.transfer_id}"
            if fetch.transfer_id in self._open:
                return f"transfer {fetch.transfer_id} is already open"
            try:
                _check_blocks(ticket)
                blocks = self._engine.pool.match(fetch.hashes[: ticket.num_blocks - ticket.first_block])
                if not blocks:
                    return "none of these blocks is held here"
                self._peer(ticket)
            except ValueError as error:
                return str(error)
            handoff = Handoff(ticket, None, ticket.first_block)
            self._open[fetch.transfer_id] = handoff
            self._send_blocks(handoff, blocks, ticket.first_block)
            self._send_last(handoff, KvPrefix(fetch.transfer_id, ticket.epoch, len(blocks)))
            return None

    def ask(self, holder: PrefixHolder, message: KvFetch, on_answer: Callable[[bool, str], None]) -> None:
        """Ask another worker for something.

        `on_answer` is called once, under the lock: with the acknowledgement, or when the way there is lost.
        """
        with self._engine.lock:
            try:
                peer = self._peer(holder)
            except ValueError as error:
                on_answer(False, str(error))
                return
            peer.put_last(Piece(on_answer, message.transfer_id, holder.epoch, message=message))

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _send_blocks(self, handoff: Handoff, blocks: list[int], first: int) -> None:
        """`blocks`: of the ticket's blocks from `first` on. Those before `next_block` are not sent, but held as well."""
        hold = self._take_hold(blocks)
        at = handoff.next_block
        self._send_layers(handoff, at, blocks[at - first :], self._layers, hold)
        handoff.next_block = first + len(blocks)
        self._drop_hold(hold)

    def _send_layers(
        self, handoff: Handoff, first: int, blocks: list[int], layers: range, hold: _Hold
    ) -> None:
        """`blocks`: of the ticket's blocks from `first` on."""
        peer, ticket = self._peer_of(handoff), handoff.ticket
        at_once = self._blocks_per_piece(peer) * len(self._layers) // len(layers)
        for at in range(0, len(blocks), at_once):
            some = blocks[at : at + at_once]
            for part in peer.parts:
                hold.num_uses += 1
                handoff.outstanding += 1
                piece = Piece(handoff, handoff.transfer_id, ticket.epoch, first + at, some, layers, hold)
                peer.put(part, piece)

    def _blocks_per_piece(self, peer: Peer) -> int:
        # Two pieces fit a ring: one is filled while the other is emptied.
        most = min(_LOCAL_PIECE_BYTES if peer.local else _PIECE_BYTES, int(self._config.ring_memory) // 2)
        return max(1, most // self._engine.layout.block_bytes)

    def _watch_layers(self) -> None:
        """Queues the layers of running steps as they are written."""
        while not self._stopping.is_set():
            with self._streaming:
                streaming = [handoff for handoff in self._open.values() if handoff.stream is not None]
                if not streaming:
                    self._streaming.wait(_IDLE_S)
                for handoff in streaming:
                    self._send_written(handoff)
            if streaming:
                time.sleep(_LAYER_POLL_S)

    def _send_written(self, handoff: Handoff) -> None:
        stream = handoff.stream
        assert stream is not None
        done = stream.layers_done()
        groups = (done - stream.next_layer) // self._layers_at_once
        # The last layers wait for the end of the step, which is near.
        if groups > 0 and done < len(self._layers):
            end = stream.next_layer + groups * self._layers_at_once
            self._send_layers(
                handoff, stream.first, stream.blocks, range(stream.next_layer, end), stream.hold
            )
            stream.next_layer = end

    def _end_stream(self, handoff: Handoff, *, send: bool) -> None:
        stream, handoff.stream = handoff.stream, None
        if stream is None:
            return
        if send and stream.next_layer < len(self._layers):
            layers = range(stream.next_layer, len(self._layers))
            self._send_layers(handoff, stream.first, stream.blocks, layers, stream.hold)
        self._drop_hold(stream.hold)

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
        if piece.hold is not None:
            self._drop_hold(piece.hold)

    def _take_hold(self, blocks: list[int]) -> _Hold:
        self._engine.pool.acquire(blocks)
        self.holding.append(blocks)
        return _Hold(blocks)

    def _drop_hold(self, hold: _Hold) -> None:
        hold.num_uses -= 1
        if hold.num_uses == 0:
            self._engine.pool.release(hold.blocks)
            self.holding.remove(hold.blocks)

    # --- the end of a transfer: one path ----------------------------------------------------------------------------

    def _peer(self, address: Address) -> Peer:
        if self._stopping.is_set():
            raise ValueError("this worker stops")
        key = (address.worker_id, address.epoch)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(address, self._sender)
        return peer

    def _peer_of(self, handoff: Handoff) -> Peer:
        return self._peers[(handoff.ticket.worker_id, handoff.ticket.epoch)]

    def _end(self, handoff: Handoff) -> None:
        handoff.ended = True
        handoff.ended_at = time.monotonic()
        handoff.last = None
        self._end_stream(handoff, send=False)
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


def _check_blocks(ticket: Ticket) -> None:
    if not 0 <= ticket.first_block <= ticket.num_blocks:
        raise ValueError(f"the ticket is for blocks {ticket.first_block}..{ticket.num_blocks}")

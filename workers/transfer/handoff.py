"""The prefill side of a hand-over: blocks leave as soon as a step has computed them, then the first token.

What a step has computed holds references of its own until the decode worker has acknowledged it; preempting,
cancelling or finishing the request takes nothing from under it. They are on the blocks before it as well, so that
blocks come free from the last to the first: the prefix cache must not lose a parent before its child. A first token
is sent only if the hand-over was not aborted at the moment of sending, so what a decode worker commits was whole.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.config import TransferConfig
from workers.engine.engine import Engine
from workers.engine.request import NewToken, Request
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import FailureCode, KvAbort, KvBlocks, KvFirstToken, KvRenew, Ticket
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import Channel, open_channel

logger = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20  # of one frame: small enough that filling one overlaps with emptying the one before


@dataclass(slots=True, eq=False)
class Handoff:
    request: Request
    ticket: Ticket
    next_block: int  # blocks before it have been queued for sending
    ended: bool = False  # acknowledged whole, failed or cancelled
    num_bytes: int = 0
    channel_kind: str = ""
    ended_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Hold:
    """References on the first blocks of a request, up to what one step has computed; gone with the last piece."""

    blocks: list[int]
    num_pieces: int = 0


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks [first, first + len(blocks)) of a request, or its first token when `blocks` is empty."""

    handoff: Handoff
    first: int
    blocks: list[int]
    hold: _Hold | None = None
    token: NewToken | None = None
    sent_at: float = 0.0  # 0 until the last byte was handed to the kernel


@dataclass(slots=True)
class _Peer:
    """The channel to one life of one decode worker, with the thread that writes and the one that reads."""

    ticket: Ticket
    todo: queue.SimpleQueue[_Piece | KvAbort | KvRenew | None] = field(default_factory=queue.SimpleQueue)
    unacknowledged: deque[_Piece] = field(default_factory=deque)
    renewal: KvRenew | None = (
        None  # goes before whatever waits in `todo`: a lease must not run out in the queue
    )
    handoffs: dict[str, Handoff] = field(default_factory=dict)  # transfer id -> open ones
    channel: Channel | None = None
    dead: bool = False


class Handoffs:
    """All hand-overs of a prefill worker. State is guarded by the engine's lock; sockets are used outside it."""

    def __init__(
        self,
        engine: Engine,
        memory: BlockMemory,
        config: TransferConfig,
        *,
        worker_id: str,
        secret: bytes,
        on_end: Callable[[Handoff, FailureCode | None, str], None],
        computing: Callable[[], bool] = lambda: True,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._config = config
        self._worker_id = worker_id
        self._secret = secret
        self._on_end = on_end  # called under the lock, once for each hand-over that was not cancelled
        self._computing = computing  # False: the engine is stuck, requests here make no progress
        # Two pieces fit an arena: one is filled while the other is emptied.
        piece_bytes = min(_PIECE_BYTES, int(config.arena_memory) // 2)
        self._blocks_per_piece = max(1, piece_bytes // engine.layout.block_bytes)
        self._by_request: dict[str, Handoff] = {}
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_leases, name="lease-keeper", daemon=True)
        self.holding: list[list[int]] = []  # block references that pieces hold

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._engine.lock:
            for peer in list(self._peers.values()):
                self._drop_peer(peer, "the worker stops")

    def __len__(self) -> int:
        return len(self._by_request)

    def channels(self) -> dict[str, str]:
        """Decode worker -> kind of channel in use."""
        return {peer.ticket.worker_id: peer.channel.kind for peer in self._peers.values() if peer.channel}

    # --- called with requests and steps -----------------------------------------------------------------------------

    def open(self, request: Request, ticket: Ticket) -> None:
        """Before the request is scheduled."""
        with self._engine.lock:
            key = (ticket.worker_id, ticket.epoch)
            peer = self._peers.get(key)
            if peer is None or peer.dead:
                peer = self._peers[key] = _Peer(ticket)
                name = f"kv-send-{ticket.worker_id}"
                threading.Thread(target=self._write, args=(peer,), name=name, daemon=True).start()
            handoff = Handoff(request, ticket, ticket.first_block)
            self._by_request[request.request_id] = handoff
            peer.handoffs[ticket.transfer_id] = handoff

    def advance(self, request: Request, token: NewToken | None) -> None:
        """Under the lock, right after a step: queue what it has computed. `token` when it was the last step."""
        handoff = self._by_request.get(request.request_id)
        if handoff is None:
            return
        peer = self._peer_of(handoff)
        block_size = self._engine.layout.block_size
        ready = handoff.ticket.num_blocks if token else request.num_computed_tokens // block_size
        if handoff.next_block < ready:
            hold = _Hold(request.block_table[:ready].tolist())
            self._engine.pool.acquire(hold.blocks)
            self.holding.append(hold.blocks)
            while handoff.next_block < ready:
                first = handoff.next_block
                blocks = hold.blocks[first : first + self._blocks_per_piece]
                hold.num_pieces += 1
                handoff.next_block += len(blocks)
                peer.todo.put(_Piece(handoff, first, blocks, hold))
        if token is not None:
            peer.todo.put(_Piece(handoff, handoff.next_block, [], token=token))

    def cancel(self, request_id: str, reason: str = "cancelled") -> None:
        """The router no longer wants it, or the step failed: D is told, the router is not."""
        with self._engine.lock:
            handoff = self._by_request.get(request_id)
            if handoff is not None:
                peer = self._peer_of(handoff)
                self._end(handoff)
                peer.todo.put(KvAbort(handoff.ticket.transfer_id, handoff.ticket.epoch, reason))

    # --- the end of a hand-over: one path ---------------------------------------------------------------------------

    def _peer_of(self, handoff: Handoff) -> _Peer:
        return self._peers[(handoff.ticket.worker_id, handoff.ticket.epoch)]

    def _end(self, handoff: Handoff) -> None:
        handoff.ended = True
        handoff.ended_at = time.monotonic()
        del self._by_request[handoff.request.request_id]
        self._peer_of(handoff).handoffs.pop(handoff.ticket.transfer_id, None)

    def _release(self, piece: _Piece) -> None:
        hold = piece.hold
        if hold is None:
            return
        hold.num_pieces -= 1
        if hold.num_pieces == 0:
            self._engine.pool.release(hold.blocks)
            self.holding.remove(hold.blocks)

    def _fail(self, handoff: Handoff, reason: str) -> None:
        if handoff.ended:
            return
        self._end(handoff)
        self._engine.scheduler.cancel(handoff.request.request_id)
        self._on_end(handoff, "transfer_failed", reason)

    def _drop_peer(self, peer: _Peer, reason: str) -> None:
        """The channel is of no use any more. Its hand-overs fail, its references go back."""
        if peer.dead:
            return
        peer.dead = True
        for handoff in list(peer.handoffs.values()):
            self._fail(handoff, reason)
        while peer.unacknowledged:
            self._release(peer.unacknowledged.popleft())
        self._empty(peer)
        key = (peer.ticket.worker_id, peer.ticket.epoch)
        if self._peers.get(key) is peer:
            del self._peers[key]
        peer.todo.put(None)
        if peer.channel is not None:
            peer.channel.close()

    def _empty(self, peer: _Peer) -> None:
        while not peer.todo.empty():
            item = peer.todo.get_nowait()
            if isinstance(item, _Piece):
                self._release(item)

    # --- the writing thread -----------------------------------------------------------------------------------------

    def _write(self, peer: _Peer) -> None:
        reason = "closed"
        try:
            channel = open_channel(
                peer.ticket,
                allowed=self._config.channels,
                secret=self._secret,
                peer_id=self._worker_id,
                timeout_s=self._config.io_timeout_s,
                arena_bytes=int(self._config.arena_memory),
            )
            with self._engine.lock:
                peer.channel = channel
                if peer.dead:
                    channel.close()
                    return
            threading.Thread(
                target=self._read, args=(peer, channel), name=f"kv-acks-{peer.ticket.worker_id}", daemon=True
            ).start()
            while (item := peer.todo.get()) is not None:
                self._renew(peer, channel)
                if not isinstance(item, KvRenew):
                    self._write_one(peer, channel, item)
        except (OSError, ProtocolError) as error:
            reason = f"kv channel to {peer.ticket.worker_id} failed: {error}"
            if not peer.dead:
                logger.warning("%s", reason)
        finally:
            with self._engine.lock:
                self._drop_peer(peer, reason)
                self._empty(peer)

    def _renew(self, peer: _Peer, channel: Channel) -> None:
        with self._engine.lock:
            renewal, peer.renewal = peer.renewal, None
        if renewal is not None:
            channel.send(renewal)

    def _write_one(self, peer: _Peer, channel: Channel, item: _Piece | KvAbort) -> None:
        if not isinstance(item, _Piece):
            channel.send(item)
            return
        handoff = item.handoff
        with self._engine.lock:
            if handoff.ended or peer.dead:
                self._release(item)
                return
            peer.unacknowledged.append(item)
        ticket = handoff.ticket
        if item.token is None:
            num_bytes = len(item.blocks) * ticket.layout.block_bytes
            handoff.num_bytes += num_bytes
            message = KvBlocks(ticket.transfer_id, ticket.epoch, item.first, len(item.blocks), num_bytes)
            channel.send_blocks(message, self._memory.outgoing(item.blocks))
        else:
            new = item.token
            channel.send(
                KvFirstToken(
                    ticket.transfer_id,
                    ticket.epoch,
                    new.token,
                    new.logprobs,
                    handoff.request.num_cached_tokens,
                )
            )
        item.sent_at = time.monotonic()

    # --- the reading thread -----------------------------------------------------------------------------------------

    def _read(self, peer: _Peer, channel: Channel) -> None:
        reason = "closed"
        try:
            while True:
                if not channel.poll(self._config.io_timeout_s):
                    self._check_stall(peer)
                    continue
                ack = channel.recv_ack()
                with self._engine.lock:
                    if not peer.unacknowledged:
                        raise ProtocolError("acknowledgement of nothing")
                    piece = peer.unacknowledged.popleft()
                    self._release(piece)
                    handoff = piece.handoff
                    if handoff.ended:
                        continue
                    if not ack.ok:
                        self._fail(handoff, f"refused by {peer.ticket.worker_id}: {ack.reason}")
                    elif piece.token is not None:
                        handoff.channel_kind = channel.kind
                        self._end(handoff)
                        self._on_end(handoff, None, "")
        except (OSError, ProtocolError) as error:
            reason = f"kv channel to {peer.ticket.worker_id} failed: {error}"
        finally:
            with self._engine.lock:
                self._drop_peer(peer, reason)

    def _check_stall(self, peer: _Peer) -> None:
        with self._engine.lock:
            oldest = peer.unacknowledged[0] if peer.unacknowledged else None
        if oldest is not None and 0 < oldest.sent_at < time.monotonic() - self._config.io_timeout_s:
            raise TimeoutError(f"no acknowledgement for {self._config.io_timeout_s:g} s")

    # --- leases -----------------------------------------------------------------------------------------------------

    def _keep_leases(self) -> None:
        """Tell decode workers that requests are alive which wait, compute, or queue to be sent here.

        Only as long as anything moves here: `computing` tells of the engine, the channel's time-out of the sending.
        """
        while not self._stopping.wait(min(1.0, self._config.lease_s / 4)):
            if not self._computing():
                continue
            with self._engine.lock:
                for peer in self._peers.values():
                    if peer.handoffs and peer.renewal is None:
                        peer.renewal = KvRenew(epoch=peer.ticket.epoch, transfer_ids=list(peer.handoffs))
                        peer.todo.put(peer.renewal)  # wakes the writer

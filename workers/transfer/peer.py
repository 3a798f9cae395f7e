"""The way from this worker to one life of one receiver: its channels, and the threads that write and read them.

A receiver of several ranks needs a channel for each part, a wide tcp road has several for one part. All of them live and
die together. State is guarded by the engine's lock; sockets are used outside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.config import TransferConfig
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import KvAck, KvLayout, PeerStatus, Road
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import Address, Channel, open_channel
from workers.transfer.outbox import Outbox
from workers.transfer.roads import ROADS
from workers.transfer.shards import Part, parts
from workers.transfer.throughput import Throughput

logger = logging.getLogger(__name__)

_IN_FLIGHT = 4  # pieces of a channel: what comes later can still take its turn


@dataclass(slots=True, eq=False)
class Piece:
    """Blocks of a transfer for one part; or, without blocks, a message that is acknowledged."""

    owner: Any  # whoever is told of the acknowledgement
    transfer_id: str
    epoch: int
    first: int = 0
    blocks: Sequence[int] = ()
    layers: range = range(0)
    hold: Any = None  # what keeps the blocks as they are
    message: Any = None
    sent_at: float = 0.0  # 0 until the last byte was handed to the kernel
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    channel: Channel
    outbox: Outbox[Piece]
    unacknowledged: deque[Piece] = field(default_factory=deque)
    num_threads: int = 2  # that use the channel


@dataclass(frozen=True, slots=True)
class Sender:
    """What all peers of a worker share."""

    memories: Sequence[BlockMemory]  # one for each rank
    layout: KvLayout
    config: TransferConfig
    worker_id: str
    secret: bytes
    lock: threading.RLock
    on_ack: Callable[[Peer, Piece, KvAck], None]  # under the lock
    on_lost: Callable[
        [Peer, list[Piece], str], None
    ]  # under the lock, once: no piece of these will be read any more


class Peer:
    def __init__(self, address: Address, sender: Sender) -> None:
        """Raises ValueError when the heads of both sides can't be matched."""
        self.worker_id, self.epoch = address.worker_id, address.epoch
        self.parts = parts(len(sender.memories), address.ranks, sender.layout.num_kv_heads)
        self.dead = False
        self.renewal: Any = None  # goes before whatever waits: a lease must not run out in the queue
        self.throughput = Throughput()
        self._address, self._sender = address, sender
        self._changed = threading.Condition(sender.lock)
        self._outboxes: dict[Part, Outbox[Piece]] = {part: Outbox() for part in self.parts}
        self._lanes: list[_Lane] = []
        self._passed_over: list[str] = []
        self._opened = False
        threading.Thread(target=self._open, name=f"kv-open-{self.worker_id}", daemon=True).start()

    # --- under the lock ---------------------------------------------------------------------------------------------

    @property
    def in_order(self) -> bool:
        """Whether everything goes over one channel, so that what is put last also arrives last."""
        return self._opened and len(self._lanes) == 1

    def put(self, part: Part, piece: Piece) -> None:
        self._outboxes[part].put(piece.transfer_id, piece)
        self._changed.notify_all()

    def put_last(self, piece: Piece) -> None:
        """A message, in turn behind the pieces of its transfer that wait on the same channel."""
        self.put(self.parts[0], piece)

    def tell(self, message: Any) -> None:
        """A message that nobody acknowledges, before everything that waits."""
        self._outboxes[self.parts[0]].put_message(message)
        self._changed.notify_all()

    def withdraw(self, transfer_id: str) -> list[Piece]:
        """The pieces of a transfer that were not sent yet."""
        return [piece for outbox in self._outboxes.values() for piece in outbox.drop(transfer_id)]

    def status(self) -> PeerStatus:
        roads = sorted({lane.channel.road for lane in self._lanes})
        return PeerStatus(
            road="+".join(roads),
            channels=len(self._lanes),
            sent_bytes=self.throughput.num_bytes,
            bytes_per_s=self.throughput.bytes_per_s,
            passed_over=self._passed_over,
        )

    @property
    def local(self) -> bool:
        """Whether the receiver is known to be on this host."""
        return bool(self._lanes) and all(ROADS[lane.channel.road].local for lane in self._lanes)

    @property
    def road(self) -> str:
        return self._lanes[0].channel.road if self._lanes else ""

    def drop(self, reason: str) -> None:
        """The way is of no use any more. What was announced is void before anybody may reuse its blocks."""
        if self.dead:
            return
        self.dead = True
        for lane in self._lanes:
            lane.channel.close()
        lost = [piece for lane in self._lanes for piece in lane.unacknowledged]
        for lane in self._lanes:
            lane.unacknowledged.clear()
        for outbox in self._outboxes.values():
            lost += outbox.drop_all()
        self._changed.notify_all()
        self._sender.on_lost(self, lost, reason)

    # --- threads ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        config = self._sender.config
        try:
            for part in self.parts:
                road, self._passed_over = self._open_lane(part, config.channels)
                if road == "tcp":
                    for _ in range(config.tcp_streams - 1):
                        self._open_lane(part, ["tcp"])  # what did not work for the first is not tried again
            with self._sender.lock:
                self._opened = True
        except Exception as error:  # noqa: BLE001 - whatever it was, those who wait are told
            self._fail(error)

    def _open_lane(self, part: Part, allowed: Sequence[Road]) -> tuple[Road, list[str]]:
        """Which road it is, and why better ones were passed over."""
        sender = self._sender
        channel, passed_over = open_channel(
            self._address,
            part,
            len(sender.memories),
            sender.memories[part.source],
            sender.layout,
            sender.config,
            allowed,
            secret=sender.secret,
            peer_id=sender.worker_id,
        )
        self._run(channel, part)
        return channel.road, passed_over

    def _run(self, channel: Channel, part: Part) -> None:
        lane = _Lane(channel, self._outboxes[part])
        with self._sender.lock:
            if self.dead:
                channel.close()
                channel.release()
                raise ConnectionError("it was given up while it was opened")
            self._lanes.append(lane)
        for job, name in ((self._write, "send"), (self._read, "acks")):
            threading.Thread(
                target=self._serve, args=(lane, job), name=f"kv-{name}-{self.worker_id}", daemon=True
            ).start()

    def _serve(self, lane: _Lane, job: Callable[[_Lane], None]) -> None:
        try:
            job(lane)
        except Exception as error:  # noqa: BLE001 - whatever it was, those who wait are told
            self._fail(error)
        finally:
            with self._sender.lock:
                lane.num_threads -= 1
                last = lane.num_threads == 0
            if last:
                lane.channel.release()

    def _fail(self, error: Exception) -> None:
        reason = f"kv channel to {self.worker_id} failed: {error}"
        with self._sender.lock:
            if not self.dead:
                known = isinstance(error, (OSError, ProtocolError))
                logger.warning("%s", reason, exc_info=None if known else error)
            self.drop(reason)

    def _write(self, lane: _Lane) -> None:
        while True:
            with self._changed:
                item = self._next(lane)
                if item is None:
                    return
                if isinstance(item, Piece):
                    lane.unacknowledged.append(item)
                    self.throughput.begin(time.monotonic())
            self._write_one(lane.channel, item)

    def _next(self, lane: _Lane) -> Any:
        """Waits for something that may be sent. None: the end."""
        first = lane.outbox is self._outboxes[self.parts[0]]
        while not self.dead:
            if first and self.renewal is not None:
                renewal, self.renewal = self.renewal, None
                return renewal
            if lane.outbox.has_message():
                return lane.outbox.take_message()
            if lane.outbox.has_piece() and len(lane.unacknowledged) < _IN_FLIGHT:
                return lane.outbox.take()
            self._changed.wait()
        return None

    def renew(self, renewal: Any) -> None:
        """Under the lock."""
        if self.renewal is None:
            self.renewal = renewal
            self._changed.notify_all()

    @staticmethod
    def _write_one(channel: Channel, item: Any) -> None:
        if not isinstance(item, Piece):
            channel.send(item, acknowledged=False)
            return
        if item.message is not None:
            channel.send(item.message, acknowledged=True)
        else:
            item.num_bytes = channel.num_bytes(len(item.blocks), item.layers)
            channel.send_blocks(item.transfer_id, item.epoch, item.first, item.blocks, item.layers)
        item.sent_at = time.monotonic()

    def _read(self, lane: _Lane) -> None:
        timeout_s = self._sender.config.io_timeout_s
        while True:
            if not lane.channel.poll(timeout_s):
                self._check_stall(lane, timeout_s)
                continue
            ack = lane.channel.recv_ack()
            with self._changed:
                if self.dead:
                    return
                if not lane.unacknowledged:
                    raise ProtocolError("acknowledgement of nothing")
                piece = lane.unacknowledged.popleft()
                idle = not any(one.unacknowledged for one in self._lanes)
                self.throughput.took(piece.num_bytes if ack.ok else 0, time.monotonic(), idle)
                self._changed.notify_all()
                self._sender.on_ack(self, piece, ack)

    def _check_stall(self, lane: _Lane, timeout_s: float) -> None:
        with self._sender.lock:
            oldest = lane.unacknowledged[0] if lane.unacknowledged else None
        if oldest is not None and 0 < oldest.sent_at < time.monotonic() - timeout_s:
            raise TimeoutError(f"no acknowledgement for {timeout_s:g} s")

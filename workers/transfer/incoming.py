"""One connection at the receiver: greets the sender, agrees on how bytes travel, and takes what comes, in order."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.config import TransferConfig
from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    judge_hello,
    kv_to_receiver,
    new_challenge,
    recv_frame,
    recv_frame_with_fds,
    send_frame,
)
from workers.protocol.messages import (
    Hello,
    KvAbort,
    KvAck,
    KvBlocks,
    KvFetch,
    KvFirstToken,
    KvLayout,
    KvOpen,
    KvPrefix,
    KvReady,
    KvRenew,
    KvToReceiver,
    Refused,
    WorkerInfo,
)
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import shut
from workers.transfer.compatibility import mismatch
from workers.transfer.road import End, Inlet, RoadBlocked, RoadKind
from workers.transfer.shards import Part, parts
from workers.transfer.tickets import TicketGone, Tickets

logger = logging.getLogger(__name__)

_MAX_FDS = 4


@dataclass(frozen=True, slots=True)
class Target:
    """What a listener leads to: one rank of this worker, by one road."""

    road: RoadKind
    rank: int
    ranks: int
    memory: BlockMemory
    layout: KvLayout
    config: TransferConfig
    tickets: Tickets
    secret: bytes
    on_fetch: Callable[[KvFetch], str | None]


class Incoming:
    def __init__(self, sock: socket.socket, target: Target, info: WorkerInfo) -> None:
        self._sock, self._target, self._info = sock, target, info
        self._inlet: Inlet | None = None
        self._peer_id = ""
        self._part = Part(0, 0, range(0))
        self._source_ranks = 0

    def greet(self) -> bool:
        """False: refused, and told so."""
        challenge = new_challenge()
        send_frame(self._sock, challenge)
        timeout_s = self._target.config.io_timeout_s
        deadline = time.monotonic() + timeout_s
        hello = recv_frame(self._sock, kv_to_receiver, max_bytes=MAX_GREETING_BYTES, deadline=deadline)
        self._sock.settimeout(timeout_s)
        answer = judge_hello(self._target.secret, challenge, hello, self._info)
        send_frame(self._sock, answer)
        if isinstance(answer, Refused):
            logger.warning("kv channel refused: %s", answer.reason)
            return False
        self._peer_id = hello.peer_id if isinstance(hello, Hello) else ""
        return True

    def open(self) -> bool:
        """Agree with the sender on the road. False: it can't be, and it was told why."""
        opened, fds = self._recv_open()
        refusal = None
        try:
            if not isinstance(opened, KvOpen):
                raise ProtocolError(f"{type(opened).__name__} where KvOpen was due")
            refusal = self._refusal(opened)
            if refusal is None:
                given, fds = fds, []  # the inlet's from here on
                self._inlet = self._target.road.inlet(self._end(opened), opened, given, self._sock)
        except RoadBlocked as error:
            refusal = KvReady(ok=False, reason=str(error))
        finally:
            for fd in fds:
                os.close(fd)
        send_frame(self._sock, refusal or KvReady(ok=True))
        if refusal is not None:
            logger.warning(
                "kv channel (%s) refused to %s: %s", self._target.road.name, self._peer_id, refusal.reason
            )
        return refusal is None

    def _recv_open(self) -> tuple[KvToReceiver, list[int]]:
        if self._sock.family == socket.AF_UNIX:
            return recv_frame_with_fds(
                self._sock, kv_to_receiver, max_fds=_MAX_FDS, max_bytes=MAX_GREETING_BYTES
            )
        return recv_frame(self._sock, kv_to_receiver, max_bytes=MAX_GREETING_BYTES), []

    def _refusal(self, opened: KvOpen) -> KvReady | None:
        target = self._target
        if opened.road != target.road.name:
            raise ProtocolError(f"{opened.road} asked for at the door of {target.road.name}")
        reason = mismatch(target.layout, opened.layout, self._peer_id)
        if reason is None and opened.compression != "none" and target.layout.quantized:
            reason = f"blocks of {target.layout.dtype} are not compressed to {opened.compression}"
        if reason is None:
            try:
                for part in parts(opened.ranks, target.ranks, target.layout.num_kv_heads):
                    if (part.source, part.destination) == (opened.rank, target.rank):
                        self._part, self._source_ranks = part, opened.ranks
                        return None
                reason = f"rank {target.rank} of {target.ranks} wants nothing of rank {opened.rank} of {opened.ranks}"
            except ValueError as error:
                reason = str(error)
        return KvReady(ok=False, reason=reason, final=True)

    def _end(self, opened: KvOpen) -> End:
        target, part = self._target, self._part
        own = part.destination_heads(target.ranks, target.layout.num_kv_heads)
        return End(target.memory, target.layout, part.heads, own, target.config)

    def run(self, stopping: Callable[[], bool]) -> None:
        tickets = self._target.tickets
        idle = select.poll()
        idle.register(self._sock, select.POLLIN)
        while not stopping():
            idle.poll()  # between frames a sender may be silent for as long as it likes; leases look after tickets
            message = recv_frame(self._sock, kv_to_receiver)
            match message:
                case KvBlocks():
                    send_frame(self._sock, self._take_blocks(message))
                case KvFirstToken() | KvPrefix():
                    send_frame(self._sock, self._land(message))
                case KvFetch():
                    refusal = self._target.on_fetch(message)
                    send_frame(self._sock, KvAck(message.transfer_id, refusal is None, refusal or ""))
                case KvRenew():
                    for transfer_id in message.transfer_ids:
                        tickets.renew(transfer_id, message.epoch)
                case KvAbort():
                    tickets.abort(message.transfer_id, message.epoch, message.reason)
                case _:
                    raise ProtocolError(f"{type(message).__name__} is not expected here")

    def close(self) -> None:
        if self._inlet is not None:
            self._inlet.close()
        shut(self._sock)

    def _take_blocks(self, message: KvBlocks) -> KvAck:
        assert self._inlet is not None
        blocks = range(message.first, message.first + message.count)
        num_layers = message.num_layers or self._target.layout.num_layers
        layers = range(message.first_layer, message.first_layer + num_layers)
        began = False
        try:
            with self._target.tickets.writing_blocks(
                message.transfer_id,
                message.epoch,
                self._source_ranks,
                self._part,
                blocks,
                layers,
                message.num_bytes,
            ) as ids:
                began = True
                self._inlet.take(message, ids, layers)
        except TicketGone as error:
            if not began:
                self._inlet.skip(message)
            return KvAck(transfer_id=message.transfer_id, ok=False, reason=str(error))
        except Exception as error:
            self._target.tickets.abort(message.transfer_id, message.epoch, f"the channel broke: {error}")
            raise
        return KvAck(transfer_id=message.transfer_id, ok=True)

    def _land(self, message: KvFirstToken | KvPrefix) -> KvAck:
        try:
            self._target.tickets.land(message)
        except TicketGone as error:
            return KvAck(transfer_id=message.transfer_id, ok=False, reason=str(error))
        return KvAck(transfer_id=message.transfer_id, ok=True)

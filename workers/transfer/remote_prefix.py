"""A prefix that another worker has: its blocks are asked for, and sent like those of any hand-over."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence

from workers.engine.request import Request
from workers.protocol.messages import FailureCode, KvFetch, KvFirstToken, KvPrefix, PrefixHolder
from workers.transfer.handoff import Handoffs
from workers.transfer.tickets import Tickets

_LOOK_S = 0.02  # how often the reader asks whether it should go on
_LEASE_S = 2.0  # without progress


class RemotePrefix:
    """A PrefixSource (workers/prefix_loader.py) for one request."""

    def __init__(
        self,
        request: Request,
        holder: PrefixHolder,
        block_size: int,
        tickets: Tickets,
        handoffs: Handoffs,
    ) -> None:
        self._request, self._holder = request, holder
        self._tickets, self._handoffs = tickets, handoffs
        self.num_tokens = holder.num_blocks * block_size
        self.name = f"worker {holder.worker_id}"

    def count(self, hashes: Sequence[bytes]) -> int:
        held = set(self._request.block_hashes[: self._holder.num_blocks])
        for count, block_hash in enumerate(hashes):
            if block_hash not in held:
                return count
        return len(hashes)

    def read(self, hashes: Sequence[bytes], blocks: Sequence[int], go_on: Callable[[], bool]) -> int:
        transfer_id = uuid.uuid4().hex
        landing = _Fetched(blocks)
        ticket = self._tickets.expect(transfer_id, landing, 0, len(blocks), _LEASE_S)
        try:
            self._handoffs.ask(self._holder, KvFetch(transfer_id, ticket, list(hashes)), landing.answered)
            while not landing.ended.wait(_LOOK_S):
                if not go_on():
                    return 0
        finally:
            self._tickets.withdraw(transfer_id)  # what still comes is refused, and written nowhere
        return landing.count


class _Fetched:
    """A Landing: blocks that a Fill holds."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = blocks
        self.ended = threading.Event()
        self.count = 0

    def blocks(self, first: int, count: int) -> list[int]:
        return list(self._blocks[first : first + count])

    def land(self, message: KvFirstToken | KvPrefix, opened: float, num_bytes: int) -> None:
        if isinstance(message, KvPrefix):
            self.count = message.count
        self.ended.set()

    def lose(self, code: FailureCode, reason: str) -> None:
        self.ended.set()

    def answered(self, ok: bool, reason: str) -> None:
        if not ok:
            self.ended.set()

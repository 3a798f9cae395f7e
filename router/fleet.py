"""The workers that are registered, and a link to each.

The registry says who should be there, the links say who is. A worker that is in the registry is connected to, again
and again while it stays there. One that left the registry but whose link is alive is not cut off: the streams on it
go on, it only gets nothing new after a grace period (a Redis that came back empty looks like everybody leaving at
once). A new epoch replaces the old life at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from router.generation import ModelInfo
from router.load import LoadBook
from router.roster import Roster, Standing, Usable
from router.worker_link import LinkDown, WorkerLink
from workers.protocol.messages import Load, Room, WorkerInfo

log = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_MANY = 2**31  # of what a worker does not tell


@dataclass(slots=True)
class Member:
    info: WorkerInfo
    link: WorkerLink
    keeper: asyncio.Task[None] | None = None
    missing_since: float | None = None  # left the registry, monotonic seconds
    leaving: bool = False

    @property
    def state(self) -> str:
        if self.link.state == "up" and (self.leaving or self.link.draining):
            return "leaving"
        return self.link.state


class Fleet:
    """Lives in one event loop. `on_room(room)` is called whenever a decode worker tells what it can take."""

    def __init__(
        self,
        *,
        secret: bytes,
        router_id: str,
        heartbeat_s: float,
        timeout_s: float,
        book: LoadBook,
        grace_s: float = 5.0,
        on_room: Callable[[Room], None] = lambda room: None,
        on_late: Callable[[], None] = lambda: None,
        standing: Standing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`standing`: what the policy sorts workers by."""
        self._secret = secret
        self._router_id = router_id
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._book = book
        self._grace_s = grace_s
        self._on_room = on_room
        self._on_late = on_late
        self._rng = rng or random.Random()
        self._roster = Roster(book, standing, self._rng)
        self._members: dict[str, Member] = {}
        self._last_epochs: dict[str, int] = {}  # of everyone ever seen: an old life must not come back

    # --- what the registry says -------------------------------------------------------------------------------------

    def sync(self, registered: Mapping[str, WorkerInfo]) -> None:
        """`registered`: the workers with a lease, now."""
        for worker_id, info in registered.items():
            member = self._members.get(worker_id)
            if info.epoch < self._last_epochs.get(worker_id, 0):
                continue
            if member is not None and member.info.epoch == info.epoch:
                member.missing_since, member.leaving = None, False
                continue
            if member is not None:
                self._remove(worker_id, f"replaced by epoch {info.epoch}")
            self._add(info)
        now = time.monotonic()
        for worker_id, member in list(self._members.items()):
            held = registered.get(worker_id)
            if held is not None and held.epoch == member.info.epoch:
                continue
            member.missing_since = now if member.missing_since is None else member.missing_since
            member.leaving = now - member.missing_since >= self._grace_s
            if member.link.state != "up" or (member.leaving and member.link.num_requests == 0):
                self._remove(worker_id, "it left the registry")

    def _add(self, info: WorkerInfo) -> None:
        log.info("worker %s:%d (%s) at %s", info.worker_id, info.epoch, info.role, info.address)
        known = (member.info for member in self._members.values())
        other = next((worker for worker in known if worker.hash_root != info.hash_root), None)
        if other is not None:
            log.warning(
                "worker %s (%s) and %s (%s) differ in weights, KV format or block size: no request uses both",
                info.worker_id,
                info.device,
                other.worker_id,
                other.device,
            )
        member = Member(info=info, link=self._new_link(info))
        self._members[info.worker_id] = member
        self._roster.enlist(info)
        self._last_epochs[info.worker_id] = info.epoch
        member.keeper = asyncio.create_task(self._keep(member))

    def _remove(self, worker_id: str, reason: str) -> None:
        member = self._members.pop(worker_id)
        log.info("worker %s:%d is gone: %s", worker_id, member.info.epoch, reason)
        if member.keeper is not None:
            member.keeper.cancel()
        member.link.close(reason)
        self._roster.strike(worker_id)
        self._book.forget(worker_id)

    async def close(self) -> None:
        keepers = [member.keeper for member in self._members.values() if member.keeper is not None]
        for worker_id in list(self._members):
            self._remove(worker_id, "the router stops")
        await asyncio.gather(*keepers, return_exceptions=True)

    # --- links ------------------------------------------------------------------------------------------------------

    def _new_link(self, info: WorkerInfo) -> WorkerLink:
        return WorkerLink(
            info,
            secret=self._secret,
            router_id=self._router_id,
            heartbeat_s=self._heartbeat_s,
            timeout_s=self._timeout_s,
            on_load=self._heard_load,
            on_late=self._on_late,
        )

    async def _keep(self, member: Member) -> None:
        """Connect, wait for the end, connect again; until the member is removed."""
        backoff_s = _MIN_BACKOFF_S
        while True:
            try:
                await member.link.connect()
            except LinkDown as error:
                log.debug("worker %s: %s", member.info.worker_id, error)
            else:
                backoff_s = _MIN_BACKOFF_S
                self._heard_load(member.link, Load(free_blocks=member.info.num_blocks))
                await member.link.wait_down()
                log.warning("lost worker %s: %s", member.info.worker_id, member.link.reason)
                self._book.forget(member.info.worker_id)
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.5))
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            member.link = self._new_link(member.info)

    def _heard_load(self, link: WorkerLink, load: Load) -> None:
        self._book.report(link.worker_id, load)
        if link.info.role != "decode" or link.busy:  # those who wait have been there
            return
        room = load.room or Room(_MANY, load.free_blocks, _MANY)
        if self._roster.views(link.info.hash_root).pool("prefill").size:
            room = Room(room.requests, room.blocks, _MANY)  # prompts are read elsewhere
        self._on_room(room)

    # --- asked by dispatch ------------------------------------------------------------------------------------------

    def members(self) -> Iterator[Member]:
        return iter(self._members.values())

    def link(self, worker_id: str) -> WorkerLink | None:
        """None: the worker can't be given work now."""
        member = self._members.get(worker_id)
        return member.link if member is not None and member.state == "up" else None

    def reference(self) -> WorkerInfo | None:
        """The decode worker whose model new requests are for: the first that is up, else the first."""
        decodes = [m for m in self._members.values() if m.info.role == "decode"]
        up = next((m for m in decodes if m.link.state == "up"), None)
        chosen = up or next(iter(decodes), None)
        return None if chosen is None else chosen.info

    def model(self) -> ModelInfo | None:
        reference = self.reference()
        if reference is None:
            return None
        same = [m.info for m in self._members.values() if m.info.hash_root == reference.hash_root]
        return ModelInfo(
            name=reference.model,
            max_model_len=min(info.max_model_len for info in same),
            vocab_size=reference.vocab_size,
        )

    def ready(self) -> bool:
        return any(m.info.role == "decode" and m.state == "up" for m in self._members.values())

    def views(self, hash_root: bytes, num_blocks: int = 1) -> Usable:
        """Workers of this model that can be given a request of so many blocks now."""
        return self._roster.views(hash_root, lambda worker_id: self._is_usable(worker_id, num_blocks))

    def _is_usable(self, worker_id: str, num_blocks: int) -> bool:
        member = self._members.get(worker_id)
        if member is None:
            return False
        link = member.link
        return link.state == "up" and link.may_take(num_blocks) and not (link.draining or member.leaving)

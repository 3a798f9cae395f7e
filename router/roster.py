"""The workers, kept sorted: what a policy needs so as not to look at all of them for every request.

Two forms of the same: a `Roster` follows a `LoadBook` and sorts a worker in again whenever its load changes, in
logarithmic time but for moving pointers; `Listed` sorts any views on the spot. What "standing" is the policy says: a
part of a worker's cost that is the same for every request, such as its queue.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, runtime_checkable

from router.load import LoadBook
from router.policy import WorkerView
from workers.protocol.messages import Role, WorkerInfo

Entry = tuple[float, float, str]  # standing, a random number between equals, worker_id


@dataclass(frozen=True, slots=True)
class Pool:
    """All workers of one role."""

    size: int = 0
    recent_requests: float = 0.0  # the mean
    prefill_token_s: float = 0.0  # the fastest that is known; 0: none is
    decode_step_s: float = 0.0
    attention: float = 0.0  # what a position that a prompt token attends to costs, in prompt tokens

    @classmethod
    def of(cls, views: Collection[WorkerView], recent_requests: float) -> Pool:
        """`recent_requests`: the mean."""
        attentions = [
            v.prefill_pair_s / v.prefill_token_s for v in views if v.prefill_pair_s and v.prefill_token_s
        ]
        return cls(
            len(views),
            recent_requests,
            min((v.prefill_token_s for v in views if v.prefill_token_s), default=0.0),
            min((v.decode_step_s for v in views if v.decode_step_s), default=0.0),
            median(attentions) if attentions else 0.0,
        )


Standing = Callable[[WorkerView, Pool], float]


@runtime_checkable
class Sorts(Protocol):
    """A policy for which views should be kept sorted."""

    def standing(self, view: WorkerView, pool: Pool) -> float:
        """A lower bound of what the worker costs any request, with its part that hangs on the request left out."""


class Listed:
    """Views of one model, sorted here and now."""

    def __init__(self, views: Iterable[WorkerView], standing: Standing, rng: random.Random) -> None:
        self._views = {view.worker_id: view for view in views}
        self._pools: dict[Role, Pool] = {role: self._sum_up(role) for role in ("prefill", "decode")}
        self._sorted = {
            role: sorted(
                (standing(view, self._pools[role]), rng.random(), view.worker_id) for view in self._of(role)
            )
            for role in self._pools
        }

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._views.values())

    def get(self, worker_id: str, role: Role) -> WorkerView | None:
        view = self._views.get(worker_id)
        return view if view is not None and view.role == role else None

    def ranked(self, role: Role, host: str | None = None) -> Iterator[tuple[float, WorkerView]]:
        """Best standing first, equals in random order; of one host when it is given."""
        for standing, _, worker_id in self._sorted[role]:
            view = self._views[worker_id]
            if host is None or view.host == host:
                yield standing, view

    def pool(self, role: Role) -> Pool:
        return self._pools[role]

    def _of(self, role: Role) -> list[WorkerView]:
        return [view for view in self._views.values() if view.role == role]

    def _sum_up(self, role: Role) -> Pool:
        views = self._of(role)
        return Pool.of(views, sum(view.recent_requests for view in views) / max(len(views), 1))


class Roster:
    """All workers of a fleet, apart by model (`WorkerInfo.hash_root`) and role."""

    def __init__(
        self, book: LoadBook, standing: Standing | None = None, rng: random.Random | None = None
    ) -> None:
        """Takes over `book.on_change`."""
        self._book = book
        self._standing = standing or (lambda view, pool: 0.0)
        self._rng = rng or random.Random()
        self._infos: dict[str, tuple[WorkerInfo, str]] = {}  # and the host
        self._ranks: dict[tuple[bytes, Role], _Rank] = {}
        book.on_change = self._changed

    def enlist(self, info: WorkerInfo) -> None:
        """A new worker, or the next life of one."""
        self.strike(info.worker_id)
        self._infos[info.worker_id] = (info, host_of(info))
        self._changed(info.worker_id)

    def strike(self, worker_id: str) -> None:
        """It is gone. Unknown workers are fine."""
        info, _ = self._infos.pop(worker_id, (None, ""))
        if info is not None:
            self._ranks[info.hash_root, info.role].remove(worker_id)

    def views(self, hash_root: bytes, usable: Callable[[str], bool] = lambda worker_id: True) -> Usable:
        """Those of this model that are usable at the moment they are looked at."""
        return Usable(self._rank(hash_root, "prefill"), self._rank(hash_root, "decode"), usable)

    def _rank(self, hash_root: bytes, role: Role) -> _Rank:
        rank = self._ranks.get((hash_root, role))
        if rank is None:
            rank = self._ranks[hash_root, role] = _Rank(self._standing, self._rng)
        return rank

    def _changed(self, worker_id: str) -> None:
        known = self._infos.get(worker_id)
        if known is None:
            return
        info, host = known
        account = self._book.account(worker_id)
        view = WorkerView(
            worker_id,
            info.role,
            account.queued_prefill_tokens,
            account.active_blocks,
            account.recent_requests(self._book.clock(), self._book.window_s),
            account.prefill_token_s,
            account.decode_step_s,
            host,
            account.reported.peers,
            account.queued_prefill_pairs,
            account.prefill_pair_s,
        )
        self._rank(info.hash_root, info.role).put(view)


def host_of(info: WorkerInfo) -> str:
    """Roads within a host name it; else the address that the worker listens on stands for it."""
    named = next((endpoint.host_id for endpoint in info.endpoints if endpoint.host_id), "")
    return named or info.address.rpartition(":")[0]


@dataclass(slots=True)
class _Rank:
    """The workers of one model and role, in order."""

    standing: Standing
    rng: random.Random
    views: dict[str, WorkerView] = field(default_factory=dict)
    order: list[Entry] = field(default_factory=list)
    by_host: dict[str, list[Entry]] = field(default_factory=dict)
    pool: Pool = field(default_factory=Pool)
    _entries: dict[str, Entry] = field(default_factory=dict)
    _recent: float = 0.0  # sum over the views

    def put(self, view: WorkerView) -> None:
        before = self.views.get(view.worker_id)
        self._take_out(view.worker_id)
        self.views[view.worker_id] = view
        self._recent += view.recent_requests
        if self._sum_up(view, before):
            self._sort_anew()
        else:
            self._sort_in(view)

    def remove(self, worker_id: str) -> None:
        before = self.views.get(worker_id)
        self._take_out(worker_id)
        if self._sum_up(None, before):
            self._sort_anew()

    def _take_out(self, worker_id: str) -> None:
        view = self.views.pop(worker_id, None)
        entry = self._entries.pop(worker_id, None)
        if view is None or entry is None:
            return
        self._recent -= view.recent_requests
        for order in (self.order, self.by_host[view.host]):
            del order[bisect_left(order, entry)]
        if not self.by_host[view.host]:
            del self.by_host[view.host]

    def _sort_in(self, view: WorkerView) -> None:
        entry = (self.standing(view, self.pool), self.rng.random(), view.worker_id)
        self._entries[view.worker_id] = entry
        insort(self.order, entry)
        insort(self.by_host.setdefault(view.host, []), entry)

    def _sort_anew(self) -> None:
        self.order, self.by_host, self._entries = [], {}, {}
        for view in self.views.values():
            self._sort_in(view)

    def _sum_up(self, view: WorkerView | None, before: WorkerView | None) -> bool:
        """True: the pool's paces are others now, and everybody's standing with them."""
        old = self.pool
        count = len(self.views)
        mean = max(self._recent, 0.0) / max(count, 1)
        if _paces(view) == _paces(before):
            self.pool = Pool(count, mean, old.prefill_token_s, old.decode_step_s, old.attention)
            return False
        self.pool = Pool.of(self.views.values(), mean)
        return _paces_of(self.pool) != _paces_of(old)


def _paces(view: WorkerView | None) -> tuple[float, float, float]:
    return (
        (0.0, 0.0, 0.0) if view is None else (view.prefill_token_s, view.decode_step_s, view.prefill_pair_s)
    )


def _paces_of(pool: Pool) -> tuple[float, float, float]:
    return pool.prefill_token_s, pool.decode_step_s, pool.attention


class Usable:
    """The workers of a roster that can be given work now. Iterates over their views."""

    def __init__(self, prefill: _Rank, decode: _Rank, usable: Callable[[str], bool]) -> None:
        self._ranks: dict[Role, _Rank] = {"prefill": prefill, "decode": decode}
        self._usable = usable

    def __iter__(self) -> Iterator[WorkerView]:
        for rank in self._ranks.values():
            for worker_id, view in rank.views.items():
                if self._usable(worker_id):
                    yield view

    def get(self, worker_id: str, role: Role) -> WorkerView | None:
        view = self._ranks[role].views.get(worker_id)
        return view if view is not None and self._usable(worker_id) else None

    def ranked(self, role: Role, host: str | None = None) -> Iterator[tuple[float, WorkerView]]:
        rank = self._ranks[role]
        order = rank.order if host is None else rank.by_host.get(host, [])
        for standing, _, worker_id in order:
            if self._usable(worker_id):
                yield standing, rank.views[worker_id]

    def pool(self, role: Role) -> Pool:
        return self._ranks[role].pool


Ranked = Listed | Usable

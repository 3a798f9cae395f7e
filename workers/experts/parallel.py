"""The routed experts of one layer, spread over the ranks of a group: dispatch, compute, combine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.reference_moe import combine
from workers.experts.copies import LayerCopies
from workers.experts.counts import Counts
from workers.experts.exchange import Bound, Exchange, Parcel

# x [N, H] sorted by slot, rows of each slot [slots] -> [N, H]
Compute = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True, slots=True)
class Route:
    """What one layer of the present placement needs."""

    copies: LayerCopies
    compute: Compute
    slots: int  # of this rank, in this layer


class Ranks(Protocol):
    """The group as a layer sees it; the answers change between two steps only."""

    @property
    def exchange(self) -> Exchange: ...

    def route(self, layer: int) -> Route: ...


@dataclass(frozen=True, slots=True)
class Ways:
    """Where a step's assignments go: a = token * k + j is a token's j-th expert."""

    order: NDArray[np.int64]  # [T * k] assignments, those of one member after the other
    bound: list[Bound]  # by member
    counts: list[int]  # by member, assignments

    @staticmethod
    def of(experts: NDArray[Any], copies: LayerCopies, size: int) -> Ways:
        """experts [T, k], logical."""
        members, slots = copies.choose(experts.reshape(-1))
        order = np.argsort(members, kind="stable")
        counts = np.bincount(members, minlength=size)
        parts = np.split(order, np.cumsum(counts)[:-1])
        bound = [_bound(part // experts.shape[1], slots[part]) for part in parts]
        return Ways(order, bound, counts.tolist())


class ParallelExperts:
    """Called with all of a step's tokens of this rank, none included: every member calls each layer once a step."""

    def __init__(self, layer: int, top_k: int, hidden: int, ranks: Ranks, counts: Counts) -> None:
        """`layer`: among those that have experts."""
        self._layer, self._top_k, self._hidden = layer, top_k, hidden
        self._ranks, self._counts = ranks, counts

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, H], weights float32 [T, k], experts int64 [T, k] -> float32 [T, H]. Raises GroupBroken."""
        return self.start(x, weights, experts)()

    def start(self, x: Tensor, weights: Tensor, experts: Tensor) -> Callable[[], Tensor]:
        """Send the tokens; what is returned takes part in the rest. Work in between hides the way."""
        route, exchange = self._ranks.route(self._layer), self._ranks.exchange
        chosen = experts.cpu().numpy()
        self._counts.routed(self._layer, chosen)
        ways = Ways.of(chosen, route.copies, exchange.size)
        exchange.dispatch(x, ways.bound)

        def finish() -> Tensor:
            parcels = exchange.receive()
            own = ways.bound[exchange.me]
            rows = x.index_select(0, torch.from_numpy(own.tokens).to(x.device))
            parcels[exchange.me] = Parcel(own.ids, rows)
            outputs = self._compute(route, [parcel for parcel in parcels if parcel is not None])
            exchange.combine(outputs)
            results = exchange.results(ways.counts)
            results[exchange.me] = outputs[exchange.me]
            back = torch.cat([result for result in results if result is not None])
            return combine(back, torch.from_numpy(ways.order).to(x.device), weights)

        return finish

    def idle(self, like: Tensor) -> None:
        """Take part without tokens of one's own. `like`: any tensor of the model's dtype and device."""
        none = like.new_empty((0, self._top_k), dtype=torch.int64)
        self(like.new_empty((0, self._hidden)), none.float(), none)

    def _compute(self, route: Route, parcels: Sequence[Parcel]) -> list[Tensor]:
        """For each parcel a row for each of its ids."""
        began = time.perf_counter()
        rows = torch.cat([parcel.rows for parcel in parcels])
        starts = np.cumsum([0] + [len(parcel.rows) for parcel in parcels[:-1]])
        row = np.concatenate([p.ids[:, 0] + start for p, start in zip(parcels, starts, strict=True)])
        slot = np.concatenate([parcel.ids[:, 1] for parcel in parcels])
        order = np.argsort(slot, kind="stable")
        by_slot = np.bincount(slot, minlength=route.slots)
        y_sorted = route.compute(rows.index_select(0, _index(row[order], rows)), by_slot)
        y = torch.empty_like(y_sorted)
        y[_index(order, rows)] = y_sorted
        self._counts.computed(self._layer, by_slot, time.perf_counter() - began)
        return list(torch.split(y, [len(parcel.ids) for parcel in parcels]))


def _bound(tokens: NDArray[np.int64], slots: NDArray[np.int32]) -> Bound:
    """tokens [A], ascending, repeated where several experts of one token are there."""
    first = np.ones(len(tokens), bool)
    np.not_equal(tokens[1:], tokens[:-1], out=first[1:])
    ids = np.empty((len(tokens), 2), np.int32)
    ids[:, 0] = np.cumsum(first) - 1
    ids[:, 1] = slots
    return Bound(ids, tokens[first])


def _index(values: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(like.device)

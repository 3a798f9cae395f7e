"""The routed experts of the native CPU step, as a group places them: its ExpertExchange, and the source of its slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.expert_exchange import Addresses, Received, Routed, row_addresses
from kernels.cpu.experts import ExpertTable
from kernels.cpu.packed import PackedExpert
from workers.experts.counts import Counted
from workers.experts.parallel import Compute, Ranks, Ways

_PAGE = 4096


class NativeExperts:
    """Rows are neither copied on their way out of the step's memory nor into it, but for the one copy into the window
    of another rank: the kernels read and write where the exchange has them."""

    def __init__(self, table: ExpertTable, hidden: int) -> None:
        self._table, self._hidden = table, hidden
        self._like = table.logical(0, 0)
        self._own = torch.empty((0, hidden))  # results for this rank's own tokens
        self._taken = np.zeros_like(table.routed), np.zeros_like(table.computed)
        self._steps, self._expert_s, self._began = 0, 0.0, 0.0
        self.ranks: Ranks  # both given before the first step
        self.idle_step: Callable[[], object]

    def idle(self) -> None:
        self.idle_step()

    def take_counts(self) -> Counted:
        now = self._table.routed.copy(), self._table.computed.copy()
        routed, computed = (array - before for array, before in zip(now, self._taken, strict=True))
        taken = Counted(routed, computed, self._steps, self._expert_s)
        self._taken, self._steps, self._expert_s = now, 0, 0.0
        return taken

    # --- the calls of a layer ---------------------------------------------------------------------------------------

    def send(self, routed: Routed) -> None:
        exchange = self._exchange = self.ranks.exchange
        self._ways = Ways.of(routed.experts, self.ranks.route(routed.layer).copies, exchange.size)
        self._steps += routed.layer == 0 and len(routed.rows) > 0
        self._rows = routed.rows
        x = torch.from_numpy(routed.rows)
        exchange.dispatch(x.view(torch.bfloat16) if x.dtype == torch.uint16 else x, self._ways.bound)

    def receive(self) -> Received:
        exchange, mine = self._exchange, self._ways.bound[self._exchange.me]
        parcels = exchange.receive()
        self._results = exchange.room([0 if parcel is None else len(parcel.ids) for parcel in parcels])
        if len(mine.ids) > len(self._own):
            self._own = torch.empty((len(mine.ids), self._hidden))
        rows: list[Addresses] = []
        slots: list[NDArray[np.int32]] = []
        outputs: list[Addresses] = []
        for parcel, result in zip(parcels, self._results, strict=True):
            if parcel is None or result is None:
                rows.append(row_addresses(self._rows)[mine.tokens[mine.ids[:, 0]]])
                slots.append(mine.ids[:, 1])
                outputs.append(_addresses(self._own)[: len(mine.ids)])
            else:
                rows.append(_addresses(parcel.rows)[parcel.ids[:, 0]])
                slots.append(parcel.ids[:, 1])
                outputs.append(_addresses(result))
        self._parcels = parcels  # until the outputs are written
        self._began = time.perf_counter()
        return Received(np.concatenate(rows), np.concatenate(slots), np.concatenate(outputs))

    def give_back(self) -> None:
        self._expert_s += time.perf_counter() - self._began
        self._exchange.combine(self._results)

    def collect(self) -> Addresses:
        ways = self._ways
        self._answers = self._exchange.results(ways.counts)
        by_member = [
            _addresses(self._own)[:count] if answer is None else _addresses(answer)
            for answer, count in zip(self._answers, ways.counts, strict=True)
        ]
        addresses: Addresses = np.empty(len(ways.order), np.uint64)
        addresses[ways.order] = np.concatenate(by_member)
        return addresses

    # --- for the group ----------------------------------------------------------------------------------------------

    def load(self, layer: int, expert: int) -> PackedExpert:
        """From the packed file, which the workers of a host share: reading its pages is what loads it."""
        packed = self._table.logical(layer, expert)
        for array in packed.arrays:
            array.view(np.uint8).reshape(-1)[::_PAGE].max()
        return packed

    def num_bytes(self) -> int:
        return self._like.nbytes

    def install(self, layer: int, weights: Sequence[PackedExpert]) -> Compute:
        for slot in range(self._table.slots):
            self._table.set_expert(layer, slot, weights[slot] if slot < len(weights) else None)
        return _by_the_step

    def arrays(self, weights: PackedExpert) -> list[NDArray[np.uint8]]:
        return [array.view(np.uint8).reshape(-1) for array in weights.arrays]

    def from_bytes(self, data: NDArray[np.uint8]) -> PackedExpert:
        parts, begin = [], 0
        for like in self._like.arrays:
            parts.append(data[begin : begin + like.nbytes].view(like.dtype).reshape(like.shape))
            begin += like.nbytes
        return self._like.with_arrays(parts)


def _addresses(rows: Tensor) -> Addresses:
    stride = np.uint64(rows.stride(0) * rows.element_size())
    return np.uint64(rows.data_ptr()) + np.arange(len(rows), dtype=np.uint64) * stride


def _by_the_step(x: Tensor, by_slot: NDArray[np.int64]) -> Tensor:
    raise AssertionError("the native step computes experts by itself")

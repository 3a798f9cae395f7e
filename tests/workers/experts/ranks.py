"""A few ranks of a group in one process, a thread each, with made-up experts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.reference_moe import combine, grouped_mlp, permute
from tests.workers.experts.fake_nccl import FakeCuda, World
from workers.experts.copies import LayerCopies
from workers.experts.counts import Counts
from workers.experts.exchange import Exchange, Shape
from workers.experts.gloo import GlooExchange, GlooStore
from workers.experts.nccl import NcclExchange
from workers.experts.parallel import ParallelExperts, Route
from workers.experts.shm import Segment, ShmExchange
from workers.protocol.experts import Placement

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """Of all experts of a layer."""

    gate_up: Tensor  # [E, 2I, H]
    down: Tensor  # [E, H, I]

    @staticmethod
    def random(num_experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
        down = torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5
        return Weights(gate_up.to(dtype), down.to(dtype))

    def local(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The layer on one rank, by the oracle."""
        order, counts = permute(experts, len(self.gate_up))
        y = grouped_mlp(x[order // experts.shape[1]], counts, self.gate_up, self.down)
        return combine(y, order, weights)


class Rank:
    """One layer; what `ParallelExperts` asks of a group."""

    def __init__(
        self, exchange: Exchange, placement: Placement, weights: Weights, members: Sequence[int], top_k: int
    ) -> None:
        num_experts, hidden = weights.gate_up.shape[0], weights.gate_up.shape[2]
        self.exchange = exchange
        held = list(placement.layers[0][members[exchange.me]])

        def compute(x: Tensor, by_slot: np.ndarray) -> Tensor:
            return grouped_mlp(x, torch.from_numpy(by_slot), weights.gate_up[held], weights.down[held])

        copies = LayerCopies(placement, 0, num_experts, members, exchange.me)
        self._route = Route(copies, compute, len(held))
        self.counts = Counts(1, num_experts, num_experts)
        self.experts = ParallelExperts(0, top_k, hidden, self, self.counts)

    def route(self, layer: int) -> Route:
        assert layer == 0
        return self._route


def shm(size: int, shape: Shape) -> list[ShmExchange]:
    segment = Segment(size, shape)
    try:
        return [ShmExchange(segment.path, size, me, shape) for me in range(size)]
    finally:
        segment.close()


def gloo(size: int, shape: Shape) -> list[GlooExchange]:
    store = GlooStore("127.0.0.1", 20.0)
    exchanges = at_once(
        [partial(GlooExchange, store.at, "127.0.0.1", size, me, shape, 20.0) for me in range(size)]
    )
    store.close()
    return exchanges


def nccl(size: int, shape: Shape) -> list[NcclExchange]:
    """Over a stand-in: there is no GPU here."""
    world, unique_id = World(), os.urandom(128)

    def join(me: int) -> NcclExchange:
        cuda: Any = FakeCuda(world)
        return NcclExchange(cuda, torch.device("cpu"), unique_id, size, me, shape, 20.0)

    exchanges = at_once([partial(join, me) for me in range(size)])
    assert not world.wrong
    return exchanges


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Each in a thread of its own; raises what the first that failed has raised, without waiting for the others."""
    results: dict[int, Future[T]] = {index: Future() for index in range(len(calls))}

    def run(index: int) -> None:
        try:
            results[index].set_result(calls[index]())
        except BaseException as error:  # noqa: BLE001
            results[index].set_exception(error)

    for index in results:
        threading.Thread(target=run, args=(index,), daemon=True).start()
    wait(results.values(), timeout=60, return_when=FIRST_EXCEPTION)
    for one in results.values():
        if one.done() and (error := one.exception()) is not None:
            raise error
    return [one.result(timeout=0) for one in results.values()]

"""Experts spread over ranks, each rank a thread of this process: the same bits as one rank that has them all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.cpu.decoder import ThreadPool
from kernels.cpu.expert_exchange import Addresses, Received, Routed, row_addresses
from kernels.cpu.library import load
from kernels.cpu.moe import MoeBlock
from kernels.cpu.packed import PackedMoe
from kernels.cpu.structures import Format
from kernels.reference_moe import Routing
from tests.kernels.cpu.moe_layers import packed, random_moe

HIDDEN, EXPERTS, TOP_K = 96, 12, 3


class Board:
    """Where ranks that share an address space show each other their tokens. Expert e is on rank e % ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.routed: list[Routed | None] = [None] * ranks
        self.outputs: dict[tuple[int, int], int] = {}  # (rank, choice) -> address of its result
        self.meet = Barrier(ranks, timeout=30)


class Rank:
    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank = board, rank
        self.calls: list[str] = []

    def send(self, routed: Routed) -> None:
        self.calls.append("send")
        self._tokens = len(routed.rows)
        self._board.routed[self._rank] = routed

    def receive(self) -> Received:
        self.calls.append("receive")
        self._board.meet.wait()
        rows, slots, keys = [], [], []
        for rank, routed in enumerate(self._board.routed):
            assert routed is not None
            addresses = row_addresses(routed.rows)
            for choice, expert in enumerate(routed.experts.flatten().tolist()):
                if expert % self._board.ranks == self._rank:
                    rows.append(addresses[choice // TOP_K])
                    slots.append(expert // self._board.ranks)
                    keys.append((rank, choice))
        self._results = np.empty((len(rows), HIDDEN), np.float32)
        outputs = row_addresses(self._results)
        self._board.outputs.update(zip(keys, outputs.tolist(), strict=True))
        return Received(np.array(rows, np.uint64), np.array(slots, np.int32), outputs)

    def give_back(self) -> None:
        self.calls.append("give_back")
        self._board.meet.wait()

    def collect(self) -> Addresses:
        self.calls.append("collect")
        outputs = self._board.outputs
        return np.array([outputs[self._rank, i] for i in range(self._tokens * TOP_K)], np.uint64)


def _block(native: PackedMoe, ranks: int, rank: int) -> MoeBlock:
    library = load()
    slots = -(-EXPERTS // ranks)
    block = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=40, slots=slots)
    for expert in range(rank, EXPERTS, ranks):
        block.experts.set_expert(0, expert // ranks, native.experts[expert])
    return block


@pytest.mark.parametrize("format", [Format.F32, Format.BF16, Format.Q8], ids=lambda format: format.name)
@pytest.mark.parametrize("counts", [[7], [40, 0], [1, 30, 2]], ids=str)
def test_any_number_of_ranks_gives_the_same_bits(format: Format, counts: list[int]) -> None:
    moe = random_moe(Routing(TOP_K, normalize=True), EXPERTS, HIDDEN, 64, shared=32)
    native, _ = packed(load(), moe, format)
    x = np.random.default_rng(0).standard_normal((sum(counts), HIDDEN), np.float32)
    one = MoeBlock(load(), ThreadPool(load(), 2), native, max_tokens=40)
    wanted = one(x)

    board, cuts = Board(len(counts)), np.cumsum([0, *counts])
    ranks = [Rank(board, rank) for rank in range(len(counts))]
    blocks = [_block(native, len(counts), rank) for rank in range(len(counts))]

    def run(rank: int) -> NDArray[np.float32]:
        mine = x[cuts[rank] : cuts[rank + 1]]
        out = np.zeros_like(mine)
        blocks[rank].add(mine, out, exchange=ranks[rank])
        board.meet.wait()  # results are read where they were written
        return out

    with ThreadPoolExecutor(len(counts)) as pool:
        mine = list(pool.map(run, range(len(counts))))

    assert np.array_equal(np.concatenate(mine), wanted)
    assert all(rank.calls == ["send", "receive", "give_back", "collect"] for rank in ranks)
    assert np.array_equal(sum(block.experts.routed for block in blocks), one.experts.routed)
    computed = np.zeros(EXPERTS, np.int64)
    for rank, block in enumerate(blocks):
        computed[rank :: len(counts)] = block.experts.computed[0, : len(computed[rank :: len(counts)])]
    assert np.array_equal(computed, one.experts.routed[0])


class Lost(Exception):
    pass


@pytest.mark.parametrize("phase", ["send", "receive", "give_back", "collect"])
def test_what_an_exchange_raises_ends_the_step_and_is_raised(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, _ = packed(load(), random_moe(Routing(TOP_K), EXPERTS, HIDDEN, 64), Format.F32)
    x = np.random.default_rng(0).standard_normal((5, HIDDEN), np.float32)
    block = _block(native, 1, 0)
    rank = Rank(Board(1), 0)

    def lose(*_: object) -> None:
        raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(rank, phase, lose)
        with pytest.raises(Lost):
            block.add(x, np.zeros_like(x), exchange=rank)
    out = np.zeros_like(x)
    block.add(x, out, exchange=Rank(Board(1), 0))  # and the block can go on
    assert np.array_equal(out, MoeBlock(load(), ThreadPool(load(), 1), native, max_tokens=5)(x))

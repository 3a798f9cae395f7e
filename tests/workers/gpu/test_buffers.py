"""What a step's arrays look like when they have arrived."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from kernels.reference_step_inputs import place_inputs
from workers.engine.step_input import StepBuilder
from workers.gpu.buckets import Shape
from workers.gpu.buffers import StagedStep, StepBuffers
from workers.gpu.device import HostDevice

BLOCK_SIZE = 4
DEVICE = HostDevice(torch.device("cpu"))


MOST = Shape(12, 6, 6, 12)


def buffers(most: Shape = MOST, width: int = 5) -> StepBuffers:
    made = StepBuffers(DEVICE, most, width, BLOCK_SIZE)
    made.tables.fill_(77)
    return made


def decoding(*starts: int) -> StepBuilder:
    """Sequences of one token each, whose blocks are 10, 11, ..., 20, 21, ..."""
    builder = StepBuilder(BLOCK_SIZE)
    for index, start in enumerate(starts):
        builder.add([100 + index], start, array("i", range(10 * index + 10, 10 * index + 15)), 1)
    return builder


def tables_of(staged: StagedStep, made: StepBuffers, sampled: list[int]) -> list[list[int]]:
    tables = made.tables[: len(staged.lengths)]
    given = (staged.token_ids, staged.carried, torch.tensor(sampled), staged.blocks, staged.block_start)
    place_inputs(*given, staged.lengths, tables, BLOCK_SIZE)
    return tables.tolist()


def test_a_decoding_step_in_a_larger_graph() -> None:
    made, shape = buffers(), Shape(4, 4, 4, 1)
    made.send(decoding(9, 0).arrays(), [(1, 3)], shape)
    staged = made.staged(shape)
    tables = tables_of(staged, made, [-1, 5, 6, 7])
    assert staged.token_ids.tolist() == [100, 7, 0, 0], "the second came from the step before"
    assert staged.positions.tolist() == [9, 0, 0, 0]
    assert staged.slots.tolist() == [12 * BLOCK_SIZE + 1, 20 * BLOCK_SIZE, -1, -1]
    assert staged.query_start.tolist() == [0, 1, 2, 3, 4]
    assert staged.lengths.tolist() == [10, 1, 1, 1]
    assert staged.rows.tolist() == [0, 1, 2, 2]
    assert tables == [[10, 11, 12, 0, 0], [20, 0, 0, 0, 0], [0] * 5, [0] * 5]
    attention = staged.attention(made.tables[:4], 20)
    assert (attention.max_queries, attention.max_length) == (1, 20)


def test_a_mixed_step_in_a_larger_graph() -> None:
    made, shape = buffers(), Shape(8, 5, 5, 8)
    builder = decoding(3)
    builder.add([1, 2, 3], 4, array("i", (30, 31)), 0)
    made.send(builder.arrays(), [], shape)
    staged = made.staged(shape)
    assert tables_of(staged, made, [0])[:2] == [[10, 0, 0, 0, 0], [30, 31, 0, 0, 0]]
    assert staged.token_ids.tolist() == [100, 1, 2, 3, 0, 0, 0, 0]
    assert staged.query_start.tolist() == [0, 1, 4, 4, 4, 4], "those that fill up have no queries"
    assert staged.lengths.tolist() == [4, 7, 1, 1, 1]
    assert staged.slots[4:].tolist() == [-1] * 4
    assert staged.rows.tolist() == [0, 4, 4, 4, 4], "what fills up is a row that fills up"


def test_a_token_that_was_no_number_is_taken_as_zero() -> None:
    made, shape = buffers(), Shape(1, 1, 1, 1)
    made.send(decoding(0).arrays(), [(0, 0)], shape)
    staged = made.staged(shape)
    tables_of(staged, made, [-1])
    assert staged.token_ids.tolist() == [0]


def test_nothing_of_an_earlier_step_is_left() -> None:
    made, shape = buffers(), Shape(4, 4, 4, 1)
    made.send(decoding(19, 18, 17, 16).arrays(), [(0, 0), (2, 1)], shape)
    tables_of(made.staged(shape), made, [8, 9])
    fresh = buffers()
    for each in (made, fresh):
        each.send(decoding(1).arrays(), [], shape)
    after, clean = made.staged(shape), fresh.staged(shape)
    assert tables_of(after, made, [5]) == tables_of(clean, fresh, [5])
    for name in (
        "token_ids",
        "positions",
        "slots",
        "rows",
        "carried",
        "query_start",
        "lengths",
        "block_start",
    ):
        assert torch.equal(getattr(after, name), getattr(clean, name)), name


def test_the_host_writes_the_next_step_elsewhere() -> None:
    """The device may still read the last one."""
    waited: list[int] = []

    class Mark:
        def __init__(self, number: int) -> None:
            self._number = number

        def wait(self) -> None:
            waited.append(self._number)

    class Counted(HostDevice):
        marks = 0

        def mark(self) -> Mark:
            self.marks += 1
            return Mark(self.marks)

    made = StepBuffers(Counted(torch.device("cpu")), Shape(4, 4, 4, 4), 5, BLOCK_SIZE)
    shape = Shape(1, 1, 1, 1)
    hosts = []
    for start in (1, 2, 3):
        made.send(decoding(start).arrays(), [], shape)
        hosts.append([np.array(one) for one in made._arrays])
    assert waited == [1], "before the buffer of the first step is written again"
    changed = [
        [not np.array_equal(a, b) for a, b in zip(hosts[i], hosts[i + 1], strict=True)] for i in (0, 1)
    ]
    assert sorted(changed) == [[False, True], [True, False]]


def test_only_blocks_that_are_held_are_sent() -> None:
    made = StepBuffers(DEVICE, Shape(4, 4, 4, 4), 4096, BLOCK_SIZE)
    made._on_device.fill_(0x55)
    made.send(decoding(7).arrays(), [], Shape(4, 4, 4, 1))
    touched = int((made._on_device != 0x55).nonzero().max()) + 1
    assert touched < 400 < made.num_bytes


def test_a_step_that_does_not_fit_is_refused() -> None:
    made = buffers(Shape(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"a step of Shape\(tokens=400"):
        made.send(decoding(1).arrays(), [], Shape(400, 2, 2, 1))
    builder = StepBuilder(BLOCK_SIZE)
    builder.add([1], 23, array("i", range(6)), 1)
    with pytest.raises(ValueError, match="contexts of 24 tokens"):
        made.send(builder.arrays(), [], Shape(1, 1, 1, 1))

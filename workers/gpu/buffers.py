"""A step's inputs on their way to the device: packed on the host, sent in one copy, read where they land.

The device's side is one persistent buffer. What lies where in it hangs on the step's shape alone, but for the blocks of the
sequences, which come last and one sequence behind the other, so that no more of them travel than are held: a step begins
with a launch that spreads them into tables, whose place and width never change. The host's side is a pair of pinned
buffers, written in turn: while the device still reads one, the next step is written to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.cpu.decoder import StepArrays
from workers.gpu.buckets import Shape
from workers.gpu.device import Device, Mark

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each array begins, in bytes."""

    token_ids: int  # int64 [T]
    positions: int  # int64 [T]
    slots: int  # int64 [T]
    rows: int  # int64 [R]
    carried: int  # int32 [T]: of a token that the host does not know, its place among the last step's samples; else -1
    query_start: int  # int32 [S + 1]
    lengths: int  # int32 [S]
    block_start: int  # int32 [S]; -1 of a sequence that fills up
    blocks: int  # int32: of all sequences

    @classmethod
    def of(cls, shape: Shape) -> _Layout:
        places = [0]
        for num_bytes in (
            8 * shape.tokens, 8 * shape.tokens, 8 * shape.tokens, 8 * shape.rows,
            4 * shape.tokens, 4 * (shape.seqs + 1), 4 * shape.seqs, 4 * shape.seqs,
        ):  # fmt: skip
            places.append(-(-(places[-1] + num_bytes) // _ALIGNMENT) * _ALIGNMENT)
        return cls(*places)


@dataclass(frozen=True, eq=False, slots=True)
class StagedStep:
    """Views of the device's buffer, for one shape."""

    token_ids: Tensor  # int64 [T], zero where carried
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    rows: Tensor  # int64 [R]
    carried: Tensor  # int32 [T]
    query_start: Tensor  # int32 [S + 1]
    lengths: Tensor  # int32 [S]
    block_start: Tensor  # int32 [S]
    blocks: Tensor  # int32, and what lies behind
    max_queries: int

    def attention(self, tables: Tensor, max_length: int) -> AttentionStep:
        return AttentionStep(self.query_start, self.lengths, tables, self.slots, self.max_queries, max_length)


@dataclass(frozen=True, eq=False, slots=True)
class Outputs:
    """What steps leave on the device."""

    tokens: Tensor  # int64 [most samples of a step]: what the last step has sampled
    logits: Tensor  # float32 [most rows of a captured step, vocab]: of the last captured step

    @classmethod
    def of(cls, device: torch.device, max_samples: int, captured_rows: int, vocab_size: int) -> Outputs:
        tokens = torch.zeros(max_samples, dtype=torch.int64, device=device)
        return cls(tokens, torch.zeros((captured_rows, vocab_size), device=device))


class StepBuffers:
    def __init__(self, device: Device, most: Shape, table_width: int, block_size: int) -> None:
        """`most`: the largest step. `table_width`: blocks of the longest context."""
        self._most, self.table_width, self.block_size = most, table_width, block_size
        self.num_bytes = _Layout.of(most).blocks + 4 * most.seqs * table_width
        self._host = [device.pinned(self.num_bytes) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._host]
        self._sent: list[Mark | None] = [None, None]
        self._turn = 0
        self._device = device
        self._on_device = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device.device)
        # The blocks are spread into these.
        self.tables = torch.zeros((most.seqs, table_width), dtype=torch.int32, device=device.device)

    def send(self, arrays: StepArrays, carried: Sequence[tuple[int, int]], shape: Shape) -> None:
        """Queue the step's arrays for the device, filled up to `shape`; what fills up is described at AttentionStep.

        Raises ValueError where the step is larger than `most`.
        """
        layout = _Layout.of(shape)
        end = layout.blocks + 4 * len(arrays.blocks)
        longest = int(arrays.lengths.max(initial=1))
        if end > self.num_bytes or longest > self.table_width * self.block_size:
            raise ValueError(f"a step of {shape} and contexts of {longest} tokens is more than {self._most}")
        turn = self._turn = 1 - self._turn
        mark = self._sent[turn]
        if mark is not None:
            mark.wait()  # the step before the last one: it has been read for long
        _pack(self._arrays[turn], layout, arrays, carried, shape)
        self._on_device[:end].copy_(self._host[turn][:end], non_blocking=True)
        self._sent[turn] = self._device.mark()

    def token_ids(self, count: int) -> Tensor:
        """int64 [count] of the last step, whatever its shape."""
        return self._on_device[: count * 8].view(torch.int64)

    def staged(self, shape: Shape) -> StagedStep:
        """Where a step of this shape lies on the device."""
        layout, flat = _Layout.of(shape), self._on_device

        def view(begin: int, count: int, dtype: torch.dtype) -> Tensor:
            return flat[begin : begin + count * dtype.itemsize].view(dtype)

        long, short = torch.int64, torch.int32
        return StagedStep(
            view(layout.token_ids, shape.tokens, long),
            view(layout.positions, shape.tokens, long),
            view(layout.slots, shape.tokens, long),
            view(layout.rows, shape.rows, long),
            view(layout.carried, shape.tokens, short),
            view(layout.query_start, shape.seqs + 1, short),
            view(layout.lengths, shape.seqs, short),
            view(layout.block_start, shape.seqs, short),
            flat[layout.blocks : len(flat) // 4 * 4].view(short),
            shape.max_queries,
        )


def _pack(
    to: NDArray[np.uint8],
    layout: _Layout,
    arrays: StepArrays,
    carried: Sequence[tuple[int, int]],
    shape: Shape,
) -> None:
    tokens, seqs = len(arrays.token_ids), len(arrays.lengths)

    def room(begin: int, count: int, dtype: type) -> NDArray[Any]:
        return to[begin : begin + count * np.dtype(dtype).itemsize].view(dtype)

    _fill(room(layout.token_ids, shape.tokens, np.int64), arrays.token_ids, 0)
    _fill(room(layout.positions, shape.tokens, np.int64), arrays.positions, 0)
    _fill(room(layout.slots, shape.tokens, np.int64), arrays.slots, -1)
    # Rows that fill up are of a token that fills up, where there is one: experts count the rows of the last layer.
    _fill(room(layout.rows, shape.rows, np.int64), arrays.rows, min(tokens, shape.tokens - 1))
    places = room(layout.carried, shape.tokens, np.int32)
    places[:] = -1
    if carried:
        token, sample = zip(*carried, strict=True)
        places[list(token)] = sample
    # Sequences that fill up have a token each in decoding steps, else none.
    starts = room(layout.query_start, shape.seqs + 1, np.int32)
    _fill(starts, arrays.query_start, tokens)
    if shape.max_queries == 1:
        starts[seqs:] = np.arange(seqs, shape.seqs + 1)
    _fill(room(layout.lengths, shape.seqs, np.int32), arrays.lengths, 1)
    _fill(room(layout.block_start, shape.seqs, np.int32), arrays.block_start, -1)
    room(layout.blocks, len(arrays.blocks), np.int32)[:] = arrays.blocks


def _fill(room: NDArray[Any], values: NDArray[Any], filler: int) -> None:
    room[: len(values)] = values
    room[len(values) :] = filler

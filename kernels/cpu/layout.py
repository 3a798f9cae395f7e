"""Which row of a checkpoint's fused projection becomes which column of the packed one: model.h."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PANEL = 64  # columns of a packed panel: matrix.h
DEPTH = 64  # inputs are padded to a multiple of this
HALF = PANEL // 2


def round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def padded_head(head_dim: int) -> int:
    """Columns of one head: several whole heads to a panel where that fits, else whole panels for each."""
    return head_dim if PANEL % head_dim == 0 else round_up(head_dim, PANEL)


def qkv_rows(num_heads: int, num_kv_heads: int, head_dim: int) -> NDArray[np.int32]:
    """[n_pad] rows of the stacked q, k, v; -1 where a column only pads."""
    heads, width = num_heads + 2 * num_kv_heads, padded_head(head_dim)
    rows = np.full((heads, width), -1, np.int32)
    rows[:, :head_dim] = np.arange(heads * head_dim, dtype=np.int32).reshape(heads, head_dim)
    return padded(rows.reshape(-1))


def gate_up_rows(intermediate: int) -> NDArray[np.int32]:
    """[n_pad] rows of the stacked gate, up: 32 of gate, then the same 32 of up, and so on."""
    width = round_up(intermediate, HALF)
    gate = np.full(width, -1, np.int32)
    gate[:intermediate] = np.arange(intermediate, dtype=np.int32)
    up = np.where(gate < 0, np.int32(-1), gate + np.int32(intermediate))
    return np.stack((gate.reshape(-1, HALF), up.reshape(-1, HALF)), axis=1).reshape(-1)


def padded(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.pad(rows, (0, round_up(len(rows), PANEL) - len(rows)), constant_values=-1)

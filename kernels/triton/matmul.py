"""x W^T for few rows, with a weight that is read once: quantized (kernels/quantized_matrix.py) or of floats.

Few rows are bound by reading the weight, so the grid is made as large as the GPU: where there are fewer tiles than
multiprocessors, each tile's inputs are split over programs, and the last one to arrive adds up what the others wrote, in
their order, so that sums do not hang on who was first. A group's products are added up with its integers as they are,
which any operand type holds exactly, and scaled once in float32. The weight is the left operand: its outputs fill the
matrix units however few rows there are.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantized_matrix import PAIR, Weight
from kernels.triton.paged_kv import operand_type
from kernels.triton.relayout import _from_e4m3

_FLOATS, _INT8, _INT4, _FP8_BITS, _FP8 = range(5)
_DEPTH = {_FLOATS: 64, _INT8: 128, _INT4: PAIR, _FP8_BITS: 128, _FP8: 128}  # values of a row's q at a time
_SPAN = 128  # columns in a step of few rows, which may be several groups: fewer waits for what was loaded
_FEW_ROWS = 32
_LEAST_STEPS = 4  # of a split, so that loads run ahead of products


@dataclass(frozen=True, slots=True)
class Tiling:
    columns: int = 64  # outputs of a program
    rows: int = 16  # rows of x of a program, a power of two from 16 on
    splits: int = 1  # programs that share a tile's inputs
    warps: int = 4
    stages: int = 4


class Arrivals:
    """How many programs of a split tile have written their part: int32 zeros, which every launch leaves as zeros.

    Of one stream: launches that share it must not overlap.
    """

    def __init__(self, device: torch.device, tiles: int = 1024) -> None:
        self.counts = torch.zeros(tiles, dtype=torch.int32, device=device)


def multiply(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    tiling: Tiling,
    arrivals: Arrivals,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [m, k] -> [m, n] in `dtype` (x's): kernels.reference_matmul.multiply; sums are float32.

    x and a weight of floats are of one dtype: float32, bfloat16 or float16. bias [n]. Raises ValueError.
    """
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x {list(x.shape)} and a weight of {k} inputs do not go together")
    rows, x = len(x), x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, n), dtype=dtype or x.dtype, device=x.device)
    if not rows:
        return out
    given = as_stored(weight, x)
    at_once = given.depth * (2 if given.format == _INT4 else 1)
    unroll = max(1, _SPAN // at_once) if given.format != _FLOATS and tiling.rows <= _FEW_ROWS else 1
    width, span = given.q.shape[1], given.depth * unroll
    steps = triton.cdiv(width, span)
    splits = max(1, min(tiling.splits, steps // _LEAST_STEPS))
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split)
    grid = (triton.cdiv(n, tiling.columns), triton.cdiv(rows, tiling.rows), splits)
    if splits > 1 and grid[0] * grid[1] > len(arrivals.counts):
        raise ValueError(f"{grid[0] * grid[1]} split tiles; there is room for {len(arrivals.counts)}")
    parts = grid[0] * grid[1] * splits * tiling.columns * tiling.rows if splits > 1 else 0
    partial = torch.empty(parts, dtype=torch.float32, device=x.device) if parts else out
    _multiply[grid](
        x, given.q, given.scale, given.minimum, given.order, out if bias is None else bias, out,
        partial, arrivals.counts, rows, n, k, width, x.stride(0), per_split,
        FORMAT=given.format, GROUP=given.group, ORDERED=given.ordered, BIASED=bias is not None, SPLIT=splits > 1,
        COLUMNS=tiling.columns, ROWS=tiling.rows, DEPTH=given.depth, UNROLL=unroll, HALF=PAIR,
        EVEN=width % span == 0, OPERAND=operand_type(x.dtype),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as kernels take it; what it has not is stood in for by q."""

    format: int
    q: Tensor
    scale: Tensor
    minimum: Tensor
    order: Tensor
    ordered: bool
    group: int  # 0: one scale for a row, which is applied at the end; floats have none
    depth: int


def as_stored(weight: Weight, x: Tensor) -> Stored:
    """`weight` for a product with `x`. Raises ValueError."""
    if isinstance(weight, Tensor):
        if weight.dtype != x.dtype or weight.stride(1) != 1 or weight.stride(0) != weight.shape[1]:
            raise ValueError(
                f"a weight of {weight.dtype} with strides {weight.stride()}: it must be {x.dtype} as x is, and contiguous"
            )
        depth = _DEPTH[_FLOATS] // (2 if x.dtype == torch.float32 else 1)
        return Stored(_FLOATS, weight, weight, weight, weight, False, 0, depth)
    q, format = weight.q, {"int8": _INT8, "int4": _INT4, "fp8": _FP8}[weight.format]
    if format == _FP8 and not _converts_fp8(x.device):
        q, format = q.view(torch.uint8), _FP8_BITS
    depth = min(weight.group, _DEPTH[format]) if weight.group != weight.k else _DEPTH[format]
    return Stored(
        format=format,
        q=q.view(torch.int8) if format == _INT4 else q,
        scale=weight.scale,
        minimum=weight.scale if weight.minimum is None else weight.minimum,
        order=q if weight.order is None else weight.order,
        ordered=weight.order is not None,
        group=0 if weight.group == weight.k and format != _INT4 else weight.group,
        depth=depth,
    )


def _converts_fp8(device: torch.device) -> bool:
    """Whether Triton has the type there: from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _x_tile(
    x, order, row, stride_x, input, k,
    ORDERED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Columns `input` of x, transposed: [DEPTH, ROWS], zeros beyond the last."""
    inside = input < k
    if ORDERED:
        input = tl.load(order + input, mask=inside, other=0)
    place = x + row[None, :].to(tl.int64) * stride_x + input[:, None]
    return tl.load(place, mask=inside[:, None], other=0.0).to(OPERAND)


@triton.jit
def _group_scaled(
    acc, w, seen, scale, minimum, column, n, input, k,
    GROUP: tl.constexpr, INT4: tl.constexpr,
):  # fmt: skip
    """acc + scale * (w seen) + minimum * (sum of seen), of inputs that share a scale, from `input` on."""
    product = tl.dot(w, seen, input_precision="ieee")
    # Beyond the last input, where int4 fills up its rows, `seen` is zero.
    place = (tl.minimum(input, k - 1) // GROUP) * n + column
    d = tl.load(scale + place).to(tl.float32)
    acc += product * d[:, None]
    if INT4:
        m = tl.load(minimum + place).to(tl.float32)
        acc += m[:, None] * tl.sum(seen.to(tl.float32), axis=0)[None, :]
    return acc


@triton.jit
def _added(
    acc, x, q, scale, minimum, order, row, column, at, n, k, width, stride_x,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """acc [COLUMNS, ROWS] + what DEPTH values of q's rows, from `at` on, give."""
    place = at + tl.arange(0, DEPTH)
    stored = q + column[:, None] * width + place[None, :]
    inside = (place < width)[None, :]
    w = tl.load(stored) if EVEN else tl.load(stored, mask=inside, other=0.0)
    if FORMAT == 2:
        low = at // HALF * (2 * HALF) + at % HALF
        seen = _x_tile(x, order, row, stride_x, low + tl.arange(0, DEPTH), k, ORDERED, OPERAND)
        acc = _group_scaled(acc, (w & 15).to(OPERAND), seen, scale, minimum, column, n, low, k, GROUP, True)
        high = low + HALF
        seen = _x_tile(x, order, row, stride_x, high + tl.arange(0, DEPTH), k, ORDERED, OPERAND)
        upper = ((w >> 4) & 15).to(OPERAND)
        acc = _group_scaled(acc, upper, seen, scale, minimum, column, n, high, k, GROUP, True)
    else:
        seen = _x_tile(x, order, row, stride_x, place, k, ORDERED, OPERAND)
        if FORMAT == 3:
            w = _from_e4m3(w.to(tl.int32))
        if GROUP == 0:
            acc = tl.dot(w.to(OPERAND), seen, acc, input_precision="ieee")
        else:
            acc = _group_scaled(acc, w.to(OPERAND), seen, scale, minimum, column, n, at, k, GROUP, False)
    return acc


# A step has any number of rows: none is worth a kernel of its own, compiled while it is waited for.
@triton.jit(do_not_specialize=["rows", "steps"])
def _multiply(
    x, q, scale, minimum, order, bias, out, partial, arrivals,
    rows, n, k, width, stride_x, steps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, UNROLL: tl.constexpr, HALF: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # What lies beyond the last is read again and not stored: masks would only slow the loads.
    read_column = tl.minimum(column, n - 1).to(tl.int64)
    read_row = tl.minimum(row, rows - 1)
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    begin = tl.program_id(2) * steps * (DEPTH * UNROLL)
    end = tl.minimum(begin + steps * (DEPTH * UNROLL), width)
    for first in range(begin, end, DEPTH * UNROLL):
        for part in tl.static_range(UNROLL):
            acc = _added(
                acc, x, q, scale, minimum, order, read_row, read_column, first + part * DEPTH, n, k, width, stride_x,
                FORMAT, GROUP, ORDERED, DEPTH, HALF, EVEN, OPERAND,
            )  # fmt: skip
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        within = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        size = COLUMNS * ROWS
        mine = (tl.program_id(2) * tiles + tile).to(tl.int64) * size
        tl.store(partial + mine + within, acc)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        if tl.atomic_add(arrivals + tile, 1) != tl.num_programs(2) - 1:
            return
        tl.store(arrivals + tile, 0)
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        for split in range(tl.num_programs(2)):
            # Past the L1 cache, which does not see what other multiprocessors write.
            theirs = partial + (split * tiles + tile).to(tl.int64) * size + within
            acc += tl.load(theirs, cache_modifier=".cg")
    real = column < n
    if FORMAT != 0 and GROUP == 0:
        acc *= tl.load(scale + column, mask=real, other=0.0).to(tl.float32)[:, None]
    if BIASED:
        acc += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[:, None]
    at_row = out + row[None, :].to(tl.int64) * n + column[:, None]
    tl.store(at_row, acc.to(out.dtype.element_ty), mask=real[:, None] & (row < rows)[None, :])

"""The experts of one layer on a GPU: every assignment's rows gathered, multiplied and summed in three launches.

`align` sorts the assignments by expert and fills each expert's last block of rows with none, so that a block belongs to
one expert; no number goes to the host for it, and the launches are as large as they can ever be. Then, for each block:
the first product with its gate, the second one times the weight, and the sum over a token's experts in the order of the
choice, so that it does not hang on where an expert is. The idea of blocks of one expert is MegaBlocks' (Gale et al.,
2022).
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.moe_align import align


def fused_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor, Tensor] | None = None,
    clamped: tuple[float, float] | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Weighted sums of the experts' MLPs: float32 [T, H], as grouped_mlp and combine of kernels.reference_moe.

    x [T, H]; weights float32 [T, k]; experts int64 [T, k], E where given to nobody, as all k of a token
    are; gate_up [E, 2 * I, H], gate first; down [E, H, I]; biases:
    ([E, 2 * I], [E, H]). x and the matrices are of one dtype: float32, bfloat16 or float16. clamped: alpha and limit
    of GPT-OSS's gate instead of silu. given: int64 [E], to which the number of each expert's rows is added. Raises
    ValueError.
    """
    tokens, top_k = experts.shape
    num_experts, hidden, inner = down.shape
    if x.shape != (tokens, hidden) or gate_up.shape != (num_experts, 2 * inner, hidden):
        raise ValueError(
            f"x {list(x.shape)}, gate_up {list(gate_up.shape)} and down {list(down.shape)} do not go together"
        )
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}: they must be of one dtype"
        )
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    if not tokens:
        return out
    count = tokens * top_k
    experts = experts.contiguous()
    blocks = align(experts, num_experts, _block_rows(count, num_experts), given)
    middle = torch.empty(count, inner, dtype=x.dtype, device=x.device)
    results = torch.empty(count, hidden, dtype=torch.float32, device=x.device)
    tile = {"ROWS": blocks.size, "COLUMNS": 64, "DEPTH": 32 if x.dtype == torch.float32 else 64}
    alpha, limit = clamped or (0.0, 0.0)
    where = (blocks.rows, blocks.experts)
    _gate_up[(len(blocks.experts), triton.cdiv(inner, tile["COLUMNS"]))](
        x.contiguous(), gate_up.contiguous(), _or(biases, 0, x), middle, *where,
        count, num_experts, top_k, hidden, inner, alpha, limit,
        BIASED=biases is not None, CLAMPED=clamped is not None, **tile,
    )  # fmt: skip
    _down[(len(blocks.experts), triton.cdiv(hidden, tile["COLUMNS"]))](
        middle, down.contiguous(), _or(biases, 1, x), weights.contiguous(), results, *where,
        count, num_experts, hidden, inner, BIASED=biases is not None, **tile,
    )  # fmt: skip
    width = min(1024, triton.next_power_of_2(hidden))
    _sum[(tokens, triton.cdiv(hidden, width))](
        results, experts, out, num_experts, hidden, TOP_K=top_k, WIDTH=width
    )
    return out


def _block_rows(count: int, num_experts: int) -> int:
    """As many as an expert gets, for an even share: more would be multiplied for nothing."""
    share: int = triton.next_power_of_2(count // num_experts + 1)
    return min(128, max(16, share))


def _or(biases: tuple[Tensor, Tensor] | None, index: int, other: Tensor) -> Tensor:
    return other if biases is None else biases[index].contiguous()


@triton.jit
def _product(acc, a, a_rows, a_mask, w, w_rows, w_mask, depth, DEPTH: tl.constexpr):
    """acc += rows of a [.., depth] times rows of w [.., depth] transposed."""
    for begin in range(0, depth, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        inside = k < depth
        left = tl.load(
            a + a_rows[:, None] * depth + k[None, :], mask=a_mask[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            w + w_rows[None, :] * depth + k[:, None], mask=w_mask[None, :] & inside[:, None], other=0.0
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _gate_up(
    x, w, bias, middle, rows, experts, count, num_experts, top_k, hidden, inner, alpha, limit,
    BIASED: tl.constexpr, CLAMPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert == num_experts:
        return
    row = tl.load(rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < count
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    token = row // top_k
    first = expert * 2 * inner + column  # of the expert's rows of w
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = _product(gate, x, token, real, w, first, inside, hidden, DEPTH)
    up = _product(up, x, token, real, w, first + inner, inside, hidden, DEPTH)
    if BIASED:
        gate += tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + first + inner, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit)
        value = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    else:
        value = gate / (1.0 + tl.exp(-gate)) * up
    place = middle + row[:, None] * inner + column[None, :]
    tl.store(place, value.to(middle.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def _down(
    middle, w, bias, weights, results, rows, experts, count, num_experts, hidden, inner,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert == num_experts:
        return
    row = tl.load(rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < count
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    first = expert * hidden + column
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = _product(acc, middle, row, real, w, first, inside, inner, DEPTH)
    if BIASED:
        acc += tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc *= tl.load(weights + row, mask=real, other=0.0)[:, None]
    tl.store(results + row[:, None] * hidden + column[None, :], acc, mask=real[:, None] & inside[None, :])


@triton.jit
def _sum(results, experts, out, num_experts, hidden, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    # Nobody has written the results of a token that was given to nobody.
    inside = column < tl.where(tl.load(experts + token * TOP_K) < num_experts, hidden, 0)
    total = tl.load(results + token * TOP_K * hidden + column, mask=inside, other=0.0)
    for j in tl.static_range(1, TOP_K):
        total += tl.load(results + (token * TOP_K + j) * hidden + column, mask=inside, other=0.0)
    tl.store(out + token * hidden + column, total, mask=column < hidden)

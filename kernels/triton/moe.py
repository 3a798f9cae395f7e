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

from kernels.quantized_experts import Experts
from kernels.quantized_matrix import PAIR
from kernels.triton.matmul import Stored, as_stored
from kernels.triton.moe_align import align
from kernels.triton.relayout import _from_e4m3


def fused_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Experts,
    down: Experts,
    biases: tuple[Tensor, Tensor] | None = None,
    clamped: tuple[float, float] | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Weighted sums of the experts' MLPs: float32 [T, H], as grouped_mlp and combine of kernels.reference_moe.

    x [T, H]; weights float32 [T, k]; experts int64 [T, k], E where given to nobody, as all k of a token
    are; gate_up [E, 2 * I, H], gate first; down [E, H, I]; biases:
    ([E, 2 * I], [E, H]). x and the matrices are of one dtype: float32, bfloat16 or float16; quantized ones are multiplied
    with as kernels.triton.matmul does. clamped: alpha and limit of GPT-OSS's gate instead of silu. given: int64 [E], to which the number of each expert's rows is added. Raises
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
    tile = {"ROWS": blocks.size, "COLUMNS": 64, "HALF": PAIR}
    alpha, limit = clamped or (0.0, 0.0)
    where = (blocks.rows, blocks.experts)
    first, second = _stored(gate_up, x), _stored(down, x)
    _gate_up[(len(blocks.experts), triton.cdiv(inner, tile["COLUMNS"]))](
        x.contiguous(), first.q, first.scale, first.minimum, _or(biases, 0, x), middle, *where,
        count, num_experts, top_k, hidden, inner, first.q.shape[1], alpha, limit,
        BIASED=biases is not None, CLAMPED=clamped is not None, **_form(first), **tile,
    )  # fmt: skip
    _down[(len(blocks.experts), triton.cdiv(hidden, tile["COLUMNS"]))](
        middle, second.q, second.scale, second.minimum, _or(biases, 1, x), weights.contiguous(), results, *where,
        count, num_experts, hidden, inner, second.q.shape[1],
        BIASED=biases is not None, **_form(second), **tile,
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


def _stored(matrices: Experts, x: Tensor) -> Stored:
    """[E * n, k]."""
    if isinstance(matrices, Tensor):
        return as_stored(matrices.contiguous().flatten(0, 1), x)
    return as_stored(matrices.matrix, x)


def _form(stored: Stored) -> dict[str, int]:
    return {"FORMAT": stored.format, "GROUP": stored.group, "DEPTH": stored.depth}


@triton.jit
def _added(
    acc, a, a_rows, a_mask, right, scale, minimum, w_rows, w_mask, outputs, input, depth,
    GROUP: tl.constexpr, INT4: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc + inputs from `input` on of rows of a, times `right` [DEPTH, COLUMNS], scaled where a group shares a scale."""
    k = input + tl.arange(0, DEPTH)
    inside = k < depth
    left = tl.load(
        a + a_rows[:, None] * depth + k[None, :], mask=a_mask[:, None] & inside[None, :], other=0.0
    )
    if GROUP == 0:
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    else:
        product = tl.dot(left, right.to(left.dtype), input_precision="ieee")
        # Beyond the last input, where int4 fills up its rows, `left` is zero.
        place = (tl.minimum(input, depth - 1) // GROUP).to(tl.int64) * outputs + w_rows
        acc += product * tl.load(scale + place, mask=w_mask, other=0.0).to(tl.float32)[None, :]
        if INT4:
            least = tl.load(minimum + place, mask=w_mask, other=0.0).to(tl.float32)
            acc += tl.sum(left.to(tl.float32), axis=1)[:, None] * least[None, :]
    return acc


@triton.jit
def _product(
    acc, a, a_rows, a_mask, w, scale, minimum, w_rows, w_mask, outputs, depth, width,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """acc += rows of a [.., depth] times rows of w [outputs, depth] transposed, stored in `width` values each.

    FORMAT as in kernels.triton.matmul.
    """
    for at in range(0, width, DEPTH):
        place = at + tl.arange(0, DEPTH)
        right = tl.load(
            w + w_rows[None, :] * width + place[:, None],
            mask=w_mask[None, :] & (place < width)[:, None],
            other=0.0,
        )
        if FORMAT == 2:
            first = at // HALF * (2 * HALF) + at % HALF
            acc = _added(
                acc, a, a_rows, a_mask, right & 15, scale, minimum, w_rows, w_mask, outputs,
                first, depth, GROUP, True, DEPTH,
            )  # fmt: skip
            acc = _added(
                acc, a, a_rows, a_mask, (right >> 4) & 15, scale, minimum, w_rows, w_mask, outputs,
                first + HALF, depth, GROUP, True, DEPTH,
            )  # fmt: skip
        else:
            if FORMAT == 3:
                right = _from_e4m3(right.to(tl.int32))
            acc = _added(
                acc, a, a_rows, a_mask, right, scale, minimum, w_rows, w_mask, outputs,
                at, depth, GROUP, False, DEPTH,
            )  # fmt: skip
    if FORMAT != 0 and GROUP == 0:
        acc *= tl.load(scale + w_rows, mask=w_mask, other=0.0).to(tl.float32)[None, :]
    return acc


# A step has any number of rows: none is worth a kernel of its own, compiled while it is waited for.
@triton.jit(do_not_specialize=["count"])
def _gate_up(
    x, w, scale, minimum, bias, middle, rows, experts,
    count, num_experts, top_k, hidden, inner, width, alpha, limit,
    BIASED: tl.constexpr, CLAMPED: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
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
    outputs = num_experts * 2 * inner
    gate = _product(
        gate,
        x,
        token,
        real,
        w,
        scale,
        minimum,
        first,
        inside,
        outputs,
        hidden,
        width,
        FORMAT,
        GROUP,
        DEPTH,
        HALF,
    )
    up = _product(
        up, x, token, real, w, scale, minimum, first + inner, inside, outputs, hidden, width,
        FORMAT, GROUP, DEPTH, HALF,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["count"])
def _down(
    middle, w, scale, minimum, bias, weights, results, rows, experts, count, num_experts, hidden, inner, width,
    BIASED: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
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
    acc = _product(
        acc, middle, row, real, w, scale, minimum, first, inside, num_experts * hidden, inner, width,
        FORMAT, GROUP, DEPTH, HALF,
    )  # fmt: skip
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

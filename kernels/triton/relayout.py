"""KV blocks out of a cache on a GPU into one contiguous buffer for the wire, and back: one launch for all blocks.

The cache is [num_blocks, num_layers, 2 (k, v), num_heads, num_tokens, head_dim] of any strides. Its values are copied as
bits, or compressed on the way (kernels/relayout.py says how), so that a block is read and written once. One program
moves some tokens of one tile, a tile being the tokens of one (block, layer, k|v, head).

All rounding is done on bits: the results are those of the CPU, bit for bit, on every GPU, also on one without fp8.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference_relayout import Wire, part

_TILE_VALUES = 4096  # of a program
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIRES = {None: 0, "int8": 1, "fp8": 2}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def gather(
    cache: Tensor,
    block_ids: Tensor,
    *,
    layers: range | None = None,
    heads: range | None = None,
    wire: Wire | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Blocks [n] in wire layout, contiguous.

    As they are: [n, layers, 2, heads, num_tokens, head_dim] in the cache's dtype. Compressed: tiles uint8
    [n, layers, 2, heads, num_tokens * (head_dim + 4)], of a cache of float32, bfloat16 or float16. `block_ids` int32 or
    int64 on the cache's device; they are not checked there. Raises ValueError.
    """
    cache = part(cache, layers, heads)
    shape, dtype = _wire_shape(cache, len(block_ids), wire)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=cache.device)
    _check(out, shape, dtype)
    _launch(_gather, cache, block_ids, out, wire)
    return out


def scatter(
    cache: Tensor,
    block_ids: Tensor,
    blocks: Tensor,
    *,
    layers: range | None = None,
    heads: range | None = None,
    wire: Wire | None = None,
) -> None:
    """The reverse: `blocks` as `gather` gives them, into the cache at `block_ids` [n], which are distinct."""
    cache = part(cache, layers, heads)
    _check(blocks, *_wire_shape(cache, len(block_ids), wire))
    _launch(_scatter, cache, block_ids, blocks, wire)


def _wire_shape(cache: Tensor, n: int, wire: Wire | None) -> tuple[tuple[int, ...], torch.dtype]:
    _, layers, _, heads, tokens, dim = cache.shape
    if wire is None:
        return (n, layers, 2, heads, tokens, dim), cache.dtype
    if cache.dtype not in _KINDS or wire not in _WIRES:
        raise ValueError(f"{cache.dtype} is not compressed to {wire}")
    return (n, layers, 2, heads, tokens * (dim + 4)), torch.uint8


def _check(blocks: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if blocks.shape != shape or blocks.dtype != dtype or not blocks.is_contiguous():
        raise ValueError(
            f"blocks on the wire are contiguous {dtype} {list(shape)}, not {blocks.dtype} {list(blocks.shape)} "
            f"of strides {blocks.stride()}"
        )


def _launch(
    kernel: triton.JITFunction, cache: Tensor, block_ids: Tensor, blocks: Tensor, wire: Wire | None
) -> None:
    _, layers, _, heads, tokens, dim = cache.shape
    if not len(block_ids):
        return
    dim_block = triton.next_power_of_2(dim)
    token_block = min(triton.next_power_of_2(tokens), max(1, _TILE_VALUES // dim_block))
    grid = (len(block_ids) * layers * 2 * heads, triton.cdiv(tokens, token_block))
    kernel[grid](
        cache.view(_INTEGERS[cache.itemsize]) if cache.is_floating_point() else cache,
        block_ids,
        blocks.view(_INTEGERS[blocks.itemsize]) if wire is None else blocks,
        *cache.stride(),
        layers,
        heads,
        tokens,
        dim,
        KIND=_KINDS.get(cache.dtype, -1),
        WIRE=_WIRES[wire],
        TOKENS=token_block,
        DIM=dim_block,
        # One rounding of x * inverse, then another: as an fma they would be one, and ties would fall otherwise.
        enable_fp_fusion=False,
    )


@triton.jit
def _row_places(
    ids, stride_block, stride_layer, stride_kv, stride_head, stride_token, layers, heads, tokens, TOKENS: tl.constexpr
):  # fmt: skip
    """This program's tile, its tokens, and where in the cache each token's row begins."""
    tile = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    head = tile % heads
    kv = tile // heads % 2
    layer = tile // (heads * 2) % layers
    block = tl.load(ids + tile // (heads * 2 * layers)).to(tl.int64)
    begin = block * stride_block + layer * stride_layer + kv * stride_kv + head * stride_head
    return tile, token, begin + token.to(tl.int64) * stride_token


@triton.jit
def _to_float(bits, KIND: tl.constexpr):
    if KIND == 0:
        x = bits.to(tl.float32, bitcast=True)
    elif KIND == 1:
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _to_bits(x, KIND: tl.constexpr):
    if KIND == 0:
        bits = x.to(tl.int32, bitcast=True)
    elif KIND == 1:
        wide = x.to(tl.int32, bitcast=True)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        bits = tl.where((wide & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)
    else:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def _to_e4m3(y):
    """As kernels/cpu/src/relayout.cpp: |y| at most a little above 448."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _from_e4m3(byte):
    size = byte & 0x7F
    small = size.to(tl.float32) * 0.001953125  # 2^-9
    normal = tl.where(size == 0x7F, 0x7FC00000, (size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    x = tl.where(size < 8, small, normal)
    return tl.where(byte >= 0x80, -x, x)


@triton.jit
def _gather(
    cache, ids, out, stride_block, stride_layer, stride_kv, stride_head, stride_token, stride_dim,
    layers, heads, tokens, dim,
    KIND: tl.constexpr, WIRE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    tile, token, row = _row_places(
        ids, stride_block, stride_layer, stride_kv, stride_head, stride_token, layers, heads, tokens, TOKENS
    )
    column = tl.arange(0, DIM)
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    bits = tl.load(cache + row[:, None] + column.to(tl.int64)[None, :] * stride_dim, mask=inside, other=0)
    within = token[:, None] * dim + column[None, :]
    if WIRE == 0:
        tl.store(out + tile * tokens * dim + within, bits, mask=inside)
    else:
        x = _to_float(bits, KIND)
        # Bits of floats without a sign are in order, those that are not finite last; a maximum of floats loses NaN.
        most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        amax = most.to(tl.float32, bitcast=True)
        finite = most < 0x7F800000
        some = finite & (amax > 1e-30)
        largest = tl.full((TOKENS,), 127.0 if WIRE == 1 else 448.0, tl.float32)
        divisor = tl.where(some, amax, 1.0)
        y = tl.where(some[:, None], x * tl.div_rn(largest, divisor)[:, None], 0.0)
        scale = tl.where(some, tl.div_rn(divisor, largest), 0.0).to(tl.int32, bitcast=True)
        scale = tl.where(finite, scale, 0x7FC00000)
        # To 1.5 * 2^23 added, the last byte is the rounded integer.
        q = (y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF if WIRE == 1 else _to_e4m3(y)
        begin = out + tile * tokens * (dim + 4)
        tl.store(begin + within, q.to(tl.uint8), mask=inside)
        # Byte by byte: tiles need not begin at multiples of four.
        byte = tl.arange(0, 4)[None, :]
        place = begin + tokens * dim + token[:, None] * 4 + byte
        tl.store(place, ((scale[:, None] >> (byte * 8)) & 0xFF).to(tl.uint8), mask=(token < tokens)[:, None])


@triton.jit
def _scatter(
    cache, ids, blocks, stride_block, stride_layer, stride_kv, stride_head, stride_token, stride_dim,
    layers, heads, tokens, dim,
    KIND: tl.constexpr, WIRE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    tile, token, row = _row_places(
        ids, stride_block, stride_layer, stride_kv, stride_head, stride_token, layers, heads, tokens, TOKENS
    )
    column = tl.arange(0, DIM)
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    within = token[:, None] * dim + column[None, :]
    place = cache + row[:, None] + column.to(tl.int64)[None, :] * stride_dim
    if WIRE == 0:
        tl.store(place, tl.load(blocks + tile * tokens * dim + within, mask=inside, other=0), mask=inside)
    else:
        begin = blocks + tile * tokens * (dim + 4)
        byte = tl.arange(0, 4)[None, :]
        parts = tl.load(
            begin + tokens * dim + token[:, None] * 4 + byte, mask=(token < tokens)[:, None], other=0
        )
        scale = tl.sum(parts.to(tl.int32) << (byte * 8), axis=1).to(tl.float32, bitcast=True)
        q = tl.load(begin + within, mask=inside, other=0)
        values = q.to(tl.int8, bitcast=True).to(tl.float32) if WIRE == 1 else _from_e4m3(q.to(tl.int32))
        tl.store(place, _to_bits(values * scale[:, None], KIND), mask=inside)

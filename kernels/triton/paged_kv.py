"""The paged KV cache as Triton's kernels see it: where a row lies, and a row's values out of its stored form.

A cache of floats is [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim] as in kernels.reference. A
quantized one has tiles in place of the last two dimensions: uint8 [block_size * (head_dim + 4)], the bytes that
kernels/relayout.py writes down, which are also those of the native int8 cache: so a block is sent as it lies.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference_relayout
from kernels.reference_relayout import Wire
from kernels.triton.relayout import _from_e4m3, _to_e4m3

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# FORMAT of the kernels. Only compute capability 8.9 and later have instructions for e4m3; bits give the same values.
_PLAIN, _INT8, _FP8_BITS, _FP8 = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class PagedKv:
    """A cache's tensor and what its shape does not say. `planes` is 2, keys and values, or 1: rows that are both."""

    data: Tensor
    block_size: int  # tokens
    head_dim: int
    wire: Wire | None = None  # None: floats

    @classmethod
    def of(cls, cache: Tensor) -> PagedKv:
        """A contiguous cache of floats. Raises ValueError."""
        if cache.dim() != 6 or cache.dtype not in FLOATS or not cache.is_contiguous():
            raise ValueError(
                f"a KV cache is [blocks, layers, planes, kv_heads, block_size, head_dim], contiguous, of floats, not "
                f"{cache.dtype} {list(cache.shape)} of strides {cache.stride()}"
            )
        return cls(cache, cache.shape[4], cache.shape[5])

    @classmethod
    def of_tiles(cls, tiles: Tensor, block_size: int, head_dim: int, wire: Wire) -> PagedKv:
        """uint8 [num_blocks, num_layers, planes, num_kv_heads, block_size * (head_dim + 4)]. Raises ValueError."""
        wanted = block_size * (head_dim + 4)
        if tiles.dtype != torch.uint8 or tiles.dim() != 5 or tiles.shape[4] != wanted:
            raise ValueError(
                f"tiles of {block_size} tokens of {head_dim} values are uint8 [.., {wanted}], not {tiles.dtype} "
                f"{list(tiles.shape)}"
            )
        if head_dim % 4 or not tiles.is_contiguous():
            raise ValueError(
                f"scales must be aligned: head_dim {head_dim} is no multiple of 4, or gaps lie between"
            )
        return cls(tiles, block_size, head_dim, wire)

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[3]

    @property
    def planes(self) -> int:
        return self.data.shape[2]

    @property
    def format(self) -> int:
        if self.wire is None:
            return _PLAIN
        if self.wire == "int8":
            return _INT8
        on_gpu = self.data.is_cuda and torch.cuda.get_device_capability(self.data.device) >= (8, 9)
        return _FP8 if on_gpu else _FP8_BITS

    @property
    def pointers(self) -> tuple[Tensor, Tensor]:
        """What a kernel reads: the values, and the same memory as float32 (scales), the values again where none are."""
        if self.wire is None:
            return self.data, self.data
        return self.data.view(torch.int8 if self.wire == "int8" else torch.uint8), self.data.view(
            torch.float32
        )

    def values(self) -> Tensor:
        """What the cache stands for: float32 [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim]."""
        if self.wire is None:
            return self.data.float()
        return reference_relayout.restore(self.data, self.block_size, torch.float32, self.wire)


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """In what type `tl.dot` multiplies. Triton's interpreter takes bfloat16's bits for whole numbers there."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in types:
        raise ValueError(f"{dtype} is not computed with; known: {', '.join(map(str, types))}")
    return tl.float32 if triton.knobs.runtime.interpret else types[dtype]


@triton.jit
def load_rows(
    values, scales, begin, token, inside, column,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Rows [N, columns] of `token` [N] in the tiles that begin at `begin` [N], in OPERAND, and their scales [N].

    x = row * scale: what is not multiplied by the scale here is exact in any type. Zeros where not `inside`.
    """
    place = values + begin[:, None] + token[:, None] * HEAD_DIM + column[None, :]
    stored = tl.load(place, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0)
    if FORMAT == 0:
        rows = stored.to(OPERAND)
        scale = tl.full((token.shape[0],), 1.0, tl.float32)
    else:
        scale = tl.load(scales + (begin + BLOCK_SIZE * HEAD_DIM) // 4 + token, mask=inside, other=0.0)
        if FORMAT == 1:
            rows = stored.to(OPERAND)
        elif FORMAT == 2:
            rows = _from_e4m3(stored.to(tl.int32)).to(OPERAND)
        else:
            rows = stored.to(tl.float8e4nv, bitcast=True).to(OPERAND)
    return rows, scale


@triton.jit
def store_rows(
    values, scales, begin, token, x, inside, column,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The reverse: x float32 [N, columns], zero beyond HEAD_DIM. Rounds as kernels.reference_relayout does."""
    place = values + begin[:, None] + token[:, None] * HEAD_DIM + column[None, :]
    here = inside[:, None] & (column < HEAD_DIM)[None, :]
    if FORMAT == 0:
        tl.store(place, x.to(values.dtype.element_ty), mask=here)
    else:
        # Bits of floats without a sign are in order, those that are not finite last; a maximum of floats loses NaN.
        most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        amax = most.to(tl.float32, bitcast=True)
        finite = most < 0x7F800000
        some = finite & (amax > 1e-30)
        largest = tl.full(amax.shape, 127.0 if FORMAT == 1 else 448.0, tl.float32)
        divisor = tl.where(some, amax, 1.0)
        y = tl.where(some[:, None], x * tl.div_rn(largest, divisor)[:, None], 0.0)
        scale = tl.where(finite, tl.where(some, tl.div_rn(divisor, largest), 0.0), float("nan"))
        # To 1.5 * 2^23 added, the last byte is the rounded integer.
        q = (y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF if FORMAT == 1 else _to_e4m3(y)
        tl.store(place, q.to(tl.uint8).to(values.dtype.element_ty, bitcast=True), mask=here)
        tl.store(scales + (begin + BLOCK_SIZE * HEAD_DIM) // 4 + token, scale, mask=inside)

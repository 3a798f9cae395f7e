"""What test_triton.py runs in a process of its own, under Triton's interpreter or on the GPU: a layer's small kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference, reference_relayout
from kernels.reference_relayout import Wire
from kernels.triton.norms import add_rms_norm, silu_mul
from kernels.triton.paged_kv import PagedKv
from kernels.triton.rope_kv import HeadNorms, rotate_and_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
BLOCKS, LAYERS, SIZE = 5, 2, 4


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape) + shape[-1])
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 576, 1025])
@pytest.mark.parametrize("adds", [False, True])
def test_residual_and_norm(dtype: torch.dtype, width: int, adds: bool) -> None:
    residual, weight = normal(3, width) * 5, normal(width, dtype=dtype)
    added = normal(3, width, dtype=dtype, seed=1) if adds else None
    want_residual = residual + added.float() if added is not None else residual.clone()
    want = reference.rms_norm(want_residual, weight.float(), 1e-5)
    got = add_rms_norm(residual, added, weight, 1e-5, dtype)
    assert got.dtype == dtype
    assert torch.equal(residual, want_residual)
    close(got, want, dtype)


def test_a_residual_of_16_bits_is_normed_as_it_is_stored() -> None:
    residual, added, weight = (normal(2, 40, dtype=torch.float16, seed=n) for n in range(3))
    want_residual = residual + added
    want = reference.rms_norm(want_residual.float(), weight[0].float(), 1e-6)
    got = add_rms_norm(residual, added, weight[0], 1e-6, torch.float32)
    assert torch.equal(residual, want_residual)
    close(got, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 40, 1500])
def test_gate(dtype: torch.dtype, width: int) -> None:
    both = normal(3, 2 * width, dtype=dtype) * 4
    got = silu_mul(both)
    assert got.dtype == dtype
    close(got, reference.silu_mul(both.float()), dtype)


def angles(rotated: int) -> tuple[Tensor, Tensor]:
    """[50, rotated / 2] each."""
    turn = torch.arange(50.0)[:, None] * 0.7 ** torch.arange(rotated // 2)
    return turn.cos().to(DEVICE), turn.sin().to(DEVICE)


def head_norms(kind: str, heads: int, kv_heads: int, dim: int) -> HeadNorms | None:
    if kind == "none":
        return None
    q, k = (heads * dim, kv_heads * dim) if kind == "whole" else (dim, dim)
    return HeadNorms(normal(q, seed=2), normal(k, seed=3), 1e-5)


def expected(
    qkv: Tensor, heads: int, kv_heads: int, at: tuple[Tensor, Tensor], norms: HeadNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the reference's ops, in float32. `at`: cos and sin of each token."""
    q, k, v = qkv.float().split([heads, kv_heads, kv_heads], 1)
    found = []
    for x, weight in ((q, norms and norms.q), (k, norms and norms.k)):
        if norms is not None and weight is not None:
            whole = weight.numel() != x.shape[2]
            normed = reference.rms_norm(x.flatten(1) if whole else x, weight, norms.eps)
            x = normed.view(x.shape)
        rotated = 2 * at[0].shape[1]
        x = torch.cat((reference.apply_rope(x[..., :rotated], *at), x[..., rotated:]), -1)
        found.append(x)
    return found[0], found[1], v


@pytest.mark.parametrize(
    ("dtype", "shape", "rotated", "norm"),
    [
        (torch.float32, (6, 2, 24), 24, "each"),
        (torch.float32, (3, 1, 10), 4, "none"),
        (torch.float32, (4, 4, 16), 16, "whole"),
        (torch.bfloat16, (6, 2, 32), 32, "each"),
        (torch.float16, (5, 1, 16), 8, "whole"),
    ],
    ids=str,
)
def test_queries_and_a_cache_of_floats(
    dtype: torch.dtype, shape: tuple[int, int, int], rotated: int, norm: str
) -> None:
    heads, kv_heads, dim = shape
    cache = normal(BLOCKS, LAYERS, 2, kv_heads, SIZE, dim, dtype=dtype)
    before = cache.clone()
    qkv = normal(4, heads + 2 * kv_heads, dim, dtype=dtype)
    slots, positions = (torch.tensor(v, device=DEVICE) for v in ([7, 18, -1, 0], [3, 49, 9, 0]))
    cos, sin = angles(rotated)
    norms = head_norms(norm, heads, kv_heads, dim)
    got = rotate_and_write(qkv, heads, PagedKv.of(cache), 1, slots, positions, cos, sin, norms)
    q, k, v = expected(qkv, heads, kv_heads, (cos[positions], sin[positions]), norms)
    close(got, q, dtype)
    written = slots >= 0
    assert torch.equal(cache[:, 0], before[:, 0])  # the other layer
    block, offset = slots[written] // SIZE, slots[written] % SIZE
    close(cache[block, 1, 0, :, offset], k[written], dtype)
    assert torch.equal(cache[block, 1, 1, :, offset], v[written].to(dtype))
    reference.write_kv(before, 1, cache[block, 1, 0, :, offset], v[written].to(dtype), slots[written])
    assert torch.equal(cache, before)  # and no other row


@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_cache_holds_the_bytes_of_the_wire(wire: Wire, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 4, 2, 16
    tiles = torch.zeros(BLOCKS, LAYERS, 2, kv_heads, SIZE * (dim + 4), dtype=torch.uint8, device=DEVICE)
    floats = torch.zeros(BLOCKS, LAYERS, 2, kv_heads, SIZE, dim, dtype=dtype, device=DEVICE)
    qkv = normal(5, heads + 2 * kv_heads, dim, dtype=dtype) * 3
    qkv[1, -1] = 0
    qkv[2, -1, 3] = torch.inf
    slots = torch.tensor([19, 3, 8, 0, 5], device=DEVICE)
    positions = torch.arange(5, device=DEVICE)
    cos, sin = angles(dim)
    quantized = PagedKv.of_tiles(tiles, SIZE, dim, wire)
    for cache in (PagedKv.of(floats), quantized):
        rotate_and_write(qkv, heads, cache, 1, slots, positions, cos, sin)
    want = reference_relayout.compress(floats, wire)
    if DEVICE == "cpu":
        assert torch.equal(tiles, want)
    else:  # keys may differ in a last bit: one launch fuses multiplications, the other does not
        assert torch.equal(tiles[:, :, 1], want[:, :, 1])
        restored = reference_relayout.restore(want, SIZE, torch.float32, wire)
        torch.testing.assert_close(quantized.values(), restored, rtol=0.1, atol=0.05, equal_nan=True)


def test_what_does_not_fit_is_said() -> None:
    cache = PagedKv.of(normal(BLOCKS, LAYERS, 2, 2, SIZE, 16))
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="is not 4 heads and twice 2"):
        rotate_and_write(normal(1, 6, 16), 4, cache, 0, one, one, *angles(16))
    with pytest.raises(ValueError, match="rotate at most 16"):
        rotate_and_write(normal(1, 8, 16), 4, cache, 0, one, one, *angles(24))
    norms = HeadNorms(normal(5), normal(5), 1e-5)
    with pytest.raises(ValueError, match="norms of 5 and 5"):
        rotate_and_write(normal(1, 8, 16), 4, cache, 0, one, one, *angles(16), norms)
    with pytest.raises(ValueError, match="do not go together"):
        add_rms_norm(normal(2, 8), None, normal(7), 1e-5, torch.float32)
    with pytest.raises(ValueError, match="odd"):
        silu_mul(normal(2, 7))
    assert silu_mul(normal(0, 8)).shape == (0, 4)

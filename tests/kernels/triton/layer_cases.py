"""What test_triton.py runs in a process of its own, under Triton's interpreter or on the GPU: a layer's small kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference, reference_relayout
from kernels.reference_relayout import Wire
from kernels.triton.norms import add_rms_norm, rms_norm, silu_mul
from kernels.triton.paged_kv import PagedKv
from kernels.triton.rope_kv import HeadNorms, rotate_and_write
from kernels.triton.rope_latent import rotate_and_write_latents
from kernels.triton.write_kv import write_kv

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


@pytest.mark.parametrize("width", [24, 1025])
def test_norm_of_rows_with_gaps(width: int) -> None:
    wide, weight = normal(3, width + 7), normal(width, seed=1)
    got = rms_norm(wide[:, 5 : 5 + width], weight, 1e-6)
    close(got, reference.rms_norm(wide[:, 5 : 5 + width], weight, 1e-6), torch.float32)


@pytest.mark.parametrize("wire", [None, "int8"])
def test_keys_and_values_as_they_are(wire: Wire | None) -> None:
    kv_heads, dim = 2, 16
    floats = torch.zeros(BLOCKS, LAYERS, 2, kv_heads, SIZE, dim, device=DEVICE)
    k, v = normal(3, kv_heads, dim), normal(3, 5, dim)[:, 1 : 1 + kv_heads]
    slots = torch.tensor([7, -1, 18], device=DEVICE)
    reference.write_kv(floats, 1, k[slots >= 0], v[slots >= 0], slots[slots >= 0])
    want, cache = PagedKv.of(floats), PagedKv.of(torch.zeros_like(floats))
    if wire is not None:
        tiles = reference_relayout.compress(floats, wire)
        want = PagedKv.of_tiles(tiles, SIZE, dim, wire)
        cache = PagedKv.of_tiles(torch.zeros_like(tiles), SIZE, dim, wire)
    write_kv(k, v, cache, 1, slots)
    assert torch.equal(cache.data, want.data)


@pytest.mark.parametrize(
    ("dtype", "heads", "rank", "rotated"),
    [(torch.float32, 3, 16, 8), (torch.float32, 1, 20, 12), (torch.bfloat16, 4, 32, 8)],
    ids=str,
)
def test_latents_and_the_queries_to_them(dtype: torch.dtype, heads: int, rank: int, rotated: int) -> None:
    """The latent normed, its key and the queries' last dimensions rotated; the row written where it has a slot."""
    dim, nope = rank + rotated, 5
    rows = normal(4, dim + 3, dtype=dtype)[:, 3:]  # behind what else the projection gave
    queries = normal(4, heads, nope + rotated, dtype=dtype)
    weight = normal(rank, dtype=dtype, seed=4)
    slots, positions = (torch.tensor(v, device=DEVICE) for v in ([7, 18, -1, 0], [3, 49, 9, 0]))
    cos, sin = angles(rotated)
    cache = normal(BLOCKS, LAYERS, 1, 1, SIZE, dim, dtype=dtype)
    before = cache.clone()
    q = rotate_and_write_latents(
        rows, queries, PagedKv.of(cache), 1, slots, positions, cos, sin, weight, 1e-5
    )
    at = cos[positions], sin[positions]
    turned = reference.apply_rope(queries[..., nope:].float(), *at)
    assert q.shape == (4, heads, dim)
    close(q[..., rank:], turned, dtype)
    latent = reference.rms_norm(rows[:, :rank].float(), weight.float(), 1e-5)
    key = reference.apply_rope(rows[:, None, rank:].float(), *at)[:, 0]
    written = slots >= 0
    block, offset = slots[written] // SIZE, slots[written] % SIZE
    got = cache[block, 1, 0, 0, offset]
    close(got, torch.cat((latent, key), 1)[written], dtype)
    before[block, 1, 0, 0, offset] = got
    assert torch.equal(cache, before)  # and no other row


@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_latents_in_a_quantized_cache(wire: Wire) -> None:
    heads, rank, rotated = 2, 24, 8
    dim = rank + rotated
    floats = torch.zeros(BLOCKS, LAYERS, 1, 1, SIZE, dim, device=DEVICE)
    tiles = reference_relayout.compress(floats, wire)
    rows, queries, weight = normal(3, dim), normal(3, heads, 4 + rotated), normal(rank)
    slots, positions = torch.tensor([4, 19, 1], device=DEVICE), torch.arange(3, device=DEVICE)
    quantized = PagedKv.of_tiles(tiles, SIZE, dim, wire)
    for cache in (PagedKv.of(floats), quantized):
        rotate_and_write_latents(rows, queries, cache, 0, slots, positions, *angles(rotated), weight, 1e-5)
    want = reference_relayout.restore(reference_relayout.compress(floats, wire), SIZE, torch.float32, wire)
    # Compiled, one launch fuses multiplications and the other does not: last bits, and what they round to.
    close_to = {"rtol": 0.0, "atol": 0.0} if DEVICE == "cpu" else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(quantized.values(), want, **close_to)


def test_latents_that_do_not_fit() -> None:
    cache = PagedKv.of(normal(BLOCKS, LAYERS, 1, 1, SIZE, 24))
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="rows of 20, a norm of 16 and a rotation of 8"):
        rotate_and_write_latents(
            normal(1, 20), normal(1, 2, 12), cache, 0, one, one, *angles(8), normal(16), 1e-5
        )
    with pytest.raises(ValueError, match="do not go into 1 planes"):
        write_kv(normal(1, 1, 24), normal(1, 1, 24), cache, 0, one)

"""What test_triton.py runs in a process of its own: under Triton's interpreter, or on the GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import reference_relayout as reference
from kernels.reference_relayout import Wire
from kernels.triton.relayout import gather, scatter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIRES: tuple[Wire, ...] = ("int8", "fp8")
# block, layer, k|v, head, token, dim, as they lie in memory: the wire's, tokens before heads, layers or k|v outermost
ORDERS = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 3, 5), (1, 2, 0, 4, 3, 5), (2, 1, 0, 3, 5, 4))
SHAPE = (5, 3, 2, 4, 6, 24)


def cache_of(
    dtype: torch.dtype, order: tuple[int, ...] = ORDERS[0], shape: tuple[int, ...] = SHAPE
) -> Tensor:
    """Random values, a zero row, tiny and large ones, some not finite; gaps after each row."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    lying = [shape[dim] for dim in order]
    lying[-1] += 3
    x = torch.randn(lying, generator=generator) * torch.exp(
        3 * torch.randn((*lying[:-1], 1), generator=generator)
    )
    x = x.clamp(-6e4, 6e4).to(dtype)
    x = x[..., :-3].permute([order.index(dim) for dim in range(6)])
    for at, value in enumerate((0.0, 2e-30, 1e-31, 6e-8, torch.inf, -torch.inf, torch.nan)):
        block, layer, head = at % shape[0], at % shape[1], at % shape[3]
        if value < 1e-5:
            x[block, layer, 0, head, 0] = 0
        x[block, layer, 0, head, 0, -1] = value
    return x.to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """With one NaN as good as another."""
    if a.is_floating_point():
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.nan_to_num(7.0, torch.inf, -torch.inf), b.nan_to_num(7.0, torch.inf, -torch.inf)
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def ids(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(("dtype", "order"), zip([*DTYPES, torch.uint8], ORDERS, strict=True))
def test_as_they_are(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    if dtype.is_floating_point:
        cache = cache_of(dtype, order)
    else:
        cache = cache_of(torch.float32, order).nan_to_num(0.0).to(torch.int32).to(torch.uint8)
    part = {"layers": range(1, 3), "heads": range(1, 4)}
    found = gather(cache, ids(3, 0, dtype=torch.int32), **part)
    assert same_bits(found, reference.gather(cache, ids(3, 0), **part))
    into, want = torch.zeros_like(cache), torch.zeros_like(cache)
    scatter(into, ids(1, 4), found, **part)
    reference.scatter(want, ids(1, 4), found, **part)
    assert same_bits(into, want)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("dtype", "order"), zip(DTYPES, ORDERS[1:], strict=True))
def test_compressed(dtype: torch.dtype, order: tuple[int, ...], wire: Wire) -> None:
    cache = cache_of(dtype, order)
    part = {"layers": range(2), "heads": range(1, 4)}
    found = gather(cache, ids(3, 0, 4), wire=wire, **part)
    blocks = reference.gather(cache, ids(3, 0, 4), **part)
    assert torch.equal(found, reference.compress(blocks, wire))
    into, want = torch.ones_like(cache), torch.ones_like(cache)
    scatter(into, ids(0, 2, 1), found, wire=wire, **part)
    reference.scatter(want, ids(0, 2, 1), reference.restore(found, cache.shape[4], dtype, wire), **part)
    assert same_bits(into, want)
    rows = into[ids(0, 2, 1)][:, part["layers"].start : 2, :, 1:4]
    assert torch.equal(rows.isfinite().all(-1), blocks.isfinite().all(-1))


@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (1, 64), (16, 128), (5, 7), (40, 200), (33, 256)])
@pytest.mark.parametrize("wire", [None, *WIRES])
def test_tails(tokens: int, dim: int, wire: Wire | None) -> None:
    """Tokens and dimensions that are no powers of two, more tokens than one program takes, tiles at odd addresses."""
    cache = cache_of(torch.bfloat16, shape=(2, 1, 2, 1, tokens, dim))
    found = gather(cache, ids(1, 0), wire=wire)
    want = reference.gather(cache, ids(1, 0))
    assert same_bits(found, want if wire is None else reference.compress(want, wire))
    into = torch.zeros_like(cache)
    scatter(into, ids(1, 0), found, wire=wire)
    again = found if wire is None else reference.restore(found, tokens, cache.dtype, wire)
    assert same_bits(reference.gather(into, ids(1, 0)), again)


@pytest.mark.parametrize("wire", WIRES)
def test_every_value_of_16_bits(wire: Wire) -> None:
    """Each halves' bit pattern through the conversions, in rows that have all sizes."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        cache = bits.view(dtype).view(1, 1, 2, 1, 128, 256).to(DEVICE)
        found = gather(cache, ids(0), wire=wire)
        assert torch.equal(found, reference.compress(cache, wire))
        into = torch.zeros_like(cache)
        scatter(into, ids(0), found, wire=wire)
        assert same_bits(into, reference.restore(found, 128, dtype, wire))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype: torch.dtype, wire: Wire) -> None:
    """What a peer may send, with scales of every size."""
    scales = torch.tensor([1, 1e-3, 3e4, 1e-38, 2e38, torch.inf, 0, 7e-6]).view(torch.uint8)
    tile = torch.cat((torch.arange(256, dtype=torch.uint8).repeat(8), scales))
    tiles = tile.repeat(2).view(1, 1, 2, 1, -1).to(DEVICE)
    into = torch.zeros((1, 1, 2, 1, 8, 256), dtype=dtype, device=DEVICE)
    scatter(into, ids(0), tiles, wire=wire)
    assert same_bits(into, reference.restore(tiles, 8, dtype, wire))


@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("wire", [None, "int8"])
def test_ranks_of_another_tensor_parallelism(senders: int, receivers: int, wire: Wire | None) -> None:
    whole = cache_of(torch.float16, ORDERS[1])
    heads = whole.shape[3]
    sent = whole.chunk(senders, 3)
    of, to = heads // senders, heads // receivers
    blocks = ids(0, 3)
    for receiver in range(receivers):
        got = torch.zeros((5, 3, 2, to, 6, 24), dtype=whole.dtype, device=DEVICE)
        for sender, part in enumerate(sent):
            first, last = max(receiver * to, sender * of), min((receiver + 1) * to, (sender + 1) * of)
            if first >= last:
                continue
            staged = gather(part, blocks, heads=range(first - sender * of, last - sender * of), wire=wire)
            scatter(got, blocks, staged, heads=range(first - receiver * to, last - receiver * to), wire=wire)
        want = reference.gather(whole, blocks, heads=range(receiver * to, (receiver + 1) * to))
        if wire is not None:
            want = reference.restore(reference.compress(want, wire), 6, want.dtype, wire)
        assert same_bits(got[blocks], want)


def test_what_does_not_fit_is_said() -> None:
    cache = cache_of(torch.float32)
    with pytest.raises(ValueError, match="heads range"):
        gather(cache, ids(0), heads=range(2, 5))
    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        scatter(cache, ids(0), gather(cache, ids(0, 1)))
    with pytest.raises(ValueError, match="is not compressed"):
        gather(cache.to(torch.int8), ids(0), wire="int8")
    assert gather(cache, ids()).shape == (0, *cache.shape[1:])


def test_the_native_form_writes_the_same_bytes() -> None:
    if DEVICE != "cpu":
        pytest.skip("the CPU's memory is compared under the interpreter")
    from kernels.cache_view import CacheView
    from kernels.cpu.relayout import compress_blocks

    for dtype, wire in itertools.product(DTYPES, WIRES):
        cache = cache_of(dtype)
        strides = [stride * cache.itemsize for stride in cache.stride()]
        view = CacheView(cache.data_ptr(), *SHAPE[:2], *SHAPE[3:5], SHAPE[5] * cache.itemsize, *strides[:5])
        found = gather(cache, ids(2, 1), wire=wire)
        out = torch.zeros_like(found)
        name = str(dtype).removeprefix("torch.")
        compress_blocks(out.view(-1).numpy(), view, [2, 1], dtype=name, wire=wire)  # type: ignore[arg-type]
        assert torch.equal(found, out)

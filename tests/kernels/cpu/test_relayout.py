"""Copies between layouts against a loop over rows; the compressed form against torch; the same bytes in every variant."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.cache_view import CacheView
from kernels.cpu import relayout
from kernels.cpu.build import VARIANTS, BuildError, runs_here
from kernels.cpu.library import Library, load
from kernels.cpu.relayout import Dtype, Wire, compress_blocks, copy_blocks, restore_blocks, wire_block_bytes

HERE = [name for name, variant in VARIANTS.items() if runs_here(variant)]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
WIRES: tuple[Wire, ...] = ("int8", "fp8")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUMPY = "numpy"  # no native library


@pytest.fixture(params=[*HERE, NUMPY], scope="module")
def library(request: pytest.FixtureRequest) -> Library | None:
    return None if request.param == NUMPY else load(request.param)


@pytest.fixture(autouse=True)
def _no_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """None means numpy here, also where a library could be built."""
    monkeypatch.setattr(relayout, "_own", lambda: None)


@dataclass(frozen=True)
class Memory:
    """A view and the bytes that it lies in."""

    data: NDArray[np.uint8]
    view: CacheView

    @classmethod
    def canonical(cls, data: NDArray[np.uint8], *shape: int) -> Memory:
        return cls(data, CacheView.canonical(data.ctypes.data, *shape))

    def row(self, block: int, layer: int, kv: int, head: int, token: int) -> slice:
        view = self.view
        begin = view.address - self.data.ctypes.data + block * view.block_stride + layer * view.layer_stride
        begin += kv * view.kv_stride + head * view.head_stride + token * view.token_stride
        return slice(begin, begin + view.row_bytes)

    def rows(self, blocks: list[int]) -> list[slice]:
        view = self.view
        inner = (range(view.num_layers), range(2), range(view.num_heads), range(view.num_tokens))
        return [self.row(block, *at) for block in blocks for at in itertools.product(*inner)]


def expected(to: Memory, to_blocks: list[int], of: Memory, of_blocks: list[int]) -> bytes:
    """All of the destination's memory after the copy."""
    out, source = bytearray(to.data.tobytes()), of.data.tobytes()
    for into, row in zip(to.rows(to_blocks), of.rows(of_blocks), strict=True):
        out[into] = source[row]
    return bytes(out)


def noise(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, int, int, int]) -> Memory:
    """A view of layers, heads, tokens and row bytes with its dimensions in any order, with gaps, from either end."""
    layers, heads, tokens, row_bytes = shape
    counts = {"block": draw(st.integers(1, 5)), "layer": layers, "kv": 2, "head": heads, "token": tokens}
    plain = ["token", "head", "kv", "layer", "block"]
    order = draw(st.permutations(plain) if draw(st.booleans()) else st.just(plain))
    strides, extent, first = {}, row_bytes, 0
    for name in order:
        stride = extent + draw(st.sampled_from((0, 0, 0, 1, 64)))
        extent = stride * (counts[name] - 1) + extent
        strides[name] = stride
        if draw(st.sampled_from((False, False, False, True))):
            first += stride * (counts[name] - 1)
            strides[name] = -stride
    offset = draw(st.integers(0, 70))
    data = noise(offset + extent + 9, draw(st.integers(0, 9)))
    view = CacheView(
        data.ctypes.data + offset + first,
        counts["block"],
        layers,
        heads,
        tokens,
        row_bytes,
        *(strides[name] for name in ("block", "layer", "kv", "head", "token")),
    )
    return Memory(data, view)


@st.composite
def copies(draw: st.DrawFn) -> tuple[Memory, list[int], Memory, list[int]]:
    shape = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 3, 16, 64, 300, 1024))),
    )
    to, of = draw(memories(shape)), draw(memories(shape))
    to_blocks = draw(st.lists(st.integers(0, to.view.num_blocks - 1), unique=True))
    if draw(st.booleans()):
        to_blocks.sort()
    ids = st.integers(0, of.view.num_blocks - 1)
    of_blocks = [draw(ids) for _ in to_blocks]
    return to, to_blocks, of, of_blocks


@settings(max_examples=150, deadline=None)
@given(copies(), st.booleans())
def test_any_layout_into_any_other(
    library: Library | None, copy: tuple[Memory, list[int], Memory, list[int]], stream: bool
) -> None:
    to, to_blocks, of, of_blocks = copy
    want = expected(to, to_blocks, of, of_blocks)
    copy_blocks(to.view, to_blocks, of.view, of_blocks, library=library, stream=stream)
    assert to.data.tobytes() == want


@pytest.mark.parametrize("offset", [0, 1, 63, 64])
@pytest.mark.parametrize("row_bytes", [5, 255, 1023, 1024, 1300, 5000])
def test_long_runs(library: Library | None, row_bytes: int, offset: int) -> None:
    """Neighbours that become one run, runs that begin anywhere, and nothing beside them."""
    shape = (8, 2, 2, 3, row_bytes)
    size = 8 * 2 * 2 * 2 * 3 * row_bytes
    of = Memory.canonical(noise(size, 1), *shape)
    data = np.zeros(size + 200, np.uint8)
    view = replace(of.view, address=data.ctypes.data + offset)
    to = Memory(data, view)
    for to_blocks, of_blocks in (
        (list(range(8)), list(range(8))),
        ([1, 2, 3, 6, 0], [4, 5, 6, 7, 0]),
        ([2, 1], [1, 2]),
        ([], []),
    ):
        data[:] = 7
        want = expected(to, to_blocks, of, of_blocks)
        copy_blocks(
            view, np.array(to_blocks, np.int32), of.view, np.array(of_blocks, np.int32), library=library
        )
        assert data.tobytes() == want


@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_ranks_of_another_tensor_parallelism(library: Library | None, senders: int, receivers: int) -> None:
    """Each receiver takes its heads out of whichever sender has them; together they hold what the senders held."""
    blocks, layers, heads, tokens, row = 3, 2, 8, 4, 32
    whole = noise(blocks * layers * 2 * heads * tokens * row).reshape(blocks, layers, 2, heads, tokens, row)
    sent = [np.ascontiguousarray(part) for part in np.split(whole, senders, axis=3)]
    of, to = heads // senders, heads // receivers
    for receiver in range(receivers):
        got = np.zeros((blocks, layers, 2, to, tokens, row), np.uint8)
        view = CacheView.canonical(got.ctypes.data, blocks, layers, to, tokens, row)
        mine = range(receiver * to, (receiver + 1) * to)
        for sender, part in enumerate(sent):
            both = range(max(mine.start, sender * of), min(mine.stop, (sender + 1) * of))
            if not both:
                continue
            source = CacheView.canonical(part.ctypes.data, blocks, layers, of, tokens, row)
            for layer in range(layers):
                copy_blocks(
                    view.cut(layers=range(layer, layer + 1), heads=_moved(both, mine.start)),
                    range(blocks),
                    source.cut(layers=range(layer, layer + 1), heads=_moved(both, sender * of)),
                    range(blocks),
                    library=library,
                )
        assert np.array_equal(got, whole[:, :, :, mine.start : mine.stop])


def _moved(part: range, by: int) -> range:
    return range(part.start - by, part.stop - by)


def test_what_does_not_fit_is_said(library: Library | None) -> None:
    to = Memory.canonical(np.zeros(2 * 48, np.uint8), 2, 1, 2, 3, 4)
    of = Memory.canonical(np.zeros(2 * 48, np.uint8), 2, 1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"3 heads, 2 tokens.* do not fit into .* 2 heads, 3 tokens"):
        copy_blocks(to.view, [0], of.view, [0], library=library)
    for ids in ([2], [-1], [0, 1, 2**40]):
        with pytest.raises(ValueError, match="the destination blocks are of 0 to 1"):
            copy_blocks(to.view, ids, to.view, [0] * len(ids), library=library)
        with pytest.raises(ValueError, match="the source blocks are of 0 to 1"):
            copy_blocks(to.view, [0] * len(ids), to.view, ids, library=library)
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        copy_blocks(to.view, [0], to.view, [0, 1], library=library)
    with pytest.raises(ValueError, match="whole numbers"):
        copy_blocks(to.view, [0.5], to.view, [0], library=library)  # type: ignore[list-item]


def test_other_threads_run_meanwhile() -> None:
    library = load(HERE[-1])
    size = 1 << 28
    of, to = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    source, destination = (CacheView.canonical(x.ctypes.data, 1, 1, 1, 1, size // 2) for x in (of, to))
    seen, over = set(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.add(int(to[0]) + int(to[-1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):  # a busy machine may have no core for the watcher during one of them
        to[:] = 0
        copy_blocks(destination, [0], source, [0], library=library)
        if 1 in seen:
            break
    over.set()
    watcher.join()
    assert 1 in seen  # begun and not ended


# ---- the compressed form --------------------------------------------------------------------------------------------


def wire_of(x: torch.Tensor, wire: Wire) -> bytes:
    """x [.., tokens, dim] in tiles, by torch."""
    x = x.float()
    largest = torch.tensor(127.0 if wire == "int8" else 448.0)
    amax = x.abs().amax(-1, keepdim=True)
    some = amax > 1e-30
    y = torch.where(some, x * (largest / amax), 0.0)
    scale = torch.where(some, amax / largest, 0.0)
    bad = ~x.isfinite().all(-1, keepdim=True)
    y, scale = y.masked_fill(bad, 0.0), scale.masked_fill(bad, torch.nan)
    q = y.round().to(torch.int8) if wire == "int8" else y.to(torch.float8_e4m3fn)
    values, scales = q.view(torch.uint8).flatten(-2), scale.contiguous().view(torch.uint8).flatten(-2)
    return torch.cat((values, scales), -1).contiguous().numpy().tobytes()


def restored(wire_bytes: NDArray[np.uint8], shape: tuple[int, ...], dtype: Dtype, wire: Wire) -> torch.Tensor:
    *lead, tokens, dim = shape
    tiles = torch.from_numpy(wire_bytes.copy()).view(*lead, tokens * (dim + 4))
    values, scales = tiles[..., : tokens * dim].contiguous(), tiles[..., tokens * dim :].contiguous()
    q = values.view(torch.int8 if wire == "int8" else torch.float8_e4m3fn).float().view(shape)
    return (q * scales.view(torch.float32)[..., None]).to(TORCH[dtype])


def rows_of_all_kinds(shape: tuple[int, ...], dtype: Dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(
        4 * torch.randn((*shape[:-1], 1), generator=generator)
    )
    x = x.clamp(-6e4, 6e4).to(TORCH[dtype])
    rows = x.view(-1, shape[-1])
    special = [0.0, -0.0, 1e-31, 2e-30, 1e-7, 6e-8, 448.0, 6.5e4, torch.inf, -torch.inf, torch.nan]
    for row, value in zip(rows[:: max(1, len(rows) // 16)], special, strict=False):
        if value == 0 or abs(value) < 1e-5:
            row.zero_()
        row[row.numel() // 2] = value
    return x


def as_bytes(x: torch.Tensor) -> NDArray[np.uint8]:
    return x.contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 80, 128])
def test_compressed_as_torch_does_and_back(
    library: Library | None, dim: int, dtype: Dtype, wire: Wire
) -> None:
    shape = (5, 3, 2, 4, 6, dim)
    x = rows_of_all_kinds(shape, dtype, dim)
    of = Memory.canonical(as_bytes(x), *shape[:2], 4, 6, dim * x.element_size())
    ids = [3, 0, 4]
    out = np.zeros(len(ids) * wire_block_bytes(3, 4, 6, dim), np.uint8)
    compress_blocks(out, of.view, ids, dtype=dtype, wire=wire, library=library)
    assert out.tobytes() == wire_of(x[ids], wire)

    back = np.zeros_like(of.data)
    to = Memory.canonical(back, *shape[:2], 4, 6, dim * x.element_size())
    out.flags.writeable = False
    restore_blocks(to.view, [1, 2, 0], out, dtype=dtype, wire=wire, library=library)
    found = torch.from_numpy(back).view(TORCH[dtype]).view(shape)[[1, 2, 0]]
    want = restored(out, (3, *shape[1:]), dtype, wire)
    finite = want.isfinite()
    assert as_bytes(found[finite]).tobytes() == as_bytes(want[finite]).tobytes()
    assert torch.equal(
        finite.all(-1), x[ids].isfinite().all(-1)
    )  # not finite where it was not, and nowhere else
    assert not found[~x[ids].isfinite().all(-1)].isfinite().any()
    error = (found.float() - x[ids].float()).abs()
    amax = x[ids].float().abs().amax(-1, keepdim=True)
    allowed = amax / 254 if wire == "int8" else torch.maximum(x[ids].float().abs() / 16, amax / 448 / 1024)
    allowed = allowed * (1 + 1e-5) + x[ids].float().abs() * 2.0**-8 + 2e-7
    assert bool((error <= allowed)[finite].all())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_and_heads_of_a_strided_cache(library: Library | None, dtype: Dtype, wire: Wire) -> None:
    """Only the rows of the view are read and written: [token, head] caches, cut."""
    x = torch.randn((2, 4, 2, 5, 6, 24)).to(TORCH[dtype])  # block, layer, kv, token, head, dim
    item = x.element_size()

    def cut(data: NDArray[np.uint8]) -> CacheView:
        strides = [stride * item for stride in x.stride()]
        view = CacheView(data.ctypes.data, 2, 4, 6, 5, 24 * item, *strides[:3], strides[4], strides[3])
        return view.cut(layers=range(1, 3), heads=range(2, 5))

    data, back = as_bytes(x).copy(), as_bytes(x).copy()
    out = np.zeros((2, wire_block_bytes(2, 3, 5, 24)), np.uint8)
    compress_blocks(out, cut(data), [1, 0], dtype=dtype, wire=wire, library=library)
    part = x[[1, 0], 1:3, :, :, 2:5].transpose(3, 4)
    assert out.tobytes() == wire_of(part, wire)
    restore_blocks(cut(back), [1, 0], out, dtype=dtype, wire=wire, library=library)
    want = x.clone()
    want[[1, 0], 1:3, :, :, 2:5] = restored(out.reshape(-1), part.shape, dtype, wire).transpose(3, 4)
    assert np.array_equal(back, as_bytes(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_fp8_and_int8(library: Library | None, dtype: Dtype) -> None:
    """What a peer may send, and scales of every size."""
    scales = np.array([1, 1e-3, 3e4, 1e-38, 2e38, np.inf, 0, 7e-6], np.float32)
    wire_bytes = np.concatenate((np.tile(np.arange(256, dtype=np.uint8), 8), scales.view(np.uint8)))
    wire_bytes = np.tile(wire_bytes, 2)
    for wire in WIRES:
        want = restored(wire_bytes, (1, 1, 2, 1, 8, 256), dtype, wire)
        found = torch.zeros_like(want)
        view = CacheView.canonical(found.data_ptr(), 1, 1, 1, 8, 256 * found.element_size())
        restore_blocks(view, [0], wire_bytes, dtype=dtype, wire=wire, library=library)
        assert torch.equal(found.isnan(), want.isnan())
        number = ~want.isnan()
        assert as_bytes(found[number]).tobytes() == as_bytes(want[number]).tobytes()


def test_every_half_and_bfloat_is_read_rightly(library: Library | None) -> None:
    """Each alone in a row: int8 makes 127 of it and keeps its size in the scale."""
    for dtype in ("float16", "bfloat16"):
        bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        x = bits.view(TORCH[dtype]).view(2, 16, 2, 4, 256, 1)
        out = np.zeros(2 * wire_block_bytes(16, 4, 256, 1), np.uint8)
        view = CacheView.canonical(x.data_ptr(), 2, 16, 4, 256, 2)
        compress_blocks(out, view, [0, 1], dtype=dtype, wire="int8", library=library)
        assert out.tobytes() == wire_of(x, "int8")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.sampled_from(WIRES))
def test_any_float(library: Library | None, row: list[float], wire: Wire) -> None:
    x = torch.tensor([[row], [row[::-1]]]).view(1, 1, 2, 1, 1, len(row))
    out = np.zeros(wire_block_bytes(1, 1, 1, len(row)), np.uint8)
    view = CacheView.canonical(x.data_ptr(), 1, 1, 1, 1, 4 * len(row))
    compress_blocks(out, view, [0], dtype="float32", wire=wire, library=library)
    assert out.tobytes() == wire_of(x, wire)


def test_bytes_that_do_not_fit_are_said(library: Library | None) -> None:
    memory = Memory.canonical(np.zeros(2 * 2 * 3 * 8, np.uint8), 2, 1, 1, 3, 8)
    size = wire_block_bytes(1, 1, 3, 2)
    out = np.zeros(size, np.uint8)
    for wrong in (np.zeros(size + 1, np.uint8), np.zeros(size, np.int8), np.zeros(2 * size, np.uint8)[::2]):
        with pytest.raises(ValueError, match=f"are {size} contiguous bytes"):
            compress_blocks(wrong, memory.view, [0], dtype="float32", wire="int8", library=library)
        with pytest.raises(ValueError, match=f"are {size} contiguous bytes"):
            restore_blocks(memory.view, [0], wrong, dtype="float32", wire="int8", library=library)
    with pytest.raises(ValueError, match="do not hold float32"):
        compress_blocks(
            out, replace(memory.view, row_bytes=6), [0], dtype="float32", wire="int8", library=library
        )
    with pytest.raises(ValueError, match="float32 as int4"):
        compress_blocks(out, memory.view, [0], dtype="float32", wire="int4", library=library)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of 0 to 1"):
        restore_blocks(memory.view, [2], out, dtype="float32", wire="int8", library=library)
    compress_blocks(out[:0], memory.view, [], dtype="float32", wire="int8", library=library)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        compress_blocks(out, memory.view, [0], dtype="float32", wire="int8", library=library)


def test_numpy_serves_where_nothing_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def refuse(variant: str) -> Library:
        raise BuildError("no compiler")

    monkeypatch.setattr(relayout, "load", refuse)
    relayout._own.cache_clear()
    try:
        of, to = (
            Memory.canonical(noise(48), 1, 1, 2, 3, 4),
            Memory.canonical(np.zeros(48, np.uint8), 1, 1, 2, 3, 4),
        )
        copy_blocks(to.view, [0], of.view, [0])
        assert np.array_equal(to.data, of.data)
    finally:
        relayout._own.cache_clear()

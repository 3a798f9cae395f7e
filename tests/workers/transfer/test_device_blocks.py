"""A cache on a device gives and takes the same bytes as one on the host."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.device_memory import DevicePages
from workers.protocol.messages import Compression, KvLayout
from workers.shared_memory import SharedPages
from workers.transfer.block_memory import DeviceBlocks, HostBlocks, block_memory, canonical_view

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (10, 3, 2, 4, 4, 8)
PARTS = [(None, None), (range(1, 2), None), (None, range(2, 4)), (range(1, 3), range(0, 3))]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def both(dtype: str, planes: int = 2) -> tuple[DeviceBlocks, HostBlocks, torch.Tensor, torch.Tensor]:
    """With the same content, in different memory."""
    layout = KvLayout(3, 4 if planes == 2 else 1, 8, 4, dtype, "f", planes)
    torch.manual_seed(1)
    cache = torch.randn(SHAPE if planes == 2 else (10, 3, 1, 1, 4, 8)).to(DTYPES[dtype])
    copy = cache.clone()
    host = HostBlocks(copy.view(-1).view(torch.uint8).numpy(), layout)
    return DeviceBlocks(cache, layout), host, cache, copy


def joined(views: list[memoryview]) -> bytes:
    return b"".join(bytes(view) for view in views)


@pytest.mark.parametrize("compression", ["none", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("planes", "layers", "heads"),
    [(2, *one) for one in PARTS] + [(1, None, None), (1, range(1, 3), range(1))],
)
def test_the_same_bytes_leave_and_enter(
    planes: int, dtype: str, layers: range | None, heads: range | None, compression: Compression
) -> None:
    device, host, cache, copy = both(dtype, planes)
    sent = joined(device.outgoing([7, 0, 3], layers, heads, compression))
    assert sent == joined(host.outgoing([7, 0, 3], layers, heads, compression))
    for memory in (device, host):
        with memory.incoming([2, 9, 5], layers, heads, compression) as views:
            left = memoryview(sent)
            for view in views:
                view[:] = left[: len(view)]
                left = left[len(view) :]
    assert torch.equal(cache, copy)


@pytest.mark.parametrize(("layers", "heads"), PARTS)
def test_blocks_are_pulled_from_another_cache(layers: range | None, heads: range | None) -> None:
    device, host, cache, copy = both("float32")
    source = np.random.default_rng(0).integers(0, 256, cache.nbytes, np.uint8)
    layout = KvLayout(3, 4, 8, 4, "float32", "f")
    view = canonical_view(layout, source.ctypes.data, 10, 4).cut(layers=layers, heads=heads)
    for memory in (device, host):
        memory.pull([1, 8], view, [4, 6], layers, heads)
    assert torch.equal(cache.view(torch.uint8), copy.view(torch.uint8))


def test_a_plane_of_latents_is_whole_tokens_in_order() -> None:
    layout = KvLayout(3, 1, 8, 4, "float32", "f", planes=1)
    assert layout.block_bytes == 3 * 4 * 8 * 4
    _, host, cache, _ = both("float32", planes=1)
    assert joined(host.outgoing([7])) == cache[7].numpy().tobytes()
    second = joined(host.outgoing([7, 2], range(1, 2)))
    assert second == cache[[7, 2], 1].numpy().tobytes()
    restored = torch.zeros_like(cache)
    target = HostBlocks(restored.view(-1).view(torch.uint8).numpy(), layout)
    sent = joined(host.outgoing([7], compression="int8"))
    assert len(sent) == 3 * 4 * (8 + 4)
    with target.incoming([0], compression="int8") as (view,):
        view[:] = sent
    torch.testing.assert_close(restored[0], cache[7], rtol=0, atol=float(cache[7].abs().max()) / 200)


def test_views_that_were_given_out_stay_as_they_are() -> None:
    device, _, cache, _ = both("float32")
    first = device.outgoing([1])
    before = joined(first)
    device.outgoing([2])
    cache.zero_()
    assert joined(first) == before


def test_nothing_is_written_when_the_bytes_do_not_come() -> None:
    device, _, cache, copy = both("float32")

    def cut_off() -> None:
        with device.incoming([1]) as (view,):
            view[:10] = bytes(10)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        cut_off()
    assert torch.equal(cache, copy)


def test_a_cache_says_where_it_lies() -> None:
    device, host, cache, copy = both("bfloat16")
    assert device.view.address == cache.data_ptr()
    expected = canonical_view(KvLayout(3, 4, 8, 4, "bfloat16", "f"), copy.data_ptr(), 10, 4)
    assert host.view == expected
    own = {name: getattr(device.view, name) for name in device.view.__slots__ if name != "address"}
    assert own == {name: getattr(expected, name) for name in expected.__slots__ if name != "address"}


def test_the_memory_of_a_cache_is_chosen_by_its_device() -> None:
    layout = KvLayout(3, 4, 8, 4, "float32", "f")
    pages = SharedPages(10 * layout.block_bytes)
    found = block_memory(pages.tensor.view(torch.float32).view(SHAPE), layout, pages)
    assert isinstance(found, HostBlocks)
    assert found.shared is not None
    assert found.shared[0] is pages
    meta: Any = block_memory(torch.empty(SHAPE, device="meta"), layout, None)
    assert isinstance(meta, DeviceBlocks)
    assert meta.exported is None


def test_device_pages_are_freed_with_their_last_view() -> None:
    freed: list[int] = []

    class Cuda:
        buffer = np.zeros(64, np.uint8)

        def allocate(self, device: torch.device, num_bytes: int) -> int:
            return 1000

        def free(self, device: torch.device, address: int) -> None:
            freed.append(address)

        def bytes_at(self, device: torch.device, address: int, num_bytes: int, owner: Any) -> torch.Tensor:
            assert (address, num_bytes) == (1000, 64)
            found = torch.from_numpy(self.buffer)
            found.owner = owner  # type: ignore[attr-defined]
            return found

    pages = DevicePages(64, torch.device("cpu"), Cuda())  # type: ignore[arg-type]
    tensor = pages.tensor
    del pages
    assert freed == []
    del tensor
    assert freed == [1000]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_under_its_interpreter() -> None:
    cases = str(Path(__file__).with_name("device_relayout_cases.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

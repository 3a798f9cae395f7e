"""Run by test_device_blocks.py in a process of its own, which chooses Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.reference_relayout import part
from workers.protocol.messages import Compression
from workers.transfer.device_relayout import _Torch, _Triton


@pytest.mark.parametrize("compression", ["none", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_and_torch_write_the_same_bytes_and_read_each_others(
    compression: Compression, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 3, 2, 4, 4, 8).to(dtype)
    cache, ids = part(whole, range(1, 3), range(1, 4)), torch.tensor([5, 0, 2])
    row = 8 * whole.element_size() if compression == "none" else 8 + 4
    wires = [torch.zeros(3 * 2 * 2 * 3 * 4 * row, dtype=torch.uint8) for _ in range(2)]
    for relayout, wire in zip((_Triton(), _Torch()), wires, strict=True):
        relayout.gather(wire, cache, ids, compression)
    assert torch.equal(*wires)
    restored = [torch.zeros_like(whole) for _ in range(2)]
    for relayout, back in zip((_Triton(), _Torch()), restored, strict=True):
        relayout.scatter(part(back, range(1, 3), range(1, 4)), torch.tensor([1, 4, 3]), wires[0], compression)
    assert torch.equal(*restored)
    if compression == "none":
        assert torch.equal(restored[0][[1, 4, 3], 1:3, :, 1:4], whole[[5, 0, 2], 1:3, :, 1:4])


@pytest.mark.parametrize("tile_bytes", [4 * 12, 16 * 132, 8 * 580])
def test_triton_moves_quantized_tiles_as_words(tile_bytes: int) -> None:
    torch.manual_seed(0)
    whole = torch.randint(-(2**31), 2**31 - 1, (6, 2, 2, 3, 1, tile_bytes // 4), dtype=torch.int32)
    cache, ids = part(whole, None, range(1, 3)), torch.tensor([5, 0, 2])
    wire = torch.zeros(3 * 2 * 2 * 2 * tile_bytes, dtype=torch.uint8)
    relayout, back = _Triton(), torch.zeros_like(whole)
    relayout.gather(wire, cache, ids, "none")
    assert wire.numpy().tobytes() == cache[ids].contiguous().numpy().tobytes()
    relayout.scatter(part(back, None, range(1, 3)), torch.tensor([1, 4, 3]), wire, "none")
    assert torch.equal(back[[1, 4, 3], :, :, 1:3], whole[[5, 0, 2], :, :, 1:3])

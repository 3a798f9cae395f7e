"""The oracle itself, by hand: what the wire's rows hold, and which part of a cache a range is."""

from __future__ import annotations

import struct

import pytest
import torch

from kernels.reference_relayout import compress, gather, restore, scatter


def test_rows_by_hand() -> None:
    blocks = torch.tensor([[[254.0, -127.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, torch.inf, 2.0, 3.0]]])
    tile = bytes(compress(blocks, "int8")[0].tolist())
    assert tile[:12] == bytes((127, 256 - 64, 0, 2)) + bytes(8)  # halves to the even: -63.5, 0.5, 1.5
    assert struct.unpack("<2f", tile[12:20]) == (2.0, 0.0)
    assert restore(compress(blocks, "int8"), 3, torch.float32, "int8")[0, :2].tolist() == [
        [254, -128, 0, 4],
        [0] * 4,
    ]
    assert restore(compress(blocks, "int8"), 3, torch.float32, "int8")[0, 2].isnan().all()
    fp8 = torch.tensor(
        [[[448.0, 1.0, -17.0, 2.0**-10]]]
    )  # 17 lies between 16 and 18, 2^-10 between 0 and 2^-9
    assert bytes(compress(fp8, "fp8")[0].tolist())[:4] == bytes((0x7E, 0x38, 0xD8, 0x00))
    assert restore(compress(fp8, "fp8"), 1, torch.float16, "fp8").tolist() == [[[448.0, 1.0, -16.0, 0.0]]]


def test_parts_go_out_and_in() -> None:
    cache = torch.arange(2 * 3 * 2 * 4 * 5 * 6).view(2, 3, 2, 4, 5, 6)
    part = gather(cache, torch.tensor([1, 0]), layers=range(1, 3), heads=range(2, 3))
    assert torch.equal(part, cache[[1, 0], 1:3, :, 2:3])
    into = torch.zeros_like(cache)
    scatter(into, torch.tensor([0, 1]), part, layers=range(2), heads=range(1))
    assert torch.equal(into[:, :2, :, :1], part)
    assert into.count_nonzero() == part.count_nonzero()
    with pytest.raises(ValueError, match="layers range"):
        gather(cache, torch.tensor([0]), layers=range(2, 4))

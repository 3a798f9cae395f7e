"""From the neutral form of quantized matrices to that of the device: no value may change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.quantized_matrix import QuantizedMatrix, pack_int4, unpack_int4
from kernels.reference_matmul import dequantize
from workers.models.device_matrix import on_device
from workers.models.quantize import quantize_channels, quantize_fp8, quantize_q4, quantize_q8
from workers.models.quantized import (
    Fp8Weight,
    GroupedWeight,
    Quantized,
    concat_rows,
    cut_columns,
    cut_rows,
    same_form,
)

CPU = torch.device("cpu")


def weight(n: int = 6, k: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def in_groups(form: str, group: int, ordered: bool = False, k: int = 192) -> GroupedWeight:
    """Groups of `group`, as every reader gives them: equal ones of 32."""
    random = np.random.default_rng(group)
    d, m = (random.normal(size=(6, k // group)).astype(np.float16).repeat(group // 32, 1) for _ in range(2))
    order = random.permutation(k).astype(np.int32) if ordered else None
    if form == "q4":
        return GroupedWeight("q4", random.integers(0, 16, (6, k), np.uint8), d, m, order, group)
    return GroupedWeight("q8", random.integers(0, 256, (6, k), np.uint8), d, None, order, group)


def blocks(k: int = 192) -> Fp8Weight:
    q = quantize_fp8(weight(k=k)).q
    return Fp8Weight(q, np.random.default_rng(3).random((6, -(-k // 128)), np.float32), 128)


CASES: dict[str, tuple[Quantized, str, int]] = {
    "channels": (quantize_channels(weight()), "int8", 192),
    "q8": (in_groups("q8", 32), "int8", 32),
    "q8 by 64": (in_groups("q8", 64), "int8", 64),
    "q4": (in_groups("q4", 32), "int4", 32),
    "q4 by 64, scattered": (in_groups("q4", 64, ordered=True), "int4", 64),
    "q4 by 128": (in_groups("q4", 128, k=384), "int4", 128),
    "fp8": (quantize_fp8(weight()), "fp8", 192),
    "fp8 blocks": (blocks(), "fp8", 128),
}


@pytest.mark.parametrize("name", CASES)
def test_values_stay(name: str) -> None:
    neutral, format, group = CASES[name]
    matrix = on_device(neutral, torch.float16, CPU)
    assert (matrix.format, matrix.group, matrix.shape) == (format, group, neutral.shape)
    assert matrix.dtype == torch.float16
    assert np.array_equal(dequantize(matrix).numpy(), neutral.dequantize())
    some = matrix.rows(2, 5)
    assert np.array_equal(dequantize(some).numpy(), neutral.dequantize()[2:5])
    bits = {"int8": 8, "int4": 4 * 256 / 192 if neutral.shape[1] == 192 else 4, "fp8": 8}[format]
    assert matrix.nbytes >= 6 * neutral.shape[1] * bits / 8


@pytest.mark.parametrize("quantize", [quantize_channels, quantize_q8, quantize_q4, quantize_fp8])
def test_quantized_here_or_by_chunks_of_a_device(quantize: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way taken on a GPU gives what threads on a CPU do."""
    assert callable(quantize)
    whole = quantize(weight(40, 64)).dequantize()
    assert np.abs(whole - weight(40, 64).numpy()).max() < 0.6
    monkeypatch.setattr("workers.models.quantize._CHUNK", 1 << 26)
    assert np.array_equal(quantize(weight(40, 64)).dequantize(), whole)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_cut_and_stacked(name: str) -> None:
    neutral, _, _ = CASES[name]
    values = neutral.dequantize()
    parts = [cut_rows(neutral, range(0, 4)), cut_rows(neutral, range(4, 6))]
    assert same_form(parts)
    assert np.array_equal(concat_rows(parts).dequantize(), values)
    cut = cut_columns(neutral, range(128, neutral.shape[1]))
    if "scattered" in name:
        assert cut is None
    else:
        assert cut is not None
        assert np.array_equal(cut.dequantize(), values[:, 128:])
    inside_a_group = cut_columns(neutral, range(16, 32))
    assert (inside_a_group is None) == (name not in ("channels", "fp8"))


def test_what_stacks_and_cuts_leave_of_wide_groups() -> None:
    wide, narrow = in_groups("q4", 128, k=384), in_groups("q4", 32, k=384)
    both = concat_rows([wide, narrow])
    assert isinstance(both, GroupedWeight)
    assert both.shared == 32
    for columns, shared in ((range(0, 256), 128), (range(64, 128), 64), (range(32, 384), 32)):
        cut = cut_columns(wide, columns)
        assert isinstance(cut, GroupedWeight)
        assert cut.shared == shared
        assert np.array_equal(
            dequantize(on_device(cut, torch.float32, CPU)).numpy(), wide.dequantize()[:, columns]
        )


def test_only_like_orders_and_groups_are_stacked() -> None:
    scattered, straight = in_groups("q4", 64, ordered=True), in_groups("q4", 64)
    assert not same_form([scattered, straight])
    assert same_form(
        [straight, GroupedWeight("q4", straight.q, straight.d, straight.m, np.arange(192, dtype=np.int32))]
    )
    assert not same_form([quantize_fp8(weight()), blocks()])
    assert not same_form([quantize_fp8(weight()), quantize_channels(weight())])


@pytest.mark.parametrize("k", [32, 64, 128, 160, 384])
def test_two_columns_a_byte(k: int) -> None:
    q = torch.randint(0, 16, (3, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
    packed = pack_int4(q)
    assert packed.shape == (3, -(-k // 128) * 64)
    assert torch.equal(unpack_int4(packed, k), q)
    assert int(packed[1, 0]) == int(q[1, 0]) + 16 * (int(q[1, 64]) if k > 64 else 0)


def test_parts_that_do_not_go_together_are_refused() -> None:
    q, scale = torch.zeros(4, 96, dtype=torch.int8), torch.ones(3, 4)
    assert QuantizedMatrix("int8", q, scale, None, 96, 32).shape == (4, 96)
    for wrong, named in (
        (
            lambda: QuantizedMatrix("int8", q, scale, None, 96, 48),
            "groups of 48 inputs; allowed are 32, 64, 128",
        ),
        (
            lambda: QuantizedMatrix("int8", q, scale, None, 96, 64),
            r"float32 \[2, 4\], not torch.float32 \[3, 4\]",
        ),
        (lambda: QuantizedMatrix("int8", q, scale, scale, 96, 32), "int8 with a minimum: True"),
        (lambda: QuantizedMatrix("fp8", q, scale, None, 96, 32), r"float8_e4m3fn \[4, 96\], not torch.int8"),
        (lambda: QuantizedMatrix("int4", q, scale, scale, 96, 32), r"uint8 \[4, 64\]"),
    ):
        with pytest.raises(ValueError, match=named):
            wrong()

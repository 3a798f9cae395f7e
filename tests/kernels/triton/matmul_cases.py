"""What test_triton.py runs in a process of its own, under Triton's interpreter or on the GPU: quantized products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference_matmul as reference
from kernels.quantized_matrix import QuantizedMatrix, pack_int4
from kernels.triton.dequantize import dequantize
from kernels.triton.matmul import Arrivals, Tiling, multiply
from kernels.triton.quantize_rows import quantize_rows, rescale
from workers.models import matmul_choice, matmul_forms
from workers.models.device_linear import DeviceLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest result: what rounds are x's operands and the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
WHOLE = 0  # one scale for a row


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(numbers)))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(*shape)).to(DEVICE, dtype)


def quantized(format: str, n: int, k: int, group: int, ordered: bool = False) -> QuantizedMatrix:
    """Random bits, scales and minima."""
    random, group = generator(n, k, group), group or k
    shape = (-(-k // group), n)
    scale = torch.rand(shape, generator=random) * 0.01 + 0.01
    minimum = None
    if format == "int8":
        q = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
    elif format == "fp8":
        q = torch.randint(0, 0x7F, (n, k), generator=random, dtype=torch.uint8)
        q = (q | torch.randint(0, 2, (n, k), generator=random, dtype=torch.uint8) << 7).view(
            torch.float8_e4m3fn
        )
    else:
        q = pack_int4(torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8))
        scale, minimum = scale.half(), (torch.randn(shape, generator=random) * 0.1).half().to(DEVICE)
    order = torch.randperm(k, generator=random).int().to(DEVICE) if ordered else None
    return QuantizedMatrix(format, q.to(DEVICE), scale.to(DEVICE), minimum, k, group, order)  # type: ignore[arg-type]


def check(x: Tensor, weight: QuantizedMatrix | Tensor, tiling: Tiling, biased: bool = False) -> None:
    n = weight.shape[0]
    bias = normal(n, dtype=x.dtype) if biased else None
    arrivals = Arrivals(DEVICE)
    for dtype in (x.dtype, torch.float32):
        got = multiply(x, weight, bias, tiling, arrivals, dtype)
        if isinstance(weight, Tensor):
            want = x.float() @ weight.float().T + (0 if bias is None else bias.float())
        else:
            want = reference.multiply(x, weight, bias, torch.float32)
        assert got.dtype == dtype
        assert (got.float() - want).abs().max() <= TOLERANCE[x.dtype] * want.abs().max()
    assert not arrivals.counts.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("format", "group", "k"),
    [
        ("int8", WHOLE, 300),
        ("int8", 32, 288),
        ("int4", 32, 352),
        ("int4", 128, 384),
        ("fp8", WHOLE, 256),
        ("fp8", 128, 320),
    ],
)
def test_formats(dtype: torch.dtype, format: str, group: int, k: int) -> None:
    check(normal(3, k, dtype=dtype), quantized(format, 40, k, group), Tiling(columns=32), biased=True)


@pytest.mark.parametrize(
    ("format", "group", "k", "splits"),
    [("int8", WHOLE, 1536, 3), ("int4", 64, 1100, 2), ("fp8", 32, 1024, 2), ("floats", WHOLE, 600, 4)],
)
def test_split_inputs(format: str, group: int, k: int, splits: int) -> None:
    k = k // 32 * 32 if group == WHOLE else k // group * group
    weight = normal(40, k) if format == "floats" else quantized(format, 40, k, group)
    check(normal(17, k), weight, Tiling(columns=32, splits=splits), biased=True)
    # As many parts as that: there is no room for two tiles by two that are split.
    with pytest.raises(ValueError, match="4 split tiles"):
        multiply(normal(17, k), weight, None, Tiling(columns=32, splits=2), Arrivals(DEVICE, 3))


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_scattered_inputs(format: str) -> None:
    check(normal(5, 256), quantized(format, 33, 256, 64, ordered=True), Tiling(columns=32, rows=32))


def test_x_may_be_part_of_a_wider_matrix() -> None:
    whole = normal(4, 200)
    check(whole[:, 30:158], quantized("int8", 17, 128, WHOLE), Tiling(columns=16))


def test_no_rows() -> None:
    assert multiply(normal(0, 64), normal(8, 64), None, Tiling(), Arrivals(DEVICE)).shape == (0, 8)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight of 64 inputs"):
        multiply(normal(2, 63), normal(8, 64), None, Tiling(), Arrivals(DEVICE))
    with pytest.raises(ValueError, match="as x is"):
        multiply(normal(2, 64), normal(8, 64).half(), None, Tiling(), Arrivals(DEVICE))
    with pytest.raises(ValueError, match="there is room for 1"):
        multiply(normal(2, 1024), normal(80, 1024), None, Tiling(columns=32, splits=4), Arrivals(DEVICE, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("format", "group", "k"), [("int8", WHOLE, 300), ("int8", 32, 64), ("int4", 32, 352), ("fp8", 128, 320)]
)
def test_widened(dtype: torch.dtype, format: str, group: int, k: int) -> None:
    matrix = quantized(format, 37, k, group, ordered=True)
    got = dequantize(matrix, dtype)
    assert matrix.order is not None
    want = reference.dequantize(matrix)[:, matrix.order.long()]
    # A GPU may fuse product and sum; the interpreter cuts bfloat16 off.
    torch.testing.assert_close(
        got, want.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_activations(format: reference.RowFormat, dtype: torch.dtype) -> None:
    x = normal(4, 3000, dtype=dtype) * 3
    x[2] = 0
    got, want = quantize_rows(x, format), reference.quantize_rows(x, format)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))


def test_integer_sums_are_scaled_back() -> None:
    sums = torch.randint(-9000, 9000, (3, 2100), generator=generator(5), dtype=torch.int32).to(DEVICE)
    rows, columns, bias = normal(3, 1).abs(), normal(2100).abs(), normal(2100)
    torch.testing.assert_close(rescale(sums, rows, columns, None, torch.float32), sums * rows * columns)
    got = rescale(sums, rows, columns, bias, torch.float16)
    torch.testing.assert_close(got, (sums * rows * columns + bias).half(), rtol=2e-3, atol=1e-3)


def test_rows_of_a_widened_matrix() -> None:
    matrix = quantized("int4", 50, 128, 32)
    assert torch.equal(dequantize(matrix, torch.float32, 17, 40), dequantize(matrix, torch.float32)[17:40])


@pytest.mark.parametrize("rows", [3, 40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("format", "group"), [("int8", WHOLE), ("int4", 64), ("fp8", WHOLE), ("fp8", 128), ("floats", WHOLE)]
)
def test_every_form_of_a_product_is_right(
    format: str, group: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a linear layer takes them, at the tolerance at which a form may be chosen on a GPU."""
    monkeypatch.setattr(matmul_forms, "_WIDENED_BYTES", 20 * 128 * 4)  # in three parts
    n, k, dtype = 48, 128, torch.bfloat16 if format == "fp8" and group == WHOLE else torch.float32
    weight: Tensor | QuantizedMatrix
    if format == "floats":
        weight = normal(n, k)
    else:
        weight = replace(quantized(format, n, k, group, ordered=True), dtype=dtype)
    forms = matmul_forms.forms_of(weight, rows, 4)
    names = {form.name.split()[0] for form in forms}
    assert ("fused" in names) == (rows <= 512 and format != "floats")
    assert ("int8" in names) == (format == "int8" and rows >= 32)
    assert ("fp8" in names) == (dtype == torch.bfloat16)
    one_of_each = {form.name.split()[0]: form for form in forms}.values()
    x, bias = normal(rows, k, dtype=dtype), normal(n, dtype=dtype)
    for form in one_of_each:
        assert matmul_choice._is_right(form, weight, torch.float32, rows)
        plain, biased = (form.product(x[:5], b, torch.float32) for b in (None, bias))
        # What float8 units give is bfloat16.
        torch.testing.assert_close(biased, plain + bias, rtol=0.01, atol=0.02 * float(plain.abs().max()))


@pytest.mark.parametrize("rows", [1, 100])
def test_a_linear_layer_takes_what_is_usual(rows: int) -> None:
    weight, bias = replace(quantized("int8", 24, 64, 32), dtype=torch.float32), normal(24)
    linear, x = DeviceLinear(weight, bias, choices=matmul_choice.Choices(None, None)), normal(rows, 64)
    torch.testing.assert_close(linear(x), reference.multiply(x, weight, bias), rtol=1e-5, atol=1e-4)


def test_floats_of_16_bits_have_both_forms() -> None:
    weight = normal(40, 128, dtype=torch.float16)
    forms = matmul_forms.forms_of(weight, 3, 2)
    assert [form.name for form in forms][:2] == ["library", "fused 64x16/4"]
    assert all(matmul_choice._is_right(form, weight, torch.float16, 3) for form in forms)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="nothing can be timed without a GPU")
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_what_is_measured_is_right(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way on a GPU: every form is tried, the fastest kept, and read by the next process."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    weight = quantized(format, 1024, 2048, WHOLE if format == "fp8" else 128)
    for _ in range(2):
        matmul_choice.choices_on.cache_clear()
        linear = DeviceLinear(weight, None)
        for rows in (1, 20, 300, 5000):
            x = normal(rows, 2048, dtype=torch.bfloat16)
            want = reference.multiply(x, weight)
            assert (linear(x) - want).abs().max() <= 0.06 * want.abs().max()
    assert len(list((tmp_path / "matmul").glob("*.json"))) == 1
    matmul_choice.choices_on.cache_clear()

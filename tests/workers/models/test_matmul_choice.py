"""How the form of a product is chosen, with forms and a clock that stand in: no device is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference_matmul
from kernels.quantized_matrix import QuantizedMatrix, Weight
from workers.models import matmul_choice
from workers.models.device_linear import DeviceLinear
from workers.models.linear import EagerLinear, make_linear
from workers.models.matmul_choice import BUCKETS, Choices
from workers.models.matmul_forms import MatmulForm


class Clock:
    """Takes as long as what was run last says."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def seconds(self, launch: Callable[[], object]) -> float:
        launch()
        name, seconds = Forms.last
        self.measured.append(name)
        return seconds


class Forms:
    """`few` is fast for few rows, `many` for many; `wrong` would be the fastest; `broken` does not run."""

    last = ("", 0.0)

    @staticmethod
    def of(weight: Weight, rows: int, multiprocessors: int) -> list[MatmulForm]:
        assert isinstance(weight, QuantizedMatrix)
        times = {"few": 1.0 + rows, "many": 50.0 + rows / 10, "wrong": 0.1, "broken": 0.0}

        def form(name: str) -> MatmulForm:
            def product(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
                if name == "broken":
                    raise RuntimeError("out of resources: shared memory")
                Forms.last = (name, times[name])
                y = reference_matmul.multiply(x, weight, bias, dtype)
                return y * 1.2 if name == "wrong" else y

            return MatmulForm(name, product)

        return [form(name) for name in times]


def choices(clock: Clock | None = None, file: Path | None = None) -> Choices:
    return Choices(clock or Clock(), file, worth_measuring=24 * 64)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_choice, "forms_of", Forms.of)


@pytest.fixture
def matrix() -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-127, 128, (24, 64), generator=generator, dtype=torch.int8)
    return QuantizedMatrix(
        "int8", q, torch.rand(2, 24, generator=generator), None, 64, 32, dtype=torch.float32
    )


def test_the_fastest_right_form_is_taken_for_each_number_of_rows(
    matrix: QuantizedMatrix, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    chosen = [form.name for form in choices(clock).of(matrix, torch.float32)]
    assert chosen == ["few" if 1 + rows < 50 + rows / 10 else "many" for rows in BUCKETS]
    assert {"few", "many"} == set(chosen) == set(clock.measured)
    assert "broken of 24x64 int8 by 32, float32 to float32 is left out: out of resources" in caplog.text
    assert "wrong of 24x64 int8 by 32, float32 to float32 is left out: wrong by 0.2" in caplog.text


def test_no_activations_are_rounded_for_a_wider_result(
    matrix: QuantizedMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forms(*given: Any) -> list[MatmulForm]:
        return [replace(form, rounds=form.name == "few") for form in Forms.of(*given)]

    monkeypatch.setattr(matmul_choice, "forms_of", forms)
    for dtype, name in ((torch.float32, "few"), (torch.float64, "many")):
        assert choices().of(matrix, dtype)[0].name == name


def test_small_matrices_are_not_measured(matrix: QuantizedMatrix) -> None:
    clock = Clock()
    forms = Choices(clock, None, worth_measuring=24 * 64 + 1).of(matrix, torch.float32)
    assert [form.name for form in forms] == ["few"] * len(BUCKETS)
    assert not clock.measured


def test_what_was_measured_is_kept_in_the_file(tmp_path: Path, matrix: QuantizedMatrix) -> None:
    file = tmp_path / "matmul" / "gpu.json"
    first = choices(Clock(), file)
    chosen = [form.name for form in first.of(matrix, torch.float32)]
    again = Clock()
    first.of(matrix, torch.float32)  # the next layer
    assert [form.name for form in choices(again, file).of(matrix, torch.float32)] == chosen
    assert not again.measured
    held = json.loads(file.read_text())
    assert held["24x64 int8 by 32, float32 to float32"]["1"] == "few"
    assert [path.name for path in file.parent.iterdir()] == ["gpu.json"]

    held["24x64 int8 by 32, float32 to float32"]["1"] = "of another version"
    held["another shape"] = {"1": "few"}
    file.write_text(json.dumps(held))
    clock = Clock()
    choices(clock, file).of(matrix, torch.float32)
    assert len(clock.measured) == 2  # of one row alone
    assert json.loads(file.read_text())["another shape"] == {"1": "few"}
    assert json.loads(file.read_text())["24x64 int8 by 32, float32 to float32"]["1"] == "few"


@pytest.mark.parametrize("content", ["{", "[]", '{"24x64 int8 by 32, float32 to float32": 3}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str, matrix: QuantizedMatrix) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(content)
    assert choices(Clock(), file).of(matrix, torch.float32)[0].name == "few"
    assert isinstance(json.loads(file.read_text())["24x64 int8 by 32, float32 to float32"], dict)


def test_a_file_that_cannot_be_written_is_told(
    tmp_path: Path, matrix: QuantizedMatrix, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert choices(Clock(), tmp_path / "file" / "gpu.json").of(matrix, torch.float32)[0].name == "few"
    assert "the next start measures again" in caplog.text


def test_where_no_form_works_eager_torch_does(
    matrix: QuantizedMatrix, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(matmul_choice, "forms_of", lambda *given: Forms.of(*given)[2:])
    linear, x = DeviceLinear(matrix, None, choices=choices()), torch.randn(3, 64)
    torch.testing.assert_close(linear(x), x @ reference_matmul.dequantize(matrix).T)
    assert "is multiplied by eager torch, much slower" in caplog.text


def test_the_layer_takes_the_form_of_its_rows(matrix: QuantizedMatrix) -> None:
    bias = torch.arange(24.0)
    linear = DeviceLinear(matrix, bias, choices=choices())
    for rows, name in ((1, "few"), (16, "few"), (17, "few"), (65, "many"), (5000, "many"), (0, "few")):
        x = torch.ones(rows, 64)
        torch.testing.assert_close(linear(x), reference_matmul.multiply(x, matrix, bias))
        assert Forms.last[0] == name


def test_without_a_gpu_a_quantized_matrix_is_widened(matrix: QuantizedMatrix) -> None:
    linear, x = make_linear(matrix, torch.ones(24)), torch.randn(3, 64)
    assert isinstance(linear, EagerLinear)
    torch.testing.assert_close(linear(x), x @ reference_matmul.dequantize(matrix).T + 1)


def test_a_result_of_another_type_than_the_weight() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    y = make_linear(weight, dtype=torch.float32)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() @ weight.float().T, rtol=0.01, atol=0.1)

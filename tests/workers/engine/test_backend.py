"""What computes: the native kernels where they can be had, torch where not, said once and with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.cpu.build import BuildError
from workers.config import EngineConfig
from workers.engine import native_runner
from workers.engine.backend import Backend, open_backend
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.random_model import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepare_model(str(write_random_model(tmp_path_factory.mktemp("model"), "llama", seed=1)))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(variant: str) -> None:
        raise BuildError("no C++ compiler found")

    monkeypatch.setattr(native_runner, "load", load)


def opened(model: PreparedModel, **settings: Any) -> Backend:
    return open_backend(EngineConfig(device="cpu", num_threads=1, **settings), model)


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning."""
    [text] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return text


def test_without_a_compiler_torch_takes_over(
    model: PreparedModel, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened(model).runner(4).kernels == "torch"
    assert "no C++ compiler found" in said(caplog)


def test_float16_is_for_torch(model: PreparedModel, caplog: pytest.LogCaptureFixture) -> None:
    backend = opened(model, dtype="float16")
    assert (backend.runner(4).kernels, backend.layout.dtype) == ("torch", "float16")
    assert said(caplog).startswith("native CPU kernels are not used")


def test_heads_of_a_size_that_the_kernels_lack_are_for_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = write_random_model(tmp_path, {"model_type": "llama", "head_dim": 6}, seed=1)
    assert opened(prepare_model(str(odd))).runner(4).kernels == "torch"
    assert said(caplog)


def test_torch_that_was_asked_for_needs_no_word(
    model: PreparedModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened(model, kernels="torch").runner(4).kernels == "torch"
    assert not caplog.records


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int4"}])
def test_what_torch_cannot_do_is_refused_with_the_reason(
    model: PreparedModel, no_compiler: None, caplog: pytest.LogCaptureFixture, settings: dict[str, str]
) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"engine.{name} {value} needs .*: no C\\+\\+ compiler found"):
        opened(model, **settings)
    assert not caplog.records  # torch does not take over, so nothing may say so
    with pytest.raises(ValueError, match=f"engine.{name} {value} needs .* torch; use auto"):
        opened(model, kernels="torch", **settings)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_float8_is_for_gpus(model: PreparedModel, kernels: str) -> None:
    with pytest.raises(ValueError, match=r"engine.quantization is fp8, which needs a GPU; on a CPU use int8"):
        opened(model, kernels=kernels, quantization="fp8")


def test_kernels_that_were_named_are_not_replaced(model: PreparedModel, no_compiler: None) -> None:
    with pytest.raises(ValueError, match=r"engine.kernels is portable: no C\+\+ compiler found"):
        opened(model, kernels="portable")


@pytest.mark.parametrize("cpus", [[99_999], [0, 0]])
def test_cores_that_are_not_there_are_refused(model: PreparedModel, cpus: list[int]) -> None:
    with pytest.raises(ValueError, match=r"engine.cpus is .* must list different cores from 0 to \d"):
        open_backend(EngineConfig(device="cpu", num_threads=len(cpus), cpus=cpus), model)


def test_weights_are_quantized_by_all_threads(
    model: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch is held to one thread only when the weights are packed."""
    seen = []

    def stop(*args: Any, **kwargs: Any) -> None:
        seen.append(torch.get_num_threads())
        raise InterruptedError

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(native_runner, "open_packed_model", stop)
    try:
        with pytest.raises(InterruptedError):
            open_backend(EngineConfig(device="cpu", num_threads=3), model)
    finally:
        torch.set_num_threads(before)
    assert seen == [3]

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.quality import NativeLogits, Tally, TorchLogits, TransformersLogits, measure, report, text_windows
from kernels.cpu.build import BuildError
from kernels.cpu.library import load
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.random_model import write_random_model
from workers.models.scheme import Scheme


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepare_model(str(write_random_model(tmp_path_factory.mktemp("quality") / "model")))


class Table:
    """Fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        return self._logits[: len(token_ids)]


def test_figures_are_those_of_their_definition() -> None:
    """A vocabulary of two, worked out by hand."""
    exact, other = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    tally = Tally()
    tokens = [0, 1, 0] * 50
    tally.add(exact.log().expand(150, 2), other.log().expand(150, 2), tokens)
    got = tally.quality()
    zeros, ones = tokens[1:].count(0), tokens[1:].count(1)
    loss = -(zeros * math.log(0.9) + ones * math.log(0.1)) / (zeros + ones)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert got.against_reference == pytest.approx(math.exp(loss) / 2 - 1, rel=1e-5)
    assert got.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)
    assert got.same_best == 1.0
    tally.add(exact.log().expand(150, 2), exact.log().expand(150, 2), tokens)
    assert tally.quality().standard_error > 0


def test_the_reference_against_itself_is_nothing(model: PreparedModel) -> None:
    reference = TransformersLogits(model)
    got = measure(reference, {"itself": reference}, text_windows(model, 192, 96))["itself"]
    assert got.kl == pytest.approx(0, abs=1e-6)
    assert got.against_reference == pytest.approx(0, abs=1e-6)
    assert got.same_best == 1.0


def test_formats_cost_what_they_should(model: PreparedModel) -> None:
    """Fewer bits, more divergence; and the table has a line for each."""
    windows = text_windows(model, 192, 96)
    others = {
        name: TorchLogits(model, Scheme(scheme), torch.float32, 96)
        for name, scheme in (("floats", "none"), ("eight", "int8"), ("four", "int4"))
    }
    got = measure(TransformersLogits(model), others, windows)
    assert got["floats"].kl < 1e-5
    assert got["floats"].kl < got["eight"].kl < got["four"].kl / 5
    assert len(report(got).splitlines()) == 5


def test_the_native_path_is_the_same_model(model: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        load()
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("HEADRACE_CACHE", str(model.path.parent / "cache"))
    threads = torch.get_num_threads()
    try:
        native = NativeLogits(model, "none", "auto", 96)
        got = measure(TransformersLogits(model), {"native": native}, text_windows(model, 192, 96))
    finally:
        torch.set_num_threads(threads)
    assert got["native"].kl < 0.01


def test_windows_are_whole_and_of_the_same_text(model: PreparedModel, tmp_path: Path) -> None:
    windows = text_windows(model, 1000, 96)
    assert [len(window) for window in windows] == [96] * 10
    assert [token for window in windows for token in window] == text_windows(model, 960, 960)[0]
    with pytest.raises(ValueError, match="cannot be had"):
        text_windows(model, 10**7, 1024)

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from workers.models.quantize import quantize_channels, quantize_q4, quantize_q8

KINDS = {
    "normal": lambda: torch.randn(96, 192),
    "skewed": lambda: torch.randn(96, 192).exp(),
    "shifted": lambda: torch.randn(96, 192) * 0.01 + 3,
    "outliers": lambda: torch.randn(96, 192) * (1 + 20 * (torch.rand(96, 192) > 0.99)),
    "bfloat16": lambda: torch.randn(96, 192).bfloat16(),
}


def squared_error(weight: torch.Tensor, values: np.ndarray) -> np.ndarray:
    """By group of 32."""
    return ((weight.float().numpy().astype(np.float64) - values) ** 2).reshape(-1, 32).sum(-1)


def min_max_grid(weight: torch.Tensor) -> np.ndarray:
    """Plain rounding to 16 levels between a group's extremes: what the search must beat."""
    groups = weight.float().numpy().reshape(-1, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    d = ((high - low) / 15).astype(np.float16).astype(np.float32)
    m = low.astype(np.float16).astype(np.float32)
    q = np.clip(np.round((groups - m) / np.where(d == 0, 1, d)), 0, 15)
    return (d * q + m).reshape(weight.shape)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_four_bits_beat_plain_rounding(make) -> None:  # type: ignore[no-untyped-def]
    weight = make()
    got = quantize_q4(weight)
    ours, plain = squared_error(weight, got.dequantize()), squared_error(weight, min_max_grid(weight))
    assert ours.sum() < 0.95 * plain.sum()
    assert got.q.max() <= 15


def test_four_bits_find_a_grid_again() -> None:
    """Weights that lie on some grid of 16 levels, both ends used, are kept as they are."""
    random = np.random.default_rng(0)
    q = random.integers(0, 16, (64, 64))
    q[:, ::32], q[:, 1::32] = 0, 15
    d = random.uniform(0.01, 0.1, (64, 2)).astype(np.float16).astype(np.float32).repeat(32, 1)
    m = random.normal(size=(64, 2)).astype(np.float16).astype(np.float32).repeat(32, 1)
    got = quantize_q4(torch.from_numpy(d * q.astype(np.float32) + m))
    assert np.array_equal(got.q, q)
    assert np.array_equal(got.dequantize(), d * q.astype(np.float32) + m)


def test_four_bits_are_near_the_optimum() -> None:
    """Against every scale and minimum of a fine grid, group by group."""
    groups = torch.randn(512, 32)
    ours = squared_error(groups, quantize_q4(groups).dequantize())
    exact = groups.numpy().astype(np.float64)
    low, high = exact.min(1), exact.max(1)
    best = np.full(len(exact), np.inf)
    for below, above in itertools.product(np.linspace(-0.05, 0.25, 31), repeat=2):
        bottom, top = low + below * (high - low), high - above * (high - low)
        d, m = ((top - bottom) / 15)[:, None], bottom[:, None]
        q = np.clip(np.round((exact - m) / d), 0, 15)
        best = np.minimum(best, ((d * q + m - exact) ** 2).sum(1))
    assert ours.sum() < 1.05 * best.sum()


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_eight_bits_are_within_half_a_step(make) -> None:  # type: ignore[no-untyped-def]
    weight = make()
    exact = weight.float().numpy()
    channels, groups = quantize_channels(weight), quantize_q8(weight)
    assert np.allclose(channels.scale, np.abs(exact).max(1) / 127, rtol=1e-6)
    assert (np.abs(channels.dequantize() - exact) <= channels.scale[:, None] * 0.5001).all()
    # The scale of a group is rounded to 11 bits, which costs its largest values a little more.
    step = groups.d.astype(np.float32).repeat(32, 1)
    assert (np.abs(groups.dequantize() - exact) <= step * 0.57).all()


def test_zeros_and_constants() -> None:
    zeros = torch.zeros(2, 64)
    for quantize in (quantize_q4, quantize_q8, quantize_channels):
        assert not quantize(zeros).dequantize().any()
    constant = torch.full((2, 64), 0.75)
    assert np.array_equal(quantize_q4(constant).dequantize(), constant.numpy())
    mixed = torch.cat((torch.zeros(1, 64), torch.randn(1, 64)))
    assert np.isfinite(quantize_q4(mixed).dequantize()).all()


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 96)
    whole = [f(weight).dequantize() for f in (quantize_q4, quantize_q8, quantize_channels)]
    monkeypatch.setattr("workers.models.quantize._CHUNK", 128)
    for f, expected in zip((quantize_q4, quantize_q8, quantize_channels), whole, strict=True):
        assert np.array_equal(f(weight).dequantize(), expected)

from __future__ import annotations

import numpy as np
import pytest

from workers.models.quantized import ChannelWeight, GroupedWeight, concat_rows, same_form


def grouped(format: str, n: int = 3, k: int = 64, seed: int = 0) -> GroupedWeight:
    random = np.random.default_rng(seed)
    d = random.normal(size=(n, k // 32)).astype(np.float16)
    if format == "q8":
        return GroupedWeight("q8", random.integers(0, 256, (n, k), np.uint8), d)
    m = random.normal(size=(n, k // 32)).astype(np.float16)
    return GroupedWeight("q4", random.integers(0, 16, (n, k), np.uint8), d, m)


def channel(n: int = 3, k: int = 64) -> ChannelWeight:
    random = np.random.default_rng(0)
    return ChannelWeight(random.integers(-127, 128, (n, k), np.int8), random.random(n, np.float32))


@pytest.mark.parametrize("weight", [grouped("q8"), grouped("q4"), channel()], ids=["q8", "q4", "channel"])
def test_values_are_what_the_definition_says(weight: GroupedWeight | ChannelWeight) -> None:
    values = weight.dequantize()
    assert values.shape == weight.shape == (3, 64)
    for row in range(3):
        for column in range(64):
            q = int(weight.q[row, column])
            if isinstance(weight, ChannelWeight):
                expected = float(weight.scale[row]) * q
            elif weight.m is None:
                expected = float(weight.d[row, column // 32]) * (q - 128)
            else:
                expected = float(weight.d[row, column // 32]) * q + float(weight.m[row, column // 32])
            assert values[row, column] == np.float32(expected)


@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_rows_are_stacked(kind: str) -> None:
    parts = [grouped(kind, n, seed=n) for n in (3, 1, 2)]
    whole = concat_rows(parts)
    assert np.array_equal(whole.dequantize(), np.concatenate([part.dequantize() for part in parts]))
    assert concat_rows([channel(), channel()]).shape == (6, 64)


def test_only_like_is_stacked_on_like() -> None:
    assert same_form([grouped("q4"), grouped("q4")])
    assert same_form([channel(), channel()])
    for parts in ([grouped("q4"), grouped("q8")], [channel(), grouped("q8")], [grouped("q8"), np.zeros(3)]):
        assert not same_form(parts)
    with pytest.raises(AssertionError):
        concat_rows([grouped("q4"), grouped("q8")])


def test_impossible_matrices_are_refused() -> None:
    good = grouped("q4")
    for wrong in (
        lambda: GroupedWeight("q4", good.q, good.d),
        lambda: GroupedWeight("q8", good.q, good.d, good.m),
        lambda: GroupedWeight("q4", good.q, good.d[:, :1], good.m),
        lambda: GroupedWeight("q8", good.q[:, :40], good.d[:, :1]),
        lambda: ChannelWeight(channel().q, np.ones(2, np.float32)),
    ):
        with pytest.raises(AssertionError):
            wrong()

"""A view names the bytes that it should, and its parts lie within it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernels.cache_view import CacheView

VIEW = CacheView.canonical(1000, num_blocks=3, num_layers=4, num_heads=2, num_tokens=5, row_bytes=6)


def test_canonical_is_c_order() -> None:
    assert (VIEW.token_stride, VIEW.head_stride, VIEW.kv_stride) == (6, 30, 60)
    assert (VIEW.layer_stride, VIEW.block_stride) == (120, 480)
    assert VIEW.block_bytes == 480
    assert VIEW.is_canonical


def test_a_cut_moves_the_address() -> None:
    cut = VIEW.cut(layers=range(1, 3), heads=range(1, 2))
    assert cut == replace(VIEW, address=1000 + 120 + 30, num_layers=2, num_heads=1)
    assert cut.block_bytes == 2 * 2 * 30
    assert not cut.is_canonical
    assert cut.cut(layers=range(1, 2)).address == VIEW.cut(layers=range(2, 3), heads=range(1, 2)).address


def test_layers_alone_stay_one_run() -> None:
    assert VIEW.cut(layers=range(2, 3)).is_canonical
    assert not VIEW.cut(heads=range(1)).is_canonical
    assert not replace(VIEW, block_stride=100).is_canonical  # blocks overlap
    assert replace(
        VIEW, num_tokens=1, token_stride=-7, head_stride=6, kv_stride=12, layer_stride=24
    ).is_canonical


@pytest.mark.parametrize(
    "part", [range(4, 5), range(-1, 2), range(2, 2), range(0, 4, 2), range(3, 1, -1), range(5)]
)
def test_what_is_no_part_is_refused(part: range) -> None:
    with pytest.raises(ValueError, match="layers range"):
        VIEW.cut(layers=part)
    with pytest.raises(ValueError, match="heads range"):
        VIEW.cut(heads=part)


@pytest.mark.parametrize("name", ["num_blocks", "num_layers", "num_heads", "num_tokens", "row_bytes"])
def test_nothing_is_empty(name: str) -> None:
    with pytest.raises(ValueError, match="at least one"):
        replace(VIEW, **{name: 0})

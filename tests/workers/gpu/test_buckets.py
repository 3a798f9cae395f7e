"""Which graph a step runs in."""

from __future__ import annotations

from workers.gpu.buckets import Buckets, Shape, decode_shapes, mixed_shapes


def sizes(shapes: list[Shape]) -> list[int]:
    return [shape.tokens for shape in shapes]


def test_sizes() -> None:
    assert sizes(decode_shapes(1)) == [1]
    assert sizes(decode_shapes(3)) == [1, 2, 3]
    assert sizes(decode_shapes(8)) == [1, 2, 4, 8]
    assert sizes(decode_shapes(27)) == [1, 2, 4, 8, 16, 24, 27]
    assert decode_shapes(2)[1] == Shape(tokens=2, seqs=2, rows=2, max_queries=1)
    assert mixed_shapes(0, 4) == []
    assert mixed_shapes(40, 24) == [Shape(16, 16, 16, 16), Shape(32, 24, 24, 32), Shape(40, 24, 24, 40)]
    assert sizes(mixed_shapes(256, 24)) == [16, 32, 64, 128, 192, 256]


def test_a_step_takes_the_smallest_that_holds_it() -> None:
    buckets = Buckets(decode_shapes(16), mixed_shapes(64, 20))
    for count in range(1, 17):
        shape = buckets.shape_for(count, count, count)
        assert shape is not None
        assert shape.max_queries == 1
        assert count <= shape.tokens <= max(count + 7, 1)
    assert buckets.shape_for(17, 17, 17) == Shape(32, 20, 20, 32), "too many to be decoded in one graph"
    assert buckets.shape_for(3, 2, 1) == Shape(16, 16, 16, 16)
    assert buckets.shape_for(1, 1, 0) == Shape(16, 16, 16, 16), "a chunk that samples nothing"
    assert buckets.shape_for(64, 20, 20) == Shape(64, 20, 20, 64)
    assert buckets.shape_for(64, 21, 20) is None
    assert buckets.shape_for(64, 3, 21) is None, "a draft samples at every position"
    assert buckets.shape_for(65, 1, 1) is None
    assert buckets.shape_for(0, 0, 0) is None
    assert sizes(buckets.all)[0] == 64
    assert len(buckets.all) == 5 + 3


def test_without_graphs_no_step_finds_one() -> None:
    assert Buckets([], []).shape_for(1, 1, 1) is None

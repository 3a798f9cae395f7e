from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.arrivals import Arrivals
from workers.transfer.shards import Part, parts

HEADS, LAYERS = 4, 3


@st.composite
def transfers(draw: Any) -> tuple[int, int, int, int, list[tuple[Part, range, range]]]:
    """(first block, number of blocks, source ranks, ranks, every cell in pieces, shuffled)"""
    first, count = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    sources, ranks = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    pieces = []
    for part in parts(sources, ranks, HEADS):
        at = first
        while at < first + count:
            end = draw(st.integers(at + 1, first + count))
            layer = 0
            while layer < LAYERS:
                stop = draw(st.integers(layer + 1, LAYERS))
                pieces.append((part, range(at, end), range(layer, stop)))
                layer = stop
            at = end
    return first, first + count, sources, ranks, draw(st.permutations(pieces))


@given(transfer=transfers())
def test_in_any_order_it_is_complete_with_the_last_cell_and_not_before(transfer: Any) -> None:
    first, end, sources, ranks, pieces = transfer
    arrivals = Arrivals(first, end, LAYERS, HEADS, ranks)
    for part, blocks, layers in pieces:
        assert not arrivals.complete()
        arrivals.claim(sources, part, blocks, layers)
        assert not arrivals.complete(), "claimed is not written"
        arrivals.arrived(blocks, layers)
    assert arrivals.complete()
    assert arrivals.progress == f"{end - first} of {end - first} blocks"
    part, blocks, layers = pieces[0]
    with pytest.raises(ValueError, match="twice"):
        arrivals.claim(sources, part, blocks, layers)
    assert arrivals.complete(), "what was refused changes nothing"


@given(transfer=transfers(), data=st.data())
def test_a_prefix_is_complete_when_its_cells_and_no_others_have_arrived(transfer: Any, data: Any) -> None:
    """Brute force: a set of cells beside the table."""
    first, end, sources, ranks, pieces = transfer
    arrivals = Arrivals(first, end, LAYERS, HEADS, ranks)
    all_parts = parts(sources, ranks, HEADS)
    claimed: set[tuple[Part, int, int]] = set()
    arrived: set[tuple[Part, int, int]] = set()
    for part, blocks, layers in pieces[: data.draw(st.integers(1, len(pieces)))]:
        cells = {(part, block, layer) for block in blocks for layer in layers}
        arrivals.claim(sources, part, blocks, layers)
        claimed |= cells
        if data.draw(st.booleans()):
            arrivals.arrived(blocks, layers)
            arrived |= cells
        for count in range(-1, end - first + 2):
            wanted = {
                (p, block, layer)
                for p in all_parts
                for block in range(first, first + count)
                for layer in range(LAYERS)
            }
            expected = 0 <= count <= end - first and wanted == arrived == claimed
            assert arrivals.complete(count) == expected, count


def test_the_right_number_of_wrong_blocks_is_no_prefix() -> None:
    arrivals = Arrivals(0, 3, LAYERS, HEADS, 1)
    (part,) = parts(1, 1, HEADS)
    arrivals.claim(1, part, range(1, 3), range(LAYERS))
    arrivals.arrived(range(1, 3), range(LAYERS))
    assert not arrivals.complete(2)


def test_nothing_is_complete_when_nothing_is_wanted_or_said_to_come() -> None:
    assert Arrivals(3, 3, LAYERS, HEADS, 2).complete()
    assert Arrivals(0, 3, LAYERS, HEADS, 2).complete(0)
    assert not Arrivals(0, 3, LAYERS, HEADS, 2).complete()
    assert Arrivals(0, 3, LAYERS, HEADS, 2).progress == "0 of 3 blocks"


@pytest.mark.parametrize(
    ("blocks", "layers", "match"),
    [
        (range(1, 3), range(LAYERS), "blocks 1..3 were announced, 2..6 are wanted"),
        (range(5, 7), range(LAYERS), "2..6 are wanted"),
        (range(6, 7), range(LAYERS), "wanted"),
        (range(-2, 3), range(LAYERS), "wanted"),
        (range(3, 3), range(LAYERS), "wanted"),
        (range(4, 3), range(LAYERS), "wanted"),
        (range(0, 2**63), range(LAYERS), "wanted"),
        (range(2**63, 2**64), range(LAYERS), "wanted"),
        (range(2, 3), range(0, LAYERS + 1), "layers 0..4 were announced of 3"),
        (range(2, 3), range(-1, 1), "layers"),
        (range(2, 3), range(1, 1), "layers"),
        (range(2, 3), range(2**63, 2**64), "layers"),
        (range(2, 3), range(0, 2**64), "layers"),
    ],
)
def test_cells_outside_are_refused(blocks: range, layers: range, match: str) -> None:
    arrivals = Arrivals(2, 6, LAYERS, HEADS, 1)
    (part,) = parts(1, 1, HEADS)
    with pytest.raises(ValueError, match=match):
        arrivals.claim(1, part, blocks, layers)
    arrivals.claim(1, part, range(2, 6), range(LAYERS))
    arrivals.arrived(range(2, 6), range(LAYERS))
    assert arrivals.complete(), "what was refused has claimed nothing"


def test_parts_that_are_none_of_this_transfer_are_refused() -> None:
    arrivals = Arrivals(0, 2, LAYERS, HEADS, 2)
    first, second = parts(2, 2, HEADS)
    arrivals.claim(2, first, range(2), range(LAYERS))
    with pytest.raises(ValueError, match="rank 1 wants nothing of rank 0"):
        arrivals.claim(2, Part(0, 1, second.heads), range(2), range(LAYERS))
    with pytest.raises(ValueError, match="pieces of 1 and of 2 ranks for one ticket"):
        arrivals.claim(1, parts(1, 2, HEADS)[0], range(2), range(LAYERS))


def test_pieces_that_overlap_in_one_cell_are_refused_whole() -> None:
    arrivals = Arrivals(0, 4, LAYERS, HEADS, 1)
    (part,) = parts(1, 1, HEADS)
    arrivals.claim(1, part, range(1, 2), range(1, 2))
    for blocks, layers in [(range(4), range(LAYERS)), (range(1, 3), range(1, 3)), (range(2), range(2))]:
        with pytest.raises(ValueError, match="twice"):
            arrivals.claim(1, part, blocks, layers)
    arrivals.claim(1, part, range(1, 2), range(2, 3))
    arrivals.claim(1, part, range(1, 2), range(0, 1))

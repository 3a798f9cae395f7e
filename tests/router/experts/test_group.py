"""What ranks say of themselves is put together again; what excludes itself is told."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from router.experts.group import groups_of
from tests.router.experts.groups import EXPERTS, LAYERS, RANKS, SLOTS, group, reports
from workers.protocol.experts import Placement, contiguous


def test_the_placement_comes_back_from_the_ranks():
    placement = Placement(
        5,
        (((0, 1, 2), (3, 4), (5, 6), (7, 0)), ((7, 6), (5, 4), (3, 2), (1, 0))),
        (((0.25, 1, 1), (1, 1), (1, 1), (1, 0.75)), ((1, 1), (1, 1), (1, 1), (1, 1))),
    )
    found = group(placement)
    assert found.placement() == placement
    assert found.version == 5
    assert found.is_complete()
    assert not found.missing
    found.placement().validate(EXPERTS, found.topology().slots, LAYERS)


def test_ranks_that_differ_have_no_common_placement_yet():
    found = group(changes={1: {"version": 3, "ready": 3}})
    assert found.placement() is None
    assert not found.settled
    assert (found.version, found.newest) == (0, 3)


def test_only_those_with_a_lease_of_the_same_life_count():
    told = reports()
    alive = {report.worker_id: report.epoch for report in told}
    del alive["g-1"]
    alive["g-2"] = 7
    found, _ = groups_of(told, alive)
    assert found["g"].missing == [1, 2]
    assert not found["g"].is_complete()
    assert groups_of(told, {})[0] == {}


def test_a_rank_that_the_others_have_given_up_has_no_slots_and_is_not_missing():
    found = group(changes={2: None} | {rank: {"members": [0, 1, 3]} for rank in (0, 1, 3)})
    assert found.missing == []
    assert found.members == {0, 1, 3}
    assert found.topology().slots == [SLOTS, SLOTS, 0, SLOTS]
    # It may think that the others are gone, or not have noticed: most are right.
    for alone in ([2], []):
        told = {2: {"members": alone, "version": 9}} | {rank: {"members": [0, 1, 3]} for rank in (0, 1, 3)}
        found = group(changes=told)
        assert found.members == {0, 1, 3}
        assert found.settled
        assert found.newest == 0
        assert found.placement().layers[0][2] == ()


def test_while_ranks_are_agreeing_who_is_there_nothing_is_settled():
    found = group(changes={2: None} | {rank: {"members": [0, 1, 3]} for rank in (0, 3)})
    assert not found.settled
    assert found.placement() is None


def test_nodes_are_numbered_and_a_newcomer_is_seen():
    empty = [[] for _ in range(LAYERS)]
    found = group(
        changes={0: {"node": "b"}, 1: {"node": "a"}, 2: {"node": "b"}, 3: {"experts": empty, "node": "a"}}
    )
    assert found.topology().nodes == [0, 1, 0, 1]
    assert found.newcomers == [3]


def test_two_lives_of_a_rank_the_latest_is_meant():
    told = reports()
    told.append(replace(told[0], worker_id="other", epoch=9, slots=7))
    found, _ = groups_of(told, {report.worker_id: report.epoch for report in told})
    assert found["g"].topology().slots[0] == 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_experts": 9}, "says num_experts is 9, worker g-0 8"),
        ({"num_layers": 3}, "says num_layers is 3"),
        ({"rank": RANKS}, f"is rank {RANKS}; there are 0 to {RANKS - 1}"),
        ({"experts": [[1]]}, "tells of 1 of 2 layers"),
        ({"shares": [[1.0], []]}, "shares that have not the shape"),
        ({"speed": 0.0}, "a speed of 0.0"),
    ],
)
def test_a_group_that_contradicts_itself_is_left_out_and_told(change, told):
    others = reports(group="h")
    broken = reports()
    broken[-1] = replace(broken[-1], **change)
    found, errors = groups_of(
        [*others, *broken], {report.worker_id: report.epoch for report in [*others, *broken]}
    )
    assert list(found) == ["h"]
    assert told in str(errors[0])
    assert found["h"].placement() == contiguous(LAYERS, EXPERTS, RANKS)

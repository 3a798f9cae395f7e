"""When experts are placed anew: for a gain that is worth the loading, not for noise, and never silently not at all."""

from __future__ import annotations

import numpy as np
import pytest

from router.config import ExpertsConfig
from router.experts.balance import balance, rank_loads
from router.experts.rebalancer import (
    Phase,
    Seen,
    State,
    failed,
    heard_of,
    in_vain,
    judge,
    look,
    next_version,
    posted,
)
from router.experts.topology import Rank, Topology
from tests.router.experts.groups import EXPERTS, LAYERS, RANKS, group, renumbered
from workers.protocol.experts import Placement, contiguous

CONFIG = ExpertsConfig(min_tokens=1_000, pause_s=30, stall_s=100, window_s=10)
EVEN = np.full((2, LAYERS, EXPERTS), 1_000.0)
# Experts 0 and 1, which one rank has under `contiguous`, get half of all tokens.
SKEWED = np.where(np.arange(EXPERTS) < 2, 3_000.0, 1_000.0) * np.ones((2, LAYERS, 1))
# Each of the two beside one that is cold.
BETTER = Placement(1, (((0, 2), (1, 3), (4, 5), (6, 7)),) * LAYERS)


def seen(halves=SKEWED, of=None, **more) -> Seen:
    return Seen(of or group(), halves, **({"silent_s": 1.0} | more))


FRESH = State()


def phase(seen: Seen, state: State = FRESH, now: float = 1e6, config: ExpertsConfig = CONFIG) -> Phase:
    return look(seen, state, config, now)[0].phase


def test_an_even_load_stays_where_it_is_and_an_uneven_one_is_planned_for():
    assert phase(seen(EVEN)) is Phase.BALANCED
    verdict, _ = look(seen(), State(), CONFIG, 0.0)
    assert verdict.phase is Phase.PLANNING
    assert not verdict.urgent
    assert verdict.most_to_gain == pytest.approx(1 - 3_000 / 6_000)
    assert phase(seen(), config=CONFIG.model_copy(update={"rebalance": False})) is Phase.OFF


def test_few_tokens_none_or_old_ones_say_nothing():
    assert phase(seen(SKEWED / 100)) is Phase.WAITING
    one_layer = SKEWED * np.array([0.0, 1.0])[:, None]
    assert phase(seen(one_layer)) is Phase.WAITING
    one_half = SKEWED * np.array([2.0, 0.0])[:, None, None]
    assert phase(seen(one_half)) is Phase.WAITING
    assert phase(seen(silent_s=None)) is Phase.WAITING
    verdict, _ = look(seen(silent_s=31.0), State(), CONFIG, 0.0)
    assert verdict.phase is Phase.WAITING
    assert "no counts for 31 s" in verdict.text


def test_between_two_placements_there_is_a_pause():
    state = posted(State(), group(), 1, now=100.0)
    settled = seen(of=renumbered(group(), 1))
    assert phase(settled, state, 129.0) is Phase.WAITING
    assert phase(settled, state, 131.0) is Phase.PLANNING


def test_a_plan_that_was_not_worth_it_is_not_made_again_and_again():
    state = in_vain(State(), 0.5, now=100.0)
    assert phase(seen(), state, 120.0) is Phase.WAITING
    assert phase(seen(), state, 140.0) is Phase.BALANCED
    worse = SKEWED.copy()
    worse[:, :, 0] *= 2
    assert phase(seen(worse), state, 140.0) is Phase.PLANNING
    assert phase(seen(), state, 100.0 + 301) is Phase.PLANNING


def test_what_becomes_of_a_placement_is_followed_and_said():
    state = posted(State(), group(), 7, now=100.0)
    assert look(seen(), state, CONFIG, 110.0)[0].text == "version 7 is being loaded by ranks 0, 1, 2, 3"
    some = group(changes={0: {"ready": 7}, 2: {"ready": 7}})
    assert look(seen(of=some), state, CONFIG, 110.0)[0].text == "version 7 is being loaded by ranks 1, 3"
    ready = group(changes={rank: {"ready": 7} for rank in range(RANKS)})
    verdict = look(seen(of=ready), state, CONFIG, 110.0)[0]
    assert (verdict.phase, verdict.text) == (
        Phase.LOADING,
        "version 7 is loaded, the ranks are about to switch",
    )
    switching = group(changes={0: {"version": 7, "ready": 7}})
    assert phase(seen(of=switching), state, 110.0) is Phase.LOADING
    assert phase(seen(of=switching), state, 300.0) is Phase.STALLED


def test_a_stalled_placement_is_told_and_replaced():
    state = posted(State(), group(), 7, now=100.0)
    stuck = group(changes={rank: {"ready": 7} for rank in (0, 1, 2)})
    assert phase(seen(of=stuck), state, 199.0) is Phase.LOADING
    quiet, _ = look(seen(EVEN / 1e6, of=stuck), state, CONFIG, 205.0)
    assert quiet.phase is Phase.STALLED
    assert quiet.text == "version 7 is being loaded by rank 3, for 105 s already"
    assert phase(seen(of=stuck), state, 205.0) is Phase.PLANNING
    assert next_version(stuck, state) == 8


def test_a_refusal_is_told_with_its_reason_and_makes_patient():
    state = posted(State(), group(), 7, now=100.0)
    refusing = group(changes={2: {"refused": 7, "reason": "rank 2 is given 9 experts, its memory holds 3"}})
    verdict, state = look(seen(of=refusing), state, CONFIG, 102.0)
    assert verdict.phase is Phase.REFUSED
    assert verdict.text == "version 7 is refused by rank 2: rank 2 is given 9 experts, its memory holds 3"
    assert state.refusals == 1
    _, state = look(seen(of=refusing), state, CONFIG, 104.0)
    assert state.refusals == 1, "it is the same refusal"
    assert phase(seen(of=refusing), state, 155.0) is Phase.REFUSED
    assert phase(seen(of=refusing), state, 161.0) is Phase.PLANNING
    assert phase(seen(EVEN, of=refusing), state, 161.0) is Phase.BALANCED
    state = posted(state, group(), 8, now=161.0)
    _, state = look(seen(of=group(changes={2: {"refused": 8}})), state, CONFIG, 162.0)
    assert state.refusals == 2
    _, state = look(seen(of=renumbered(group(), 9)), posted(state, group(), 9, 300.0), CONFIG, 301.0)
    assert state.refusals == 0, "one was carried out"


def test_what_another_router_posted_is_waited_for_in_the_same_way():
    state = heard_of(State(), 7, now=100.0)
    assert phase(seen(), state, 110.0) is Phase.LOADING
    assert phase(seen(EVEN / 1e6), state, 205.0) is Phase.STALLED
    assert heard_of(state, 6, 120.0) == state


def test_a_rank_that_is_missing_is_waited_for_until_the_others_give_it_up():
    gone = group(changes={2: None})
    verdict, state = look(seen(of=gone), State(), CONFIG, 0.0)
    assert (verdict.phase, verdict.text) == (Phase.WAITING, "rank 2 of 4 not there")
    _, state = look(seen(), state, CONFIG, 0.0)
    survivors = {rank: {"members": [0, 1, 3]} for rank in (0, 1, 3)}
    verdict, state = look(seen(EVEN, of=group(changes={2: None} | survivors)), state, CONFIG, 1.0)
    assert verdict.phase is Phase.PLANNING
    assert verdict.urgent
    assert verdict.text == "experts are missing"


def test_survivors_that_have_helped_themselves_are_planned_for_once():
    _, state = look(seen(), State(), CONFIG, 0.0)
    helped = Placement(0, (((0, 1, 4), (2, 3, 5), (), (6, 7)),) * LAYERS)
    changes = {2: None} | {rank: {"members": [0, 1, 3]} for rank in (0, 1, 3)}
    left = group(helped, changes)
    verdict, state = look(seen(EVEN, of=left), state, CONFIG, 1.0)
    assert (verdict.phase, verdict.urgent, verdict.text) == (Phase.PLANNING, True, "rank 2 left")
    state = posted(state, left, 1, now=1.0)
    assert phase(seen(EVEN, of=left), state, 2.0) is Phase.LOADING
    carried_out = group(Placement(1, helped.layers), changes)
    assert not look(seen(EVEN, of=carried_out), state, CONFIG, 200.0)[0].urgent


def test_a_newcomer_is_given_experts_at_once_and_not_asked_for_twice():
    empty = [[] for _ in range(LAYERS)]
    helped = Placement(3, (((0, 1, 4), (2, 3, 5), (), (6, 7)),) * LAYERS)
    back = group(helped, {2: {"experts": empty}})
    verdict, state = look(seen(EVEN, of=back), State(), CONFIG, 0.0)
    assert (verdict.urgent, verdict.text) == (True, "rank 2 came and hold nothing")
    state = posted(state, back, 4, now=0.0)
    verdict, state = look(seen(EVEN, of=back), state, CONFIG, 5.0)
    assert verdict.phase is Phase.LOADING
    assert "version 4 is being loaded by ranks 0, 1, 2, 3" in verdict.text
    assert phase(seen(EVEN, of=back), state, 31.0) is Phase.PLANNING


def test_a_failure_to_plan_stays_said_and_is_tried_again():
    left = group(changes={2: None} | {rank: {"members": [0, 1, 3]} for rank in (0, 1, 3)})
    state = failed(State(), left, "8 experts do not fit", now=100.0)
    verdict, _ = look(seen(of=left), state, CONFIG, 110.0)
    assert verdict.phase is Phase.FAILED
    assert verdict.text == "experts are missing: 8 experts do not fit"
    assert phase(seen(of=left), state, 131.0) is Phase.PLANNING
    state = failed(State(), group(), "the planner was killed", now=100.0)
    assert phase(seen(), state, 110.0) is Phase.FAILED


# --- is it worth it --------------------------------------------------------------------------------------------------


def test_a_plan_is_judged_by_what_it_gains_on_counts_that_it_does_not_know():
    worth = judge(seen(), BETTER, BETTER, CONFIG, urgent=False)
    assert worth.worth
    assert worth.gain == pytest.approx(1 - 4_000 / 6_000)
    assert worth.num_moves == LAYERS * 2
    assert worth.load_s == pytest.approx(LAYERS * 1_000_000 / CONFIG.bytes_per_s)
    # What was uneven in the first half only was chance.
    noise = SKEWED.copy()
    noise[1] = EVEN[1]
    assert not judge(seen(noise), BETTER, BETTER, CONFIG, urgent=False).worth


def test_loading_that_takes_longer_than_it_saves_is_not_worth_it():
    slow = group(changes={0: {"fetch_bytes_per_s": 10_000.0}})
    judged = judge(seen(of=slow), BETTER, BETTER, CONFIG, urgent=False)
    assert judged.load_s == pytest.approx(200.0)
    assert not judged.worth
    assert "not worth it" in judged.text
    patient = CONFIG.model_copy(update={"horizon_s": 3_000.0})
    assert judge(seen(of=slow), BETTER, BETTER, patient, urgent=False).worth
    # Where experts take little of the time, little is saved.
    assert not judge(seen(of=slow, expert_share=0.1), BETTER, BETTER, patient, urgent=False).worth
    assert judge(seen(of=slow), BETTER, BETTER, CONFIG, urgent=True).worth


def test_the_present_placement_is_no_plan():
    same = contiguous(LAYERS, EXPERTS, RANKS, version=1)
    judged = judge(seen(), same, same, CONFIG, urgent=False)
    assert not judged.worth
    assert judged.text == "the best placement found is the present one"


def test_shares_alone_may_be_worth_changing():
    both = (((0, 1), (2, 3), (4, 5, 0), (6, 7)),) * LAYERS
    lopsided = Placement(0, both, (((1.0, 1), (1, 1), (1, 1, 0.0), (1, 1)),) * LAYERS)
    divided = Placement(1, both, (((0.5, 1), (1, 1), (1, 1, 0.5), (1, 1)),) * LAYERS)
    judged = judge(seen(of=group(lopsided)), divided, divided, CONFIG, urgent=False)
    assert judged.worth
    assert (judged.num_moves, judged.load_s) == (0, 0.0)


# --- balance ---------------------------------------------------------------------------------------------------------


def test_rank_loads_by_hand():
    placement = Placement(0, (((0, 1), (1,), (2,)),), (((1.0, 0.25), (0.75,), (1.0,)),))
    loads = np.array([[10.0, 40.0, 30.0]])
    assert rank_loads(placement, loads).tolist() == [[20.0, 30.0, 30.0]]
    dead = Placement(0, (((0, 1), (), (2,)),), (((1.0, 0.25), (), (1.0,)),))
    assert rank_loads(dead, loads).tolist() == [[50.0, 0.0, 30.0]]


def test_balance_by_hand():
    tokens = np.array([[30.0, 10.0, 99.0], [10.0, 10.0, 99.0]])
    ranks = Topology((Rank(1, speed=2.0), Rank(1), Rank(0)))
    found = balance(tokens, ranks)
    assert found.mean == pytest.approx((40 + 20) / 3)
    assert found.fullest == pytest.approx(15 + 10)
    assert found.balancedness == pytest.approx(0.8)
    assert balance(np.zeros((2, 3)), ranks).balancedness == 1.0

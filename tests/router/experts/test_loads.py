"""What ranks count becomes a load: nothing twice, nothing of an earlier life, and old load forgotten when it changed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.experts.loads import CountsError, Loads
from router.experts.windows import MAX_WINDOWS, Windows, differ
from workers.protocol.expert_messages import ExpertCounts

LAYERS, EXPERTS, RANKS, SLOTS = 2, 6, 3, 3


def counts(
    rank: int = 0, seq: int = 1, *, epoch: int = 1, version: int = 0, routed=None, computed=None, **more
):
    routed = np.ones((LAYERS, EXPERTS)) if routed is None else routed
    computed = np.ones((LAYERS, SLOTS)) if computed is None else computed
    return ExpertCounts(
        group="g",
        rank=rank,
        worker_id=f"w{rank}",
        epoch=epoch,
        seq=seq,
        seconds=1.0,
        version=version,
        steps=1,
        routed=np.asarray(routed, "<u4").tobytes(),
        computed=np.asarray(computed, "<u4").tobytes(),
        **more,
    )


def new_loads(window_s: float = 10.0, half_life_s: float = 1e12, enough: int = 0) -> Loads:
    loads = Loads(LAYERS, EXPERTS, RANKS, window_s=window_s, half_life_s=half_life_s, enough=enough)
    loads.placed(0)
    return loads


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_message_counts_at_most_once_whatever_the_network_does(data):
    """Messages of ranks that restart arrive in order, some twice, some never: the sum is that of those that arrived."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    loads = new_loads(half_life_s=1e15)
    wanted = np.zeros((LAYERS, EXPERTS))
    lost = 0
    for rank in range(RANKS):
        for epoch in range(data.draw(st.integers(1, 3))):
            began = False
            gap = 0
            for seq in range(1, data.draw(st.integers(1, 8)) + 1):
                message = counts(rank, seq, epoch=epoch, routed=rng.integers(0, 100, (LAYERS, EXPERTS)))
                fate = data.draw(st.sampled_from(["once", "twice", "never"]))
                if fate == "never":
                    gap += began
                    continue
                lost += gap
                gap, began = 0, True
                assert loads.take(message, 0.0)
                wanted += np.frombuffer(message.routed, "<u4").reshape(LAYERS, EXPERTS)
                if fate == "twice":
                    assert not loads.take(message, 0.0)
    assert np.array_equal(loads.routed(), wanted)
    assert loads.lost == lost


def test_an_earlier_life_of_a_rank_says_nothing_any_more():
    loads = new_loads()
    assert loads.take(counts(1, 9, epoch=5), 0.0)
    assert loads.take(counts(1, 1, epoch=6), 0.0)
    assert not loads.take(counts(1, 10, epoch=5), 0.0)
    assert loads.routed().sum() == 2 * LAYERS * EXPERTS
    assert loads.repeated == 1
    assert loads.lost == 0


def test_what_a_rank_computed_is_told_by_placement():
    loads = new_loads()
    loads.take(counts(0, 1, version=0, computed=[[3, 0, 1], [0, 0, 2]]), 0.0)
    assert loads.computed().tolist() == [[4, 0, 0], [2, 0, 0]]
    loads.placed(4)
    loads.take(counts(0, 2, version=0), 0.0)  # counted before the switch
    assert not loads.computed().any()
    loads.take(counts(2, 1, version=4, computed=[[5, 0, 0], [1, 1, 1]]), 0.0)
    assert loads.computed().tolist() == [[0, 0, 5], [0, 0, 3]]
    assert loads.tokens == [6 + LAYERS * SLOTS, 0, 8]
    loads.placed(4)
    assert loads.computed().any(), "it is the placement that it was"


def test_older_windows_weigh_less_and_memory_is_bounded():
    loads = new_loads(window_s=1.0, half_life_s=2.0)
    loads.take(counts(0, 1), 0.0)
    loads.take(counts(0, 2), 0.9)
    loads.take(counts(0, 3), 1.0)
    assert loads.routed()[0, 0] == pytest.approx(1 + 2 * 0.5**0.5)
    for second in range(500):
        loads.take(counts(0, second + 4), 2.0 + second)
    assert loads.routed()[0, 0] == pytest.approx(sum(0.5 ** (age / 2) for age in range(MAX_WINDOWS)))


def test_where_few_tokens_are_served_they_are_kept_for_longer():
    """Six tokens a second, and 960 are enough: they come together although eight half-lives pass meanwhile."""
    loads = new_loads(window_s=1.0, half_life_s=20.0, enough=960)
    for second in range(400):
        loads.take(counts(0, second + 1), float(second))
    assert loads.routed()[0].sum() > 960
    assert loads.changes == 0


def test_texts_that_come_one_after_the_other_do_not_make_it_forget_everything():
    loads = new_loads(window_s=1.0, enough=4_000)
    for turn in range(200):
        routed = np.zeros((LAYERS, EXPERTS))
        routed[:, turn // 10 % EXPERTS] = 100  # ten seconds of a text that uses one expert
        loads.take(counts(0, turn + 1, routed=routed), float(turn))
    assert loads.changes > 0
    assert loads.routed()[0].sum() >= 4_000


def test_a_change_of_load_is_noticed_once_two_windows_show_it_and_noise_is_not():
    rng = np.random.default_rng(1)
    before = rng.dirichlet(np.full(EXPERTS, 3.0), LAYERS)
    after = rng.dirichlet(np.full(EXPERTS, 3.0), LAYERS)
    loads = new_loads(window_s=1.0)

    def second(at: int, shares) -> None:
        routed = np.stack([rng.multinomial(5_000, layer) for layer in shares])
        loads.take(counts(0, at + 1, routed=routed), float(at))

    for at in range(40):
        second(at, before)
    assert loads.changes == 0
    second(40, after)
    second(41, before)  # a burst that is over again
    second(42, before)
    assert loads.changes == 0
    for at in range(43, 47):
        second(at, after)
    assert loads.changes == 1
    got = loads.routed()
    assert np.abs(got / got.sum(1, keepdims=True) - after).max() < 0.02


def test_counts_that_differ_by_chance_do_not_differ():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(64, 1.0), 4)
    for tokens in (100, 1_000, 100_000):
        for _ in range(20):
            one, two = (np.stack([rng.multinomial(tokens, p) for p in shares]) for _ in range(2))
            assert not differ(one, two)
    moved = np.roll(shares, 1, axis=1)
    assert differ(
        np.stack([rng.multinomial(10_000, p) for p in shares]),
        np.stack([rng.multinomial(10_000, p) for p in moved]),
    )
    assert not differ(np.zeros((4, 64)), np.ones((4, 64))), "nothing was counted: nothing can be said"


def test_the_halves_are_filled_in_turn_by_each_rank():
    loads = new_loads()
    for rank in range(RANKS):
        for seq in range(1, 5):
            loads.take(counts(rank, seq), 0.0)
    one, two = loads.halves()
    assert one.sum() == two.sum() == 2 * RANKS * LAYERS * EXPERTS


def test_the_share_of_time_spent_in_experts_is_that_of_the_busiest_rank():
    loads = new_loads()
    assert loads.expert_share() is None
    loads.take(counts(0, 1, expert_s=0.2), 0.0)
    loads.take(counts(1, 1, expert_s=0.6), 0.0)
    assert loads.expert_share() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (counts(3), "rank 3 .* ranks 0 to 2"),
        (
            counts(0, routed=np.ones((LAYERS, EXPERTS + 1))),
            "`routed` has 56 bytes; 2 layers of 6 experts take 48",
        ),
        (counts(0, computed=np.ones(3)), "`computed` has 12 bytes, which 2 layers can't share"),
    ],
)
def test_counts_of_another_shape_are_refused(message, told):
    loads = new_loads()
    with pytest.raises(CountsError, match=told):
        loads.take(message, 0.0)
    assert not loads.routed().any()


def test_windows_without_counts_are_zero():
    windows = Windows(2, 3, 4, window_s=1.0, half_life_s=1.0, enough=1)
    assert not windows.total(lambda window: window.computed).any()

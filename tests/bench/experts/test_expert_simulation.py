"""The simulation of a pool under drifting load: its arithmetic by hand, its policies by what they must do."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bench.experts.simulate import main
from bench.experts.simulate.command import POLICIES
from bench.experts.simulate.machine import Machine, Model, StepCost, Work
from bench.experts.simulate.policies import Change, Eplb, Even, Live, Pool, Static
from bench.experts.simulate.run import computed, simulate
from bench.experts.simulate.scenarios import (
    DOMAINS,
    ScenarioError,
    bursty,
    drifting,
    olmoe_domains,
    scenarios,
    steady,
    switching,
    zipf,
)
from router.config import ExpertsConfig
from tests.bench.simulate.test_traces import TRACES
from workers.protocol.experts import Placement, contiguous

OLMOE = TRACES / "moe" / "olmoe"
MODEL = replace(Model(), layers=3, drawn=3, experts=32)
POOL = Pool(StepCost(MODEL, Machine(), Work(ranks=4, batch=64)), slots=9)
CONFIG = ExpertsConfig(window_s=2.0, pause_s=4.0, half_life_s=20.0, interval_s=1.0)


def domains(seed: int = 0) -> np.ndarray:
    """Six domains in which other experts are popular."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(MODEL.experts, 0.5), (6, MODEL.layers))


def outcome(policy, popularity, seconds: float = 40.0, seed: int = 0):
    return simulate(POOL.cost, POOL.first, policy, popularity, seconds, 1.0, seed)


def test_a_step_by_hand():
    model = Model(
        layers=1,
        drawn=1,
        dense_layers=0,
        experts=2,
        top_k=1,
        hidden=10,
        intermediate=100,
        kv_bytes=4,
        attention_bytes=0,
    )
    machine = Machine(1e6, 1.0, 1e6, 1.0, dispatch_bytes_per_s=1e5, combine_bytes_per_s=1e5)
    cost = StepCost(model, machine, Work(ranks=2, batch=10, context=50))
    # KV of 10 * 50 tokens of 4 bytes, and the shared expert's 3,000 bytes.
    assert cost.fixed_s == pytest.approx((2_000 + 3_000) / 1e6)
    tokens, reads = np.array([[15.0, 5.0]]), np.array([[1.0, 2.0]])
    experts = 15 * 6_000 / 1e6 + 1 * 3_000 / 1e6
    exchange = 15 * (10 + 20) / 1e5
    assert cost.step_s(tokens, reads) == pytest.approx(0.005 + experts + exchange)
    assert cost.step_s(tokens, reads, network_share=0.5) == pytest.approx(0.005 + experts + 2 * exchange)
    hidden = StepCost(model, replace(machine, overlap=1.0), cost.work)
    assert hidden.step_s(tokens, reads) == pytest.approx(0.005 + experts)
    assert cost.step_s(np.array([[10.0, 10.0]]), reads) < cost.step_s(tokens, reads)


def test_drawn_layers_stand_for_all_of_them():
    few, many = StepCost(Model(drawn=2), Machine(), Work()), StepCost(Model(), Machine(), Work())
    tokens = np.tile(np.linspace(900.0, 1_100.0, 64), (58, 1))
    reads = np.full((58, 64), 4.0)
    assert few.step_s(tokens[:2], reads[:2]) == pytest.approx(many.step_s(tokens, reads))
    pool = Pool(few, 5)
    ranks = pool.first.layers[0]
    swapped = Placement(1, (ranks, (ranks[1], ranks[0], *ranks[2:])))
    assert pool.load_s(pool.first, swapped, 0.5) == pytest.approx(29 * 4 * Model().expert_bytes / 25e9)


def test_deepseek_v3_in_eight_bits_has_the_size_that_is_published():
    model = Model()
    routed = (model.experts + 1) * model.layers * model.expert_bytes
    other = (
        model.layers + model.dense_layers
    ) * model.attention_bytes + model.dense_layers * model.dense_bytes
    embeddings = 2 * 129_280 * model.hidden
    assert routed + other + embeddings == pytest.approx(671e9, rel=0.005)


def test_what_ranks_compute_and_read():
    placement = Placement(0, (((0, 1), (1, 2)),), (((1.0, 0.25), (0.75, 1.0)),))
    tokens, reads = computed(placement, np.array([[8.0, 4.0, 0.0]]))
    assert tokens.tolist() == [[9.0, 3.0]]
    assert reads.tolist() == [[2.0, 1.0]]


def test_the_same_seed_gives_the_same_result():
    load = switching(domains(), 10.0)
    one, two = outcome(Live(POOL, CONFIG), load), outcome(Live(POOL, CONFIG), load)
    assert one == two
    assert outcome(Live(POOL, CONFIG), load, seed=1) != one


def test_live_rebalancing_follows_a_change_of_load_and_moves_less_than_eplb():
    load = switching(domains(), 20.0)
    static, even = outcome(Static(), load, 60.0), outcome(Even(), load, 60.0)
    live = outcome(Live(POOL, CONFIG), load, 60.0)
    eplb = outcome(Eplb(POOL, interval=600, window=300, background=True), load, 60.0)
    assert static.tokens_per_s < 0.9 * even.tokens_per_s
    assert live.tokens_per_s > 0.9 * even.tokens_per_s
    assert live.stalled_s == 0
    assert live.changes >= 3
    assert live.moves / live.changes < eplb.moves / eplb.changes
    # At the end of each load it has been caught up with.
    for end in (19, 39, 59):
        assert live.frames[end].balancedness > 0.95 * even.frames[end].balancedness


def test_a_steady_load_is_placed_for_and_then_left_alone():
    live = outcome(Live(POOL, CONFIG), steady(domains()), 60.0)
    assert live.changes <= 2
    assert live.frames[-1].balancedness > 0.93


def test_eplb_that_stops_serving_loses_the_time_of_the_slowest_load():
    eplb = Eplb(POOL, interval=100, window=100)
    counts = np.random.default_rng(0).integers(1, 1000, (MODEL.layers, MODEL.experts)).astype(float)
    assert eplb.after(1.0, 60.0, counts) is None
    change = eplb.after(2.0, 60.0, counts)
    assert isinstance(change, Change)
    most = POOL.load_s(POOL.first, change.placement, 1.0)
    assert change.stall_s == pytest.approx(most)
    assert change.load_s == 0
    assert most <= MODEL.layers * POOL.slots * MODEL.expert_bytes / POOL.cost.machine.network_bytes_per_s
    stopping = outcome(Eplb(POOL, interval=1_000, window=500), steady(domains()))
    assert stopping.stalled_s > 0
    assert min(frame.tokens_per_s for frame in stopping.frames) < stopping.tokens_per_s


def test_eplb_forgets_what_is_older_than_its_window():
    eplb = Eplb(POOL, interval=100, window=50)
    old, new = np.ones((MODEL.layers, MODEL.experts)), np.ones((MODEL.layers, MODEL.experts))
    old[:, 0], new[:, 5] = 1e6, 1e6
    eplb.after(1.0, 50.0, old)
    change = eplb.after(2.0, 50.0, new)
    copies = [sum(5 in rank for rank in layer) for layer in change.placement.layers]
    assert min(copies) == 4
    assert all(sum(0 in rank for rank in layer) == 1 for layer in change.placement.layers)


def test_popularity_of_every_kind_is_a_distribution_and_changes_as_it_should():
    given = domains()
    for load in (steady(given), drifting(given, 100.0), switching(given, 10.0), bursty(given, 100.0)):
        for second in (0.0, 3.0, 55.0, 130.0):
            assert load(second).sum(axis=1) == pytest.approx(np.ones(MODEL.layers))
    assert np.allclose(steady(given)(0.0), steady(given)(99.0))
    assert np.allclose(switching(given, 10.0)(5.0), switching(given, 10.0)(9.9))
    assert not np.allclose(switching(given, 10.0)(5.0), switching(given, 10.0)(10.1))
    assert np.allclose(bursty(given, 100.0)(30.0), bursty(given, 100.0)(170.0))
    assert not np.allclose(bursty(given, 100.0)(130.0), bursty(given, 100.0)(170.0))
    law = zipf(2, 64, 1.0, 1.0, seed=0)
    first, later = law(0.0), law(200.0)
    assert np.allclose(np.sort(first), np.sort(later))
    assert np.corrcoef(first[0], later[0])[0, 1] < 0.9


@pytest.mark.skipif(not OLMOE.is_dir(), reason="without the traces")
def test_layers_made_of_olmoe_keep_its_skew_and_its_domains():
    found = olmoe_domains(OLMOE, 6, 256, seed=0)
    assert found.shape == (len(DOMAINS), 6, 256)
    assert found.sum(axis=2) == pytest.approx(np.ones((len(DOMAINS), 6)))
    counts = np.load(OLMOE / "olmoe__expert_counts__github.npz")["a"]
    skew = (counts.max(axis=1) / counts.mean(axis=1)).tolist()
    hottest = found[DOMAINS.index("github")].max(axis=1) * 256
    assert min(skew) - 0.01 <= hottest.min() <= hottest.max() <= max(skew) + 0.01
    names = [name for name, _ in scenarios(6, 256, 60.0, 0, OLMOE)]
    assert len(names) == 5
    with pytest.raises(ScenarioError, match="--olmoe names the folder"):
        olmoe_domains(OLMOE / "nowhere", 6, 256, seed=0)


def test_the_command(tmp_path, capsys):
    common = ["--minutes", "0.3", "--ranks", "4", "--layers", "2", "--experts", "16", "--processes", "2"]
    main([*common, "--policies", "static,live,even", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "experts-simulate.json").read_text())
    assert [row["policy"] for row in found["rows"]] == ["static", "Headrace, live", "even (bound)"]
    assert found["rows"][-1]["of_even"] == 1.0
    assert found["parameters"]["model"]["hidden"] == 7168
    assert "| Zipf, drifting | Headrace, live |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "5", "--experts", "16"], "16 are not the same number on each of 5 ranks"),
        (["--policies", "static,magic"], f"there is no 'magic'; there are {', '.join(POLICIES)}"),
        (["--drawn", "59"], "--drawn is 59; allowed is 1 to 58, all layers"),
        (["--overlap", "2"], "--overlap is 2.0; allowed is 0 to 1"),
        (["--scenarios", "nothing"], "none is named like 'nothing'"),
        (["--olmoe", "nowhere"], "olmoe__expert_counts__arxiv.npz is missing"),
    ],
)
def test_what_the_command_refuses(arguments, told, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err


def test_the_first_placement_is_the_one_that_ranks_start_with():
    assert POOL.first == contiguous(MODEL.layers, MODEL.experts, 4)

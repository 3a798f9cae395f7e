"""The cheapest pools: held to exhaustive search, to what more workers and more load must do, and to their reasons."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan_view import main
from cluster.planner.estimate import Pools, estimate
from cluster.planner.profile import Profile, ProfileError, between, fit_decode, splitwise
from cluster.planner.search import Costs, search
from cluster.planner.slo import Slo
from cluster.planner.trace import Trace, TraceRequest
from cluster.planner.workload import Workload, of_trace, prefix_hits
from tests.cluster.test_planner_queueing import PROFILE

SLO = Slo(1.0, 0.03)


@settings(max_examples=15, deadline=None)
@given(
    rate=st.floats(0.5, 30),
    prompt=st.integers(16, 3000),
    output=st.integers(1, 400),
    prices=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 3.0, 2.0), (4.0, 1.0, 2.5)]),
)
def test_nothing_cheaper_keeps_the_slo(
    rate: float, prompt: int, output: int, prices: tuple[float, float, float]
) -> None:
    workload, most, costs = Workload.uniform(rate, prompt, output), 4, Costs(*prices)
    found = search(workload, PROFILE, SLO, max_workers=most, costs=costs)
    candidates = [Pools(p, d) for p, d in itertools.product(range(most + 1), range(1, most + 1))]
    good = [pools for pools in candidates if estimate(workload, PROFILE, pools, SLO, 0.99).ok]
    if not good:
        assert found.best is None
        assert any(one.shortfalls for one in found.smaller)
        return
    assert found.best is not None
    assert costs.of(found.best.pools) == pytest.approx(min(map(costs.of, good)))
    assert all(one.shortfalls for one in found.smaller)  # one worker fewer never does


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(0.5, 20), more=st.floats(1.05, 3), prompt=st.integers(16, 3000))
def test_more_load_needs_no_fewer_workers(rate: float, more: float, prompt: int) -> None:
    less = search(Workload.uniform(rate, prompt, 100), PROFILE, SLO).split
    much = search(Workload.uniform(rate * more, prompt, 100), PROFILE, SLO).split
    if much is not None:
        assert less is not None
        assert less.pools.prefill <= much.pools.prefill
        assert less.pools.decode <= much.pools.decode


def limits(workload: Workload, profile: Profile, pools: Pools, slo: Slo = SLO) -> list[str]:
    return [s.limit for s in estimate(workload, profile, pools, slo, 0.99).shortfalls]


def test_each_limit_is_named() -> None:
    busy = Workload.uniform(20.0, 800, 100)
    assert limits(busy, PROFILE, Pools(2, 4)) == ["prefill queue"]  # more comes than is read
    assert limits(busy, PROFILE, Pools(3, 4), Slo(0.15, 0.03)) == ["prefill queue"]  # it is read, but late
    assert limits(busy, PROFILE, Pools(8, 1), Slo(1.0, 0.015)) == ["decode batch"]
    assert limits(Workload.uniform(20.0, 800, 800), PROFILE, Pools(8, 2)) == ["decode batch"]
    assert limits(busy, replace(PROFILE, kv_tokens=6_000), Pools(8, 2)) == ["KV capacity"]
    assert limits(busy, replace(PROFILE, kv_tokens=700), Pools(8, 2)) == ["KV capacity"]
    assert limits(Workload.uniform(0.1, 4096, 10), PROFILE, Pools(9, 9), Slo(0.2)) == ["prefill time"]
    assert limits(busy, PROFILE, Pools(9, 9), Slo(1.0, 0.005)) == ["decode time"]
    slow = replace(PROFILE, kv_bytes_per_token=10_000, transfer_bytes_per_s=1e7)
    assert limits(busy, slow, Pools(8, 4)) == ["transfer"]  # the link is full
    wire = replace(PROFILE, kv_bytes_per_token=10_000, transfer_bytes_per_s=7e6)
    assert limits(Workload.uniform(0.1, 800, 9), wire, Pools(8, 4)) == ["transfer"]  # it is only slow


def test_queue_wait_is_part_of_it() -> None:
    """Enough to read all prompts is not enough to read them in time."""
    workload = Workload.uniform(18.0, 800, 100)
    found = search(workload, PROFILE, Slo(0.3, 0.03)).split
    assert found is not None
    by_throughput = math.ceil(18.0 * PROFILE.prefill_s(800))
    assert found.pools.prefill > by_throughput


def test_cached_prompts_and_unified_workers() -> None:
    cold = search(Workload.uniform(20.0, 2000, 50), PROFILE, SLO).split
    warm = search(Workload.uniform(20.0, 2000, 50, hit_rate=0.9), PROFILE, SLO).split
    assert cold is not None
    assert warm is not None
    assert warm.pools.prefill < cold.pools.prefill
    alone = search(Workload.uniform(0.05, 100, 20), PROFILE, SLO).best
    assert alone is not None
    assert alone.pools == Pools(0, 1)  # one worker, where a split cluster needs two


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"share": 1.0}, "share is 1"),
        ({"max_workers": 0}, "max workers"),
        ({"slo": Slo(e2e_s=3.0)}, "e2e can't be planned"),
    ],
)
def test_what_cannot_be_searched_is_refused(change: dict[str, object], told: str) -> None:
    asked = {"slo": SLO} | change
    with pytest.raises(ValueError, match=told):
        search(Workload.uniform(1.0, 10, 10), PROFILE, **asked)  # type: ignore[arg-type]


# --- traces and profiles ----------------------------------------------------------------------------------------------


def test_hits_are_what_a_cache_would_have() -> None:
    trace = Trace(
        (
            TraceRequest(0, 30, 1, (1, 2, 3)),
            TraceRequest(1, 25, 1, (1, 2, 4)),
            TraceRequest(2, 10, 1, (2,)),
            TraceRequest(3, 30, 1, (1, 2, 3)),
        ),
        block_tokens=10,
    )
    assert prefix_hits(trace, None) == [0, 20, 10, 30]
    assert prefix_hits(trace, 30) == [0, 20, 10, 20]  # 3 was evicted by 4, its chain's last block first
    workload = of_trace(trace, window_s=100)
    assert workload.shapes[0].cached_tokens <= workload.shapes[0].prompt_tokens - 1


def test_the_busiest_time_counts() -> None:
    quiet = [TraceRequest(float(second), 100, 10) for second in range(0, 1000, 10)]
    rush = [TraceRequest(500 + 0.1 * number, 100, 10) for number in range(1, 300)]
    found = of_trace(Trace(tuple(sorted(quiet + rush, key=lambda r: r.at_s))), window_s=20)
    assert found.prefill_rate == pytest.approx(10.0, rel=0.05)
    assert "busiest 20 s" in found.notes[0]


def test_a_fit_finds_the_line_it_was_made_of() -> None:
    steps = [
        (batch, context, 0.01 + 0.0005 * batch + 3e-7 * batch * context)
        for batch in (1, 4, 16)
        for context in (64, 512)
    ]
    points, slope = fit_decode(steps)
    assert slope == pytest.approx(3e-7)
    assert [seconds for _, seconds in points] == pytest.approx([0.0105, 0.012, 0.018])
    assert between(points, 10) == pytest.approx(0.015)
    assert between(points, 28) == pytest.approx(0.024)  # on beyond the last


def test_a_larger_batch_is_never_faster() -> None:
    points, _ = fit_decode([(1, 64, 0.02), (2, 64, 0.015), (4, 64, 0.03)])
    assert [seconds for _, seconds in points] == [0.02, 0.02, 0.03]


def test_splitwise_rows(tmp_path: Path) -> None:
    path = tmp_path / "perf_model.csv"
    path.write_text(
        "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
        "m,h,512,1,128,50,20,8\nm,h,1024,1,128,90,21,8\nm,h,512,4,128,190,24,8\nm,h,512,1,128,70,20,4\n"
    )
    profile = splitwise(path, "m", "h", 8, {"kv_tokens": 10_000})
    assert profile.prefill == ((512.0, 0.05), (1024.0, 0.09))
    assert profile.step_s(1, 512 + 64) == pytest.approx(0.02)
    assert profile.step_s(1, 1024 + 64) == pytest.approx(0.021)
    assert profile.step_s(4, 512 + 64) == pytest.approx(0.024)
    with pytest.raises(ProfileError, match="it has m h 4; m h 8"):
        splitwise(path, "m", "h", 2, {"kv_tokens": 1})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "no field"),
        ("{", "not JSON"),
        ('{"speed": 1}', "speed is no field"),
        ('{"prefill": [[1, 1]]}', "is missing"),
        ('{"prefill": [[1, 1]], "decode": [], "context_s": 0, "kv_tokens": 1}', "decode is empty"),
        ('{"prefill": [[2, 1], [1, 1]], "decode": [[1, 1]], "context_s": 0, "kv_tokens": 1}', "ascending"),
        ('{"prefill": [[2, 1]], "decode": [[1, 1]], "context_s": 0, "kv_tokens": 0}', "kv_tokens is 0"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, told: str) -> None:
    with pytest.raises(ProfileError, match=told):
        Profile.from_json(text)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile_file(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(PROFILE.to_json().replace("Infinity", "1e12"))
    return str(path)


def test_the_command_plans(profile_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--profile", profile_file, "--rate", "18", "--prompt-tokens", "800", "--output-tokens", "100"]
    assert main([*load, "--slo", "ttft=0.3,tpot=0.03"]) == 0
    shown = capsys.readouterr().out
    assert "keeps ttft ≤ 0.3 s, tpot ≤ 0.03 s" in shown
    assert "prefill queue: TTFT p99" in shown
    assert main([*load, "--slo", "ttft=0.3,tpot=0.03", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pools = found["best"]["pools"]
    assert {(one["pools"]["prefill"], one["pools"]["decode"]) for one in found["smaller"]} <= {
        (pools["prefill"] - 1, pools["decode"]),
        (pools["prefill"], pools["decode"] - 1),
    }
    assert found["best"]["ttft_s"]["p99"] <= 0.3
    assert main([*load, "--slo", "tpot=0.001"]) == 1  # nothing can
    assert "decode time" in capsys.readouterr().out


def test_the_command_plans_a_trace_on_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(
        f'{{"timestamp": {100 * n}, "input_length": 600, "output_length": 20, "hash_ids": [0, {n}]}}\n'
        for n in range(1, 200)
    )
    (tmp_path / "trace.jsonl").write_text(rows)
    (tmp_path / "p.csv").write_text(
        "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
        "m,h,512,1,128,50,20,8\nm,h,1024,1,128,90,21,8\nm,h,512,4,128,190,24,8\n"
    )
    table = ["--profile", str(tmp_path / "p.csv"), "--splitwise", "m,h,8"]
    options = ["--trace", str(tmp_path / "trace.jsonl"), "--window", "10", "--json"]
    assert main([*table, *options]) == 2
    assert "--kv-tokens is missing" in capsys.readouterr().err
    assert main([*table, *options, "--kv-tokens", "50000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["prefill_rate"] == pytest.approx(10.0, rel=0.1)
    assert "84.9% of prompt tokens hit" in found["workload"]["notes"][0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--rate", "1"], "--prompt-tokens is missing"),
        (["--rate", "1", "--prompt-tokens", "5", "--output-tokens", "0"], "both must be 1 or more"),
        (
            ["--rate", "1", "--prompt-tokens", "5", "--output-tokens", "2", "--prefix-hit-rate", "1"],
            "prefix hit rate is 1",
        ),
        (["--rate", "1", "--trace", "x"], "--speedup"),
        (["--trace", "/nowhere"], "can't be read"),
    ],
)
def test_the_command_says_what_is_wrong(
    profile_file: str, given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--profile", profile_file, *given]) == 2
    assert told in capsys.readouterr().err


def test_a_worker_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from workers.models.random_model import write_random_model

    model = write_random_model(tmp_path / "tiny", {"max_position_embeddings": 512})
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    settings_given = ["--set", f"model.name={model}", "--set", "engine.num_blocks=64"]
    settings_given += ["--set", "engine.kernels=torch"]  # the cache is empty: others would be compiled
    settings_given += [
        "--set",
        "engine.num_threads=1",
        "--set",
        "engine.max_num_seqs=4",
        "--set",
        "engine.dtype=float32",
    ]
    assert main(settings_given) == 2
    assert "add --measure" in capsys.readouterr().err
    assert main(["--measure", *settings_given]) == 0
    measured = Profile.from_json(capsys.readouterr().out)
    assert [batch for batch, _ in measured.decode] == [1, 2, 4]
    assert measured.prefill[0][0] == 64
    assert measured.kv_tokens == 64 * 16
    assert main(settings_given) == 0
    assert Profile.from_json(capsys.readouterr().out) == measured

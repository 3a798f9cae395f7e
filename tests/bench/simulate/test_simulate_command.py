"""The command line, the experiment, and the oracle."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.simulate.commands import main
from bench.simulate.comparison import markdown, plot, verdicts
from bench.simulate.jobs import Asked, Job
from bench.simulate.outcome import least_ttfts_s
from bench.simulate.router import Attempt, Router, longest
from bench.simulate.timeline import Timeline
from bench.simulate.worker import Limits, Worker
from tests.bench.simulate.clusters import BLOCK, COST, config, simulate, trace

SMALL = ["--sessions", "6", "--requests", "20", "--workers", "2"]


def test_a_run_leaves_json_and_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name in ("a.json", "b.json"):
        main(["run", *SMALL, "--load", "0.5", "--json", str(tmp_path / name)])
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    found = json.loads(written[0])
    assert found["requests"] == {"finished": 20}
    assert found["offered_per_s"] == pytest.approx(0.5 * found["capacity_per_s"], abs=1e-5)
    assert set(found["ttft_s"]) == {"mean", "p50", "p90", "p99", "max"}
    assert len(found["over_time"]["line"]) == len(found["over_time"]["at_s"]) > 1
    assert '"policy": "cost"' in capsys.readouterr().out


def test_what_depends_on_the_machine_is_asked_for(tmp_path: Path) -> None:
    main(["run", *SMALL, "--rate", "5", "--timings", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["measured"]["decisions"] >= 20
    assert found["measured"]["index_mib"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "best"], "policy 'best' is not known"),
        (["--load", "-1"], "--load -1.0: it must be above 0"),
        (["--fault", "flood,1,1"], "--fault flood,1,1"),
        (["--prefill", "2"], "--prefill needs --decode"),
        (["--workers", "0"], "decode is 0"),
        (["--set", "cache_credit"], "--set cache_credit: it must be NAME=VALUE"),
        (["--set", "cache_credit=7"], "cache_credit"),
        (["--kv-tokens", "1000"], "--kv-tokens 1000"),
        (["--index-loss", "2"], "loss is 2.0"),
        (["--table", "none.csv"], "give the table with --table"),
    ],
)
def test_a_mistake_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *SMALL, *arguments])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_policies_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sizes", "2", "--per-worker", "15", "--loads", "0.5,0.9", "--processes", "1"]
    main(["policies", *options, "--policies", "cost,round_robin,oracle", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "policies.json").read_text())
    assert [(row["split"], row["load"], row["policy"]) for row in found["rows"]] == [
        (split, load, policy)
        for split in (True, False)
        for load in (0.5, 0.9)
        for policy in ("cost", "round_robin", "oracle")
    ]
    table = (tmp_path / "policies.md").read_text()
    assert table == markdown(found)
    assert "**sessions, 1 P + 1 D**: 30 requests" in table
    parts = []
    for split in (True, False):  # as if it had been run in two pieces
        part = tmp_path / f"{split}.json"
        part.write_text(json.dumps({"rows": [row for row in found["rows"] if row["split"] == split]}))
        parts.append(str(part))
    main(["together", *parts, "--out", str(tmp_path / "both")])
    assert (tmp_path / "both" / "policies.md").read_text() == table
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(SystemExit):
        main(["together", str(tmp_path / "bad.json")])
    assert "must be the policies.json of a run" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    plot(found, [])


def row(policy: str, p99: float, load: float = 0.5, seed: int = 0) -> dict[str, Any]:
    place = {"trace": "t", "workers": 8, "split": False, "load": load, "policy": policy, "seed": seed}
    hits = {"hits": 0.3, "of_oracle": 0.97, "own_of_oracle": 0.9}
    return place | hits | {"ttft_p99_s": p99, "least_ttft_p99_s": 0.5}


def test_a_verdict_compares_with_the_best_of_the_others_and_not_with_the_oracle() -> None:
    rows = [
        row("cost", 2.0),
        row("round_robin", 5.0),
        row("random", 3.0),
        row("oracle", 1.0),
        row("cost", 1.0, 0.9),
    ]
    (verdict,) = verdicts(rows)
    assert verdict["best"] == "random"
    assert verdict["best_over_ours"] == [1.5]
    assert verdict["round_robin_over_ours"] == [2.5]
    assert verdict["round_robin_over_least"] == [10.0]
    assert verdict["of_oracle"] == 0.97


def test_ratios_are_taken_seed_by_seed() -> None:
    rows = [
        row(policy, seconds[seed], seed=seed)
        for policy, seconds in {"cost": (1, 10, 3), "round_robin": (2, 20, 9), "random": (1.1, 9, 6)}.items()
        for seed in range(3)
    ]
    (verdict,) = verdicts(rows)
    assert verdict["round_robin_over_ours"] == [2.0, 2.0, 3.0]
    assert (verdict["best"], verdict["best_over_ours"]) == ("random", [1.1, 0.9, 2.0])
    assert verdict["ttft_p99_s"] == 3


def test_the_longest_prefix_by_looking_at_every_block() -> None:
    rng = random.Random(5)
    limits = Limits(num_blocks=30, block_size=BLOCK, max_num_seqs=8, max_num_batched_tokens=512)
    timeline = Timeline()
    worker = Worker(
        "w", 1, "decode", timeline, COST, limits, on_cache=lambda worker: None, on_room=lambda worker: None
    )
    chains = [[rng.randbytes(16) for _ in range(12)] for _ in range(4)]
    mixed = [chain[: rng.randint(1, 12)] for chain in chains for _ in range(3)]
    from bench.simulate.worker import Seq

    for number, hashes in enumerate(mixed):
        job = Job(number, Asked(0.0, len(hashes) * BLOCK + 1, 1, tuple(hashes)), BLOCK)
        worker.add(Seq(job, BLOCK, timeline.now))
        timeline.run(lambda: True)
        held = {block_hash for block_hash, _ in worker.pool.cached_hashes()}
        for chain in chains:
            depth = 0
            while depth < len(chain) and chain[depth] in held:
                depth += 1
            for known in range(13):
                assert longest(worker, chain, known) == max(depth, known)


@pytest.mark.parametrize("shape", [{"decode": 3}, {"prefill": 2, "decode": 2}], ids=str)
@pytest.mark.parametrize("fetching", [False, True])
def test_the_oracle_by_brute_force(
    shape: dict[str, int], fetching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says at each placement, against all caches walked through block by block."""
    asked = Router._ask_oracle
    seen = []

    def checked(self: Router, attempt: Attempt) -> None:
        asked(self, attempt)
        job = attempt.job
        usable = job.prompt_hashes[: (job.known_tokens - 1) // BLOCK]
        best = {"prefill": 0, "decode": 0}
        for link in self.links.values():
            held = {block_hash for block_hash, _ in link.worker.pool.cached_hashes()}
            depth = next((at for at, name in enumerate(usable) if name not in held), len(usable))
            best[link.worker.role] = max(best[link.worker.role], depth * BLOCK)
        alone = job.known_tokens - best["decode"] <= attempt.choice.local_prefill_max
        expected = max(best.values()) if fetching or alone else best["prefill"]
        seen.append(expected)
        assert job.oracle_tokens == expected

    monkeypatch.setattr(Router, "_ask_oracle", checked)
    cluster = simulate(config(fetching=fetching, num_blocks=80, **shape), trace())
    assert len(seen) == len(cluster.jobs)
    assert any(seen)


@pytest.mark.parametrize("shape", [{"decode": 2}, {"prefill": 1, "decode": 1}], ids=str)
@pytest.mark.parametrize("policy", ["cost", "oracle"])
def test_no_placement_is_better_than_the_least_possible(shape: dict[str, int], policy: str) -> None:
    # Turns one after the other, so that the order of the trace is that in which they come.
    asked = [dataclasses.replace(one, at_s=float(n), after=None) for n, one in enumerate(trace())]
    cluster = simulate(config(**shape, policy=policy, num_blocks=5000), asked)
    least = least_ttfts_s(asked, cluster.config)
    assert all(job.ttft_s >= seconds - 1e-9 for job, seconds in zip(cluster.jobs, least, strict=True))
    assert any(job.ttft_s < 1.5 * seconds for job, seconds in zip(cluster.jobs, least, strict=True))

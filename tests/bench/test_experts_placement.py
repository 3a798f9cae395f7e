"""The benchmark of placements: its cells, its loads, and that its report holds what was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.experts.placement import anew, command, loads, onward
from router.experts.topology import uniform


def test_cells_cover_what_is_asked_and_suit_eplb() -> None:
    cells = list(anew.cells())
    assert {experts for experts, _, _ in cells} == set(anew.EXPERTS)
    for experts, ranks, slots in cells:
        assert ranks * slots - experts in anew.REDUNDANT
        assert 8 <= ranks <= 320
    assert len(cells) == len(set(cells)) > 60


def test_synthetic_loads_are_what_their_names_say() -> None:
    hot = loads.synthetic("zipf 1.2", 2, 64)
    flat = loads.synthetic("zipf 0.4", 2, 64)
    assert hot.shape == (2, 64)
    assert (hot.max(axis=1) / hot.mean(axis=1)).min() > 2 * (flat.max(axis=1) / flat.mean(axis=1)).max()
    assert np.array_equal(hot, loads.synthetic("zipf 1.2", 2, 64))
    bursts = loads.synthetic("bursty", 1, 64)
    assert (bursts > 1.21e6).sum() >= 1  # above what Zipf gives anybody


def test_missing_counts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as told:
        command.main(["--olmoe", str(tmp_path), "--only", "changes", "--out", str(tmp_path / "out")])
    assert "olmoe__expert_counts__arxiv.npz is missing" in str(told.value)
    with pytest.raises(SystemExit):
        command.main(["--only", "speed"])
    assert "there is no 'speed'; there are anew, optima" in capsys.readouterr().err


def test_a_change_of_domain_is_mended_by_few_moves(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    measured = {name: random.pareto(2.0, (2, 24)) * 1e4 + 1e3 for name in ("one", "other")}
    rows = {(row["what"], row["shares"]): row for row in onward.changes_of_domain(measured, 4, 8)}
    left = rows["moves of a layer: nothing is moved", "any"]
    few = rows["moves of a layer: 8", "any"]
    anew_ = rows["EPLB anew", "equal"]
    assert left["moves"] == 0
    assert left["mean"] < few["mean"]
    assert few["moves"] <= 8 < anew_["moves"]


def test_over_time_a_plan_follows_the_load() -> None:
    drift = {"drift": onward.synthetic_drift(1, 32)}
    rows = {row["policy"]: row for row in onward.over_time(drift, uniform(4, 9), 1)}
    assert rows["headrace"]["mean"] > rows["as it was"]["mean"]
    assert rows["headrace"]["moves"] < rows["EPLB"]["moves"] / 3

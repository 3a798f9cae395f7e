"""Cost models: what they say, how they are fitted, read and refused."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy
import pytest

from bench.simulate.cost import CostError, StepCost, non_decreasing
from bench.simulate.defaults import H100_LLAMA2_70B
from bench.simulate.fit import Step, errors, figures, fit, simulate, small_load
from bench.simulate.least_squares import fit_positive
from bench.simulate.perf_table import read_table
from bench.simulate.worker import Limits
from tests.bench.simulate.clusters import COST
from tests.bench.simulate.test_traces import TRACES

TABLE = TRACES / "splitwise" / "perf_model.csv"
HEADER = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


def test_a_step_is_the_sum_of_its_parts_and_reads_the_weights_once() -> None:
    assert COST.step_s(16, 0, 0, 0) == 0.004
    assert COST.step_s(72, 0, 0, 0) == pytest.approx(0.007)  # half way between two points
    assert COST.step_s(240, 0, 0, 0) == pytest.approx(0.016)  # beyond the last
    assert COST.step_s(16, 100, 0, 0) == pytest.approx(0.004 + 1e-5)
    assert COST.step_s(0, 0, 3, 1000) == pytest.approx(0.005 + 3e-4 + 1e-4)
    assert COST.step_s(16, 0, 3, 1000) == pytest.approx(
        0.005 + 3e-4 + 1e-4
    )  # the prompt hides behind the streams
    assert COST.step_s(128, 0, 3, 1000) == pytest.approx(0.010 + 3e-4 + 1e-4)
    assert COST.scaled(2.0).step_s(128, 50, 3, 1000) == pytest.approx(COST.step_s(128, 50, 3, 1000) / 2)


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    COST.write(tmp_path / "cost.json")
    assert StepCost.read(tmp_path / "cost.json") == COST


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cost.json"),
        ('{"prompt": [[1, 1]]}', "context_s is missing|decode_base_s is missing|pair_s is missing"),
        ('{"speed": 1}', "speed is not a field"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(CostError, match=told):
        StepCost.read(tmp_path / "cost.json")


def test_a_cost_that_falls_or_is_negative_is_refused() -> None:
    with pytest.raises(CostError, match="falls"):
        StepCost(((1.0, 2.0), (2.0, 1.0)), 0, 0, 0, 0, 0)
    with pytest.raises(CostError, match="pair_s"):
        StepCost(((1.0, 2.0),), -1, 0, 0, 0, 0)
    assert non_decreasing([(4, 1.0), (1, 2.0), (8, 3.0)]) == ((1, 2.0), (4, 2.0), (8, 3.0))


def test_positive_least_squares_against_every_choice_of_columns() -> None:
    rng = random.Random(3)
    for _ in range(60):
        width, height = rng.randint(1, 4), rng.randint(5, 12)
        rows = [[rng.uniform(-1, 2) * 10 ** (3 * c) for c in range(width)] for _ in range(height)]
        seconds = [rng.uniform(0.1, 3) for _ in range(height)]
        matrix, target = numpy.array(rows) / numpy.array(seconds)[:, None], numpy.ones(height)

        best = float("inf")
        for size in range(width + 1):
            for chosen in itertools.combinations(range(width), size):
                trial = numpy.zeros(width)
                if chosen:
                    trial[list(chosen)] = numpy.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
                if (trial >= 0).all():
                    best = min(best, float(((matrix @ trial - target) ** 2).sum()))
        found = numpy.array(fit_positive(rows, seconds))
        assert (found >= 0).all()
        assert float(((matrix @ found - target) ** 2).sum()) == pytest.approx(best, abs=1e-9)


def steps_of(cost: StepCost, noise: float = 0.0) -> list[Step]:
    rng = random.Random(1)
    kinds = [(t, t * (c + t / 2), 0, 0) for t in (16, 64, 256) for c in (0, 256, 1024)]
    kinds += [(0, 0.0, b, b * c) for b in (1, 4, 16) for c in (64, 512, 1500)]
    kinds += [(t, t * t / 2, b, b * 500) for t in (64, 256) for b in (4, 16)]
    return [Step(*kind, cost.step_s(*kind) * (1 + rng.uniform(-noise, noise))) for kind in kinds]


def test_a_fit_finds_what_made_the_steps() -> None:
    made = StepCost(((0.0, 0.005), (65536.0, 0.005 + 65536 * 4e-4)), 2e-7, 0.0075, 3.6e-4, 1e-6, 23040.0)
    steps = steps_of(made)
    found = fit(steps, 23040.0, "")
    assert all(error["p90"] < 1e-9 for error in errors(found, steps).values())
    for name in ("pair_s", "decode_base_s", "sequence_s", "context_s"):
        assert getattr(found, name) == pytest.approx(getattr(made, name), rel=1e-6)
    noisy = fit(steps_of(made, 0.05), 23040.0, "")
    assert errors(noisy, steps)["mixed"]["p90"] < 0.06
    with pytest.raises(ValueError, match="streams alone"):
        fit([step for step in steps if not step.sequences], 1.0, "")


def test_a_load_that_is_light_is_served_as_it_comes() -> None:
    load = small_load(1000, 30, per_s=0.5)
    times = simulate(COST, Limits(1000, 16, 16, 256), load)
    found = figures(load, times)
    assert len(times) == 30
    alone = [COST.step_s(len(s.prompt), len(s.prompt) ** 2 / 2, 0, 0) for s in load if len(s.prompt) <= 256]
    assert min(alone) <= found["ttft_p50_s"] <= 3 * max(alone)


def test_a_table_becomes_a_model(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    rows = [(512, 1, 50.0, 30.0), (1024, 1, 90.0, 30.2), (512, 2, 80.0, 30.5), (512, 16, 640.0, 36.0)]
    lines = [f"llama2-70b,h100,{size},{batch},128,{p},{t},8\n" for size, batch, p, t in rows]
    path.write_text(HEADER + "".join(lines))
    cost = read_table(path, "llama2-70b", "h100", 8)
    # 1,024 tokens as one prompt take 10 ms longer than as two: that is the attention of the longer.
    pairs = 1024**2 / 2 - 2 * 512**2 / 2
    assert cost.pair_s == pytest.approx(0.010 / pairs)
    assert cost.step_s(1024, 1024**2 / 2, 0, 0) == pytest.approx(0.090)
    assert cost.step_s(0, 0, 1, 512) == pytest.approx(0.030, rel=0.03)
    with pytest.raises(CostError, match="there are llama2-70b/h100/8"):
        read_table(path, "llama2-70b", "h100", 4)
    path.write_text("model\n")
    with pytest.raises(CostError, match="column hardware is missing"):
        read_table(path, "llama2-70b", "h100", 4)
    with pytest.raises(CostError, match="--table"):
        read_table(tmp_path / "none", "llama2-70b", "h100", 4)


@pytest.mark.skipif(not TABLE.is_file(), reason=f"the published table is not at {TABLE}")
def test_the_default_model_is_the_tables() -> None:
    cost = read_table(TABLE, "llama2-70b", "h100-80gb", 8)
    for kind in ((1024, 5e5, 0, 0), (8192, 3.3e7, 0, 0), (0, 0, 32, 32 * 4000), (512, 1e6, 8, 50_000)):
        assert H100_LLAMA2_70B.step_s(*kind) == pytest.approx(cost.step_s(*kind), rel=0.002)

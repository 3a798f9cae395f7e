"""An engine whose steps overlap, on a real model: the tokens, log-probabilities and pace of one whose steps do not."""

from __future__ import annotations

import pytest

from bench.simulate.fit import Watch
from tests.workers.engine.late_runner import Late
from tests.workers.engine.test_engine_speculation import Always
from workers.config import EngineConfig
from workers.engine.engine import Completion, Engine, StepFailed
from workers.engine.ngram import NgramProposer
from workers.engine.pending import Pending
from workers.engine.plan import StepResult
from workers.engine.request import Request
from workers.engine.step_input import StepInput
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling, Work

PROMPTS = [[5, 6, 7, 8] * 6, [9, 10, 11] * 3, [40, 50, 60, 70, 80], list(range(100, 160)), [3, 2, 1]]
SAMPLINGS = [
    Sampling(max_tokens=40, seed=1, temperature=0.0, logprobs=2),
    Sampling(max_tokens=30, seed=2, temperature=0.8, top_p=0.9, logprobs=0),
    Sampling(max_tokens=50, seed=3, temperature=0.0, min_tokens=10, ignore_eos=True, logit_bias={7: 2.0}),
    Sampling(max_tokens=25, seed=4, temperature=1.0, top_k=5, stop_token_ids=(7, 9), min_tokens=3),
    Sampling(max_tokens=1, seed=5, temperature=1.0, logprobs=1),
]
COUNTING = Sampling(max_tokens=20, seed=6, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepare_model(str(write_random_model(tmp_path_factory.mktemp("model"), "llama", seed=1)))


def make_engine(model: PreparedModel, num_blocks: int = 64, kernels: str = "auto") -> Engine:
    config = EngineConfig(
        kernels=kernels,  # type: ignore[arg-type]
        device="cpu",
        dtype="float32",
        num_blocks=num_blocks,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        deterministic=True,
        num_threads=1,
    )
    return Engine(config, model)


def overlapping(engine: Engine) -> Late:
    engine.runner = runner = Late(engine.runner)  # type: ignore[assignment]
    return runner


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [c.finish_reason for c in ours] == [c.finish_reason for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [e.logprob for e in one.logprobs] == pytest.approx(
            [e.logprob for e in other.logprobs], abs=1e-4
        )
        assert [[t for t, _ in e.top] for e in one.logprobs] == [
            [t for t, _ in e.top] for e in other.logprobs
        ]


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_output_is_that_of_one_step_after_the_other(model: PreparedModel, num_blocks: int) -> None:
    expected = make_engine(model).generate(PROMPTS, SAMPLINGS)
    engine = make_engine(model, num_blocks)
    runner = overlapping(engine)
    same(engine.generate(PROMPTS, SAMPLINGS), expected)
    assert runner.most_waiting == 2
    assert runner.num_carried > 50, "most tokens are computed with before they are known"
    assert (engine.scheduler.preemptions > 0) == (num_blocks == 12)
    engine.scheduler.check()
    assert engine.pool.num_referenced == 0
    assert not engine.scheduler.has_work
    load = engine.load()
    assert load.output_tokens == sum(len(c.tokens) for c in expected), (
        "what was computed for nothing is not counted"
    )


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_the_runner_of_devices_carries_tokens_by_itself(model: PreparedModel, num_blocks: int) -> None:
    prompts, samplings = [*PROMPTS, [7, 7, 8]], [*SAMPLINGS, COUNTING]
    expected = make_engine(model, kernels="torch").generate(prompts, samplings)
    engine = make_engine(model, num_blocks, kernels="torch")
    submit, carried = engine.runner.submit, []

    def counting(step: StepInput) -> Pending:
        carried.append(len(step.carried))
        return submit(step)

    engine.runner.submit = counting  # type: ignore[method-assign]
    engine.runner.overlaps = True  # type: ignore[misc]
    same(engine.generate(prompts, samplings), expected)
    assert sum(carried) > 50
    engine.scheduler.check()
    assert engine.pool.num_referenced == 0


def test_penalties_beside_requests_without(model: PreparedModel) -> None:
    prompts, samplings = [*PROMPTS, [7, 7, 8]], [*SAMPLINGS, COUNTING]
    expected = make_engine(model).generate(prompts, samplings)
    engine = make_engine(model)
    runner = overlapping(engine)
    same(engine.generate(prompts, samplings), expected)
    assert runner.most_waiting == 2, "once nobody has penalties any more"


def test_guesses_hang_on_known_tokens(model: PreparedModel) -> None:
    expected = make_engine(model).generate(PROMPTS, SAMPLINGS)
    engine = make_engine(model)
    runner = overlapping(engine)
    engine.speculation = Always(NgramProposer(1, 3))  # type: ignore[assignment]
    same(engine.generate(PROMPTS, SAMPLINGS), expected)
    assert (runner.most_waiting, runner.num_carried) == (1, 0)
    assert engine.load().drafted_tokens > 0


def test_a_step_that_fails_takes_the_one_behind_it_along_and_nobody_else(model: PreparedModel) -> None:
    [first] = make_engine(model).generate([PROMPTS[0]], SAMPLINGS[0])
    engine = make_engine(model)
    runner = overlapping(engine)
    run, failures = runner._runner.run, [RuntimeError("in the first step")]

    def failing(step):
        if failures:
            raise failures.pop()
        return run(step)

    runner._runner.run = failing
    known = Request(Work("known", PROMPTS[0], SAMPLINGS[0]))
    with engine.lock:
        engine.scheduler.add(known)
    with pytest.raises(StepFailed) as failed:
        engine.step()
    assert failed.value.requests == [known]
    assert not engine._flights
    assert (known.num_computed_tokens, known.num_flying_steps) == (0, 0), "as it was before"
    tokens: list[int] = []

    def deliver(result: StepResult) -> None:
        tokens.extend(new.token for new in result.tokens)

    while engine.scheduler.has_work:  # whoever does not give it up makes it again
        engine.step(deliver)
    assert tokens == first.tokens


def test_what_was_scheduled_ahead_for_who_is_gone_is_waited_for(model: PreparedModel) -> None:
    engine = make_engine(model)
    runner = overlapping(engine)
    with engine.lock:
        engine.scheduler.add(Request(Work("a", PROMPTS[0], SAMPLINGS[2])))
    for _ in range(3):
        engine.step()
    assert len(runner._queue) == 1
    engine.scheduler.cancel("a")
    assert engine.scheduler.has_work
    assert engine.pool.num_referenced > 0
    assert engine.step()
    assert not engine.step()
    assert not runner._queue
    engine.scheduler.check()
    assert engine.pool.num_referenced == 0


def test_the_pace_is_the_time_between_two_ends(model: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    runner = overlapping(engine)
    now = [0.0]
    monkeypatch.setattr("workers.engine.engine.time.perf_counter", lambda: now[0])
    run = runner._runner.run

    def slowly(step):
        now[0] += 0.004
        return run(step)

    runner._runner.run = slowly
    engine.generate([[5, 6, 7], [8, 9, 10]], Sampling(max_tokens=30, seed=1, ignore_eos=True))
    assert runner.most_waiting == 2
    assert engine.load().decode_step_s == pytest.approx(0.004), (
        "a step waits for the one before it, and that is not its own"
    )


def test_what_times_steps_takes_each_for_what_it_is(model: PreparedModel) -> None:
    def steps(engine: Engine) -> list[tuple[int, float, int, int]]:
        with engine.lock:
            engine.scheduler.add(Request(Work("a", list(range(5, 75)), SAMPLINGS[2])))
        watch = Watch(engine, lambda: 0.0)
        found = []
        while engine.scheduler.has_work:
            step = watch.step()
            found.append((step.tokens, step.pairs, step.sequences, step.context))
        return found

    engine = make_engine(model)
    overlapping(engine)
    assert steps(engine) == steps(make_engine(model))

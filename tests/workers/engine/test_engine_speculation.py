"""The whole engine on tiny models with random weights: speculation changes no token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from workers.config import EngineConfig, SpeculationConfig
from workers.engine.draft import DraftProposer
from workers.engine.engine import Completion, Engine
from workers.engine.ngram import NgramProposer
from workers.engine.plan import NOT_A_NUMBER, Plan, Sampled, StepResult
from workers.engine.proposers import open_speculation
from workers.engine.request import Request, State
from workers.engine.speculation import Proposer, Speculation
from workers.engine.step_input import StepInput
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling, Work

PROMPTS = [[5, 6, 7, 8] * 6, [9, 10, 11] * 3, [40, 50, 60, 70, 80], list(range(100, 160))]
SAMPLINGS = [
    Sampling(max_tokens=40, seed=1, temperature=0.0, logprobs=2),
    Sampling(max_tokens=30, seed=2, temperature=0.8, top_p=0.9, repetition_penalty=1.2, logprobs=0),
    Sampling(max_tokens=50, seed=3, temperature=0.0, frequency_penalty=0.5, min_tokens=10, ignore_eos=True),
    Sampling(max_tokens=25, seed=4, temperature=1.0, top_k=5, stop_token_ids=(7, 9), min_tokens=3),
]


class Always:
    """Asks for as many guesses as there may be, whatever they are worth."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer

    def propose(self, plan: Plan) -> Mapping[str, list[int]]:
        wanted = [(item.request, 4 if item.samples else 0) for item in plan.items]
        guesses = self.proposer.propose(wanted)
        return {r.request_id: guess for (r, _), guess in zip(wanted, guesses, strict=True)}

    def observe(self, plan: Plan, result: StepResult, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepare_model(str(write_random_model(tmp_path_factory.mktemp("model"), "llama", seed=1)))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("other"), "qwen2", seed=2)


def make_engine(model: PreparedModel, kernels: str, num_blocks: int = 64) -> Engine:
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        kernels=kernels,  # type: ignore[arg-type]
        num_blocks=num_blocks,
        max_num_batched_tokens=64,
        deterministic=True,
        num_threads=1,
    )
    return Engine(config, model)


def same(ours: Completion, theirs: Completion) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.finish_reason == theirs.finish_reason
    assert [entry.logprob for entry in ours.logprobs] == pytest.approx(
        [entry.logprob for entry in theirs.logprobs], abs=1e-4
    )
    assert [len(entry.top) for entry in ours.logprobs] == [len(entry.top) for entry in theirs.logprobs]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("proposer", ["ngram", "its own draft", "another draft"])
@pytest.mark.parametrize("num_blocks", [64, 12])
def test_output_is_that_without_speculation(
    model: PreparedModel, other: Path, kernels: str, proposer: str, num_blocks: int
) -> None:
    expected = make_engine(model, kernels).generate(PROMPTS, SAMPLINGS)
    engine = make_engine(model, kernels, num_blocks)
    if proposer == "ngram":
        guesses: Proposer = NgramProposer(1, 3)
    else:
        drafting = engine if proposer == "its own draft" else make_engine(prepare_model(str(other)), kernels)
        own = make_engine(model, kernels) if drafting is engine else drafting
        guesses = DraftProposer(
            own.runner, block_size=16, num_blocks=64, max_model_len=2048, max_step_tokens=32
        )
    engine.speculation = Always(guesses)  # type: ignore[assignment]
    for ours, theirs in zip(engine.generate(PROMPTS, SAMPLINGS), expected, strict=True):
        same(ours, theirs)
    engine.scheduler.check()
    assert engine.pool.num_referenced == 0
    load = engine.load()
    assert load.drafted_tokens > 0
    if proposer == "its own draft":
        assert load.accepted_tokens > 0.9 * load.drafted_tokens
    assert (engine.scheduler.preemptions > 0) == (num_blocks == 12)
    # Every token of the output was counted once, however it came about.
    assert load.output_tokens == sum(len(c.tokens) for c in expected)


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_speculation_by_configuration(model: PreparedModel, method: str) -> None:
    speculation = SpeculationConfig(
        method=method,  # type: ignore[arg-type]
        draft_model=model.path if method == "draft" else None,
    )
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        num_blocks=64,
        deterministic=True,
        num_threads=1,
        speculation=speculation,
    )
    engine = Engine(config, model)
    assert isinstance(engine.speculation, Speculation)
    expected = make_engine(model, "auto").generate(PROMPTS, SAMPLINGS)
    for ours, theirs in zip(engine.generate(PROMPTS, SAMPLINGS), expected, strict=True):
        same(ours, theirs)
    if method == "draft":
        engine.generate([[1, 2, 3]], SAMPLINGS[2])  # what ended is let go when the next request comes
        assert open_speculation(config, model, 8, 64) is not None


def test_a_draft_model_that_yields_no_number_guesses_nothing(model: PreparedModel) -> None:
    class Broken:
        def run(self, step: StepInput) -> list[Sampled]:
            assert step.samples, "a step without a row"
            return [Sampled(NOT_A_NUMBER, None) for _ in step.samples]

    proposer = DraftProposer(Broken(), block_size=16, num_blocks=8, max_model_len=64, max_step_tokens=32)
    request = Request(Work("r", [1, 2, 3], SAMPLINGS[0]))
    request.state = State.RUNNING
    assert proposer.propose([(request, 4)]) == [[]]


def test_a_draft_model_must_share_the_vocabulary(
    model: PreparedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = write_random_model(
        tmp_path_factory.mktemp("small"), {"model_type": "llama", "vocab_size": 200}, seed=3
    )
    config = EngineConfig(
        device="cpu", num_blocks=8, speculation=SpeculationConfig(method="draft", draft_model=small)
    )
    with pytest.raises(ValueError, match="must share one vocabulary"):
        open_speculation(config, model, 8, 64)

"""The native sampler against the torch one, over random rows and every combination of parameters.

Both draw from the same noise, so tokens must be equal but where a decision lies within rounding: float32 sums behind
top-p (and min-p's logarithm) differ in their last bits between the two. Such a row is excused only if the torch form
itself gives the other token when top_p and min_p move by _MARGIN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.library import Library, load
from workers.engine.native_sampler import Memo, NativeSampler
from workers.engine.plan import NOT_A_NUMBER, Sampled
from workers.engine.request import Request
from workers.engine.sampler import SampleInput, Sampler
from workers.protocol.messages import Sampling, Work

_MARGIN = 2e-6
_EOS = frozenset({0, 2})


@pytest.fixture(scope="module", params=[name for name, variant in VARIANTS.items() if runs_here(variant)])
def library(request: pytest.FixtureRequest) -> Library:
    return load(request.param)


def _random_sampling(rng: random.Random, vocab: int) -> Sampling:
    def sometimes(value: Any, off: Any, share: float = 0.5) -> Any:
        return value if rng.random() < share else off

    return Sampling(
        max_tokens=100,
        seed=rng.getrandbits(63),
        temperature=sometimes(rng.choice([0.1, 0.7, 1.0, 1.3, 5.0, 1e-5, 1e-6]), 0.0, 0.85),
        top_k=sometimes(rng.choice([1, 2, 20, 50, vocab // 2, vocab, vocab + 5]), 0),
        top_p=sometimes(rng.choice([0.05, 0.5, 0.9, 0.95, 0.999]), 1.0),
        min_p=sometimes(rng.choice([0.001, 0.05, 0.3, 1.0]), 0.0, 0.3),
        repetition_penalty=sometimes(rng.choice([0.8, 1.1, 1.5]), 1.0, 0.3),
        presence_penalty=sometimes(rng.uniform(-1, 2), 0.0, 0.3),
        frequency_penalty=sometimes(rng.uniform(-1, 2), 0.0, 0.3),
        logit_bias=sometimes({rng.randrange(vocab): rng.uniform(-100, 100) for _ in range(4)}, {}, 0.2),
        logprobs=sometimes(rng.choice([0, 1, 5, 20]), None, 0.4),
        stop_token_ids=sometimes((rng.randrange(vocab),), (), 0.3),
        min_tokens=sometimes(rng.choice([1, 3, 10]), 0, 0.3),
    )


def _random_inputs(rng: random.Random, vocab: int, rows: int) -> Iterator[SampleInput]:
    for row in range(rows):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
        output = [rng.choice([*prompt, rng.randrange(vocab)]) for _ in range(rng.randint(0, 8))]
        draft = [rng.choice(prompt) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
        work = Work(request_id=f"r{row}", prompt=prompt, sampling=_random_sampling(rng, vocab), output=output)
        yield SampleInput(Request(work), len(output) + len(draft), draft)


def _random_logits(rng: random.Random, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    scale = rng.choice([0.5, 3.0, 10.0])
    logits = scale * torch.randn(rows, vocab, generator=generator)
    if rng.random() < 0.3:
        logits = logits.round()  # ties everywhere
    if rng.random() < 0.3:
        logits = logits.bfloat16().float()
    return logits + rng.choice([0.0, 0.0, -40.0, 60.0])


def _rounding_decides(logits: torch.Tensor, given: SampleInput, token: int) -> bool:
    """Whether the torch form itself gives `token` with the filters moved by _MARGIN."""
    request, sampling = given.request, given.request.sampling
    for top_p in (sampling.top_p - _MARGIN, sampling.top_p + _MARGIN):
        for min_p in (sampling.min_p * (1 - _MARGIN), sampling.min_p * (1 + _MARGIN)):
            moved = msgspec.structs.replace(
                sampling, top_p=min(top_p, 1.0) if sampling.top_p < 1 else 1.0, min_p=min(min_p, 1.0)
            )
            work = msgspec.structs.replace(request.work, sampling=moved)
            [other] = Sampler(_EOS)(logits.clone()[None], [given._replace(request=Request(work))])
            if other.token == token:
                return True
    return False


def _close(ours: Sampled, theirs: Sampled) -> None:
    if theirs.logprobs is None:
        assert ours.logprobs is None
        return
    assert ours.logprobs is not None
    assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5, rel=1e-6)
    assert [v for _, v in ours.logprobs.top] == pytest.approx(
        [v for _, v in theirs.logprobs.top], abs=1e-5, rel=1e-6
    )


@pytest.mark.parametrize("vocab", [3, 64, 257, 1000, 5000])
def test_tokens_and_logprobs_are_those_of_the_torch_form(library: Library, vocab: int) -> None:
    rng = random.Random(vocab)
    native, oracle = NativeSampler(library, vocab, _EOS), Sampler(_EOS)
    excused = rows_seen = 0
    for _ in range(60):
        rows = rng.choice([1, 2, 16])
        inputs = list(_random_inputs(rng, vocab, rows))
        logits = _random_logits(rng, rows, vocab)
        padded = torch.full((rows, vocab + 7), torch.inf)
        padded[:, :vocab] = logits
        ours = native(padded[:, :vocab], inputs)
        theirs = oracle(logits.clone(), inputs)
        for row, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
            rows_seen += 1
            if mine.token != reference.token:
                assert _rounding_decides(logits[row], inputs[row], mine.token), (
                    inputs[row].request.sampling,
                    mine,
                    reference,
                )
                excused += 1
                continue
            _close(mine, reference)
    assert excused <= rows_seen // 100, f"{excused} of {rows_seen} rows at the edge of a filter"


def _inputs(count: int, **sampling: Any) -> list[SampleInput]:
    chosen = Sampling(max_tokens=9, **({"seed": 1, "temperature": 0.0} | sampling))
    return [SampleInput(Request(Work(f"r{i}", [1], chosen)), 0) for i in range(count)]


@pytest.mark.parametrize("vocab", [5, 64, 200])
def test_the_lowest_id_wins_a_tie(library: Library, vocab: int) -> None:
    sampler = NativeSampler(library, vocab, frozenset())
    for first in range(vocab):
        logits = torch.full((1, vocab), -1.0)
        logits[0, first:] = 2.0
        assert sampler(logits, _inputs(1))[0].token == first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_a_row_with_a_nan_fails_alone(library: Library, temperature: float, place: int) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    whole = logits.clone()
    logits[1, place] = torch.nan
    logits[2, place] = -torch.inf
    for sampler in (NativeSampler(library, 100, _EOS), Sampler(_EOS)):
        given = _inputs(3, temperature=temperature, logprobs=2)
        tokens = [sampled.token for sampled in sampler(logits.clone(), given)]
        assert tokens[1] == NOT_A_NUMBER
        assert tokens[0] == Sampler(_EOS)(whole.clone(), given)[0].token
        assert tokens[2] not in (NOT_A_NUMBER, place)


def test_infinities_are_numbers(library: Library) -> None:
    logits = torch.zeros(3, 70)
    logits[0, 40] = torch.inf
    logits[1] = -torch.inf
    logits[2, :69] = -torch.inf
    for temperature in (0.0, 1.0):
        inputs = _inputs(3, temperature=temperature, top_p=0.5)
        for sampler in (NativeSampler(library, 70, _EOS), Sampler(_EOS)):
            assert [sampled.token for sampled in sampler(logits.clone(), inputs)] == [40, 0, 69]


def test_top_logprobs_come_best_first_with_the_lower_id_first_among_equals(library: Library) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 250] = logits[0, 7] = 1.0
    [sampled] = NativeSampler(library, 300, _EOS)(logits, _inputs(1, logprobs=5))
    assert sampled.logprobs is not None
    assert [token for token, _ in sampled.logprobs.top] == [7, 250, 0, 1, 2]


def test_rows_of_a_batch_change_from_call_to_call(library: Library) -> None:
    """The structs of the last step are kept: none of its values may stay where it does not belong."""
    rng = random.Random(4)
    sampler, oracle, vocab = NativeSampler(library, 500, _EOS), Sampler(_EOS), 500
    requests = [given.request for given in _random_inputs(rng, vocab, 12)]
    for _ in range(60):
        chosen = rng.sample(requests, rng.randint(1, 6))
        inputs = [SampleInput(request, request.num_output_tokens) for request in chosen]
        logits = torch.randn(len(chosen), vocab, generator=torch.Generator().manual_seed(rng.getrandbits(31)))
        expected = oracle(logits.clone(), inputs)
        for request, ours, theirs in zip(chosen, sampler(logits, inputs), expected, strict=True):
            assert ours.token == theirs.token
            request.append(ours.token, frozenset())


def test_a_new_request_with_the_bytes_of_an_ended_one_takes_nothing_over(library: Library) -> None:
    """Its arrays may lie where those of the ended request lay."""
    sampler, end = NativeSampler(library, 20, _EOS), min(_EOS)
    logits = torch.zeros(1, 20)
    logits[0, end] = 5.0
    [ended] = _inputs(1, temperature=0.0, min_tokens=3)
    assert sampler(logits.clone(), [ended])[0].token != end
    [new] = _inputs(1, temperature=0.0)
    new.request.sampler_memo = Memo(new.request, _EOS, 20)
    new.request.sampler_memo.record = ended.request.sampler_memo.record
    assert sampler(logits.clone(), [new])[0].token == end

"""Sampling against exact distributions and plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.sampling import candidates, gumbel_noise, sample
from workers.engine.request import Request
from workers.engine.sampler import SampleInput, Sampler
from workers.protocol.messages import Sampling, Work


def draw(logits: torch.Tensor, position: int, **kwargs: float) -> int:
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7} | kwargs
    return sample(logits, position=position, **options)  # type: ignore[arg-type]


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 20_000
    counts = torch.bincount(torch.tensor([draw(logits, p) for p in range(draws)]), minlength=5)
    expected = torch.softmax(logits, 0) * draws
    chi_square = float(((counts - expected) ** 2 / expected)[:4].sum())
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001
    assert counts[4] == 0


def test_temperature_sharpens_as_the_formula_says() -> None:
    logits = torch.tensor([1.0, 0.0])
    draws = 10_000
    share = sum(draw(logits, p, temperature=0.5) == 0 for p in range(draws)) / draws
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.015)


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-38, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_next_to_zero_is_greedy(temperature: float, top_p: float) -> None:
    logits = 4 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for row in (logits, logits - 100, 100 * logits):
        assert draw(row, 0, temperature=temperature, top_p=top_p) == int(row.argmax())


def test_a_draw_hangs_on_seed_and_position_alone() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    first = [draw(logits, p) for p in range(50)]
    assert first == [draw(logits, p) for p in range(50)]
    assert first != [draw(logits, p, seed=8) for p in range(50)]
    assert len(set(first)) > 20


def test_noise_hangs_on_the_token_id_and_not_on_its_place() -> None:
    ids = torch.arange(1000)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel_noise(1, 2, ids)[shuffled], gumbel_noise(1, 2, shuffled))


def test_noise_is_gumbel() -> None:
    noise = torch.cat([gumbel_noise(3, position, torch.arange(5000)) for position in range(20)])
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    neighbours = torch.stack([gumbel_noise(3, 0, torch.arange(5000)), gumbel_noise(3, 1, torch.arange(5000))])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.05


def test_candidates_of_each_filter() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log()
    assert sorted(candidates(logits, 2, 1.0, 0.0).tolist()) == [0, 1]
    assert candidates(logits, 0, 0.79, 0.0).tolist() == [0, 1]
    assert candidates(logits, 0, 0.81, 0.0).tolist() == [0, 1, 2]
    assert sorted(candidates(logits, 0, 1.0, 0.25).tolist()) == [0, 1, 2]
    assert candidates(logits, 0, 1e-9, 0.0).tolist() == [0]
    # top-p is a share of what top-k has left: 0.5 / 0.8 = 0.625
    assert candidates(logits, 2, 0.6, 0.0).tolist() == [0]


def test_far_off_tokens_still_count_in_the_total_of_top_p() -> None:
    logits = torch.full((1_000_001,), -27.0)
    logits[0] = 0.0
    share = 1 / (1 + 1_000_000 * math.exp(-27.0))
    assert candidates(logits, 0, share - 1e-7, 0.0).tolist() == [0]


def run(logits: torch.Tensor, sampling: Sampling, output: list[int] | None = None) -> tuple[int, object]:
    request = Request(Work(request_id="a", prompt=[1, 2], sampling=sampling, output=output or []))
    [result] = Sampler(frozenset({0}))(
        logits.clone()[None], [SampleInput(request, request.num_output_tokens)]
    )
    return result.token, result.logprobs


def greedy(**kwargs: object) -> Sampling:
    return Sampling(max_tokens=10, seed=0, temperature=0.0, **kwargs)  # type: ignore[arg-type]


def test_penalties_bias_and_min_tokens() -> None:
    logits = torch.tensor([3.0, 2.9, 2.8, 2.7, 2.6])
    assert run(logits, greedy())[0] == 0
    assert run(logits, greedy(min_tokens=1))[0] == 1, "EOS is barred"
    assert run(logits, greedy(min_tokens=1), [3])[0] == 0, "and allowed after one token"
    assert run(logits, greedy(min_tokens=2, stop_token_ids=(1, 2)))[0] == 3
    assert run(logits, greedy(logit_bias={4: 5.0}))[0] == 4
    assert run(logits, greedy(logit_bias={0: -100.0}, repetition_penalty=2.0))[0] == 3, (
        "1 and 2 are in the prompt"
    )
    assert run(logits, greedy(presence_penalty=0.25), [0])[0] == 1
    assert run(logits, greedy(frequency_penalty=0.06), [0, 0])[0] == 1
    assert run(-logits.flip(0), greedy(repetition_penalty=1.5), [0])[0] == 3, "negative logits are multiplied"


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 2.0, 0.5, 0.0])
    expected = torch.log_softmax(logits, 0)
    sampling = Sampling(max_tokens=1, seed=3, temperature=0.1, logit_bias={3: 100.0}, logprobs=2)
    token, logprobs = run(logits, sampling)
    assert token == 3
    assert logprobs.logprob == pytest.approx(float(expected[3]))  # type: ignore[attr-defined]
    assert [t for t, _ in logprobs.top] == [1, 0]  # type: ignore[attr-defined]
    assert [v for _, v in logprobs.top] == pytest.approx(expected[[1, 0]].tolist())  # type: ignore[attr-defined]
    assert run(logits, greedy())[1] is None
    assert run(logits, greedy(logprobs=0))[1].top == []  # type: ignore[attr-defined]

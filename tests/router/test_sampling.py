from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.generation import ModelInfo
from router.refusal import Refusal
from router.sampling import AskedSampling, choice_seed, to_sampling, to_text_options

MODEL = ModelInfo("m", 100, 50)


def test_defaults_are_openais() -> None:
    sampling = to_sampling(AskedSampling(), MODEL, 10, None)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.0,
        0.0,
        0.0,
    )
    assert sampling.max_tokens == 90  # the rest of the context
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.logprobs) == (0, False, None)
    options = to_text_options(AskedSampling())
    assert (options.stop, options.include_stop, options.skip_special_tokens) == ((), False, True)


@given(seed=st.none() | st.integers(-(2**63), 2**63 - 1), choice=st.integers(0, 127))
def test_seeds_stay_in_range_and_are_kept(seed: int | None, choice: int) -> None:
    first = to_sampling(AskedSampling(seed=seed), MODEL, 1, None).seed
    assert 0 <= first < 2**63
    if seed is not None:
        assert first == to_sampling(AskedSampling(seed=seed), MODEL, 1, None).seed
        if seed >= 0:
            assert first == seed
    derived = choice_seed(first, choice)
    assert 0 <= derived < 2**63
    assert derived == choice_seed(first, choice)
    assert (derived == first) == (choice == 0)


def test_seeds_that_were_not_given_differ() -> None:
    assert len({to_sampling(AskedSampling(), MODEL, 1, None).seed for _ in range(100)}) == 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
)
def test_no_field_takes_what_is_no_number(field: str, value: float) -> None:
    with pytest.raises(Refusal) as refused:
        to_sampling(AskedSampling(**{field: value}), MODEL, 1, None)
    assert refused.value.param == field


def test_top_k_of_the_whole_vocabulary_is_off() -> None:
    assert to_sampling(AskedSampling(top_k=49), MODEL, 1, None).top_k == 49
    for top_k in (-1, 0, 50, 10**6):
        assert to_sampling(AskedSampling(top_k=top_k), MODEL, 1, None).top_k == 0


@given(prompt=st.integers(1, 200), max_tokens=st.none() | st.integers(-5, 200))
def test_prompt_and_answer_fit_the_context_or_are_refused(prompt: int, max_tokens: int | None) -> None:
    fits = prompt < 100 and (max_tokens is None or 1 <= max_tokens <= 100 - prompt)
    if fits:
        sampling = to_sampling(AskedSampling(max_tokens=max_tokens), MODEL, prompt, None)
        assert sampling.max_tokens == (max_tokens or 100 - prompt)
        return
    with pytest.raises(Refusal) as refused:
        to_sampling(AskedSampling(max_tokens=max_tokens), MODEL, prompt, None)
    assert refused.value.param == ("prompt" if prompt >= 100 else "max_tokens")

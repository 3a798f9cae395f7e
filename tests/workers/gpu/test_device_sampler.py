"""Tokens and log-probabilities of all rows at once beside the oracle's, row by row."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.workers.gpu.sampling_requests import EOS, by_the_oracle, random_inputs, random_logits
from workers.engine.plan import NOT_A_NUMBER
from workers.engine.request import Request
from workers.engine.sampler import SampleInput
from workers.gpu.device import HostDevice
from workers.gpu.draw import TorchDraw
from workers.gpu.sampler import DeviceSampler, choose_best
from workers.gpu.upload import upload
from workers.protocol.messages import Sampling, Work

DEVICE = HostDevice(torch.device("cpu"))
VOCAB = 97


def sampler() -> DeviceSampler:
    return DeviceSampler(DEVICE, TorchDraw(), EOS)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_and_logprobs_are_the_oracles(seed: int) -> None:
    rng = random.Random(seed)
    made = sampler()
    for _ in range(2):  # the second step finds the memos of its own requests only
        count = rng.randrange(1, 17)
        logits = random_logits(rng, count, VOCAB, rng.randrange(count) if seed % 3 == 0 else None)
        inputs = random_inputs(rng, count, VOCAB)
        expected = by_the_oracle(logits, inputs)
        tokens = torch.empty(count, dtype=torch.int64)
        choose_best(logits, tokens)
        found = made(logits, tokens, inputs)()
        assert [one.token for one in found] == [one.token for one in expected] == tokens.tolist()
        for one, other in zip(found, expected, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs is not None and other.logprobs is not None:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
                assert [token for token, _ in one.logprobs.top] == [t for t, _ in other.logprobs.top]
                top = [value for _, value in other.logprobs.top]
                assert [value for _, value in one.logprobs.top] == pytest.approx(top, abs=1e-5)


def request(**settings: object) -> Request:
    sampling = Sampling(max_tokens=50, seed=1, **settings)  # type: ignore[arg-type]
    return Request(Work(request_id="a", prompt=[1, 2], sampling=sampling, output=[]))


def test_penalties_follow_a_request_that_grows() -> None:
    """The memo counts on from where it was."""
    made, growing = sampler(), request(temperature=0.0, frequency_penalty=1.0)
    logits = torch.tensor([[0.0, 2.5, 2.0, 1.0]])
    for position, expected in enumerate([1, 2, 1, 2, 3]):
        tokens = torch.zeros(1, dtype=torch.int64)
        row = logits.clone()
        choose_best(row, tokens)
        [sampled] = made(row, tokens, [SampleInput(growing, position)])()
        assert sampled.token == expected, position
        growing.append(sampled.token, frozenset())


def test_a_bias_does_not_hide_that_a_row_is_no_number() -> None:
    logits = torch.tensor([[torch.nan, 1.0], [0.0, 1.0]])
    tokens = torch.empty(2, dtype=torch.int64)
    choose_best(logits, tokens)
    inputs = [
        SampleInput(request(temperature=1.0, min_tokens=1, logprobs=1), 0),
        SampleInput(request(temperature=0.0), 0),
    ]
    spoilt, good = sampler()(logits, tokens, inputs)()
    assert (spoilt.token, spoilt.logprobs) == (NOT_A_NUMBER, None)
    assert good.token == 1


def test_two_steps_may_be_read_after_both_were_queued() -> None:
    made, given = sampler(), [SampleInput(request(temperature=0.0), 0)]
    results = []
    for best in (0, 1):
        tokens = torch.tensor([best])
        results.append(made(torch.zeros(1, 2), tokens, given))
    assert [result()[0].token for result in results] == [0, 1]


def test_plain_greedy_rows_ask_nothing_of_the_device() -> None:
    class Never(TorchDraw):
        def __call__(self, *given: object) -> None:
            raise AssertionError("the best token was asked for, and it was there")

    made = DeviceSampler(DEVICE, Never(), EOS)
    [sampled] = made(torch.zeros(1, 5), torch.tensor([4]), [SampleInput(request(temperature=0.0), 0)])()
    assert sampled.token == 4


def test_an_upload_keeps_shapes_and_types() -> None:
    arrays = [np.arange(3, dtype=np.int32), np.array([[1.5], [2.5]]), np.empty(0, np.float32), np.arange(2)]
    for array, tensor in zip(arrays, upload(arrays, DEVICE), strict=True):
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)
        assert str(tensor.dtype) == f"torch.{array.dtype.name}"
    assert upload([], DEVICE) == []

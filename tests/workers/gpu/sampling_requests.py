"""Requests of all kinds for the device's sampler, and the tokens and log-probabilities that the oracle gives them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from workers.engine.plan import Sampled
from workers.engine.request import Request
from workers.engine.sampler import SampleInput, Sampler
from workers.protocol.messages import Sampling, Work

EOS = frozenset({0, 3})


def random_inputs(rng: random.Random, count: int, vocab: int) -> list[SampleInput]:
    inputs = []
    for index in range(count):
        tokens = [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))]
        output = [rng.randrange(vocab) for _ in range(rng.randrange(12))]
        work = Work(request_id=str(index), prompt=tokens, sampling=random_sampling(rng, vocab), output=output)
        draft = tuple(rng.randrange(vocab) for _ in range(rng.choice((0, 0, 0, 2))))
        inputs.append(SampleInput(Request(work), len(output) + len(draft), draft))
    return inputs


def random_sampling(rng: random.Random, vocab: int, max_tokens: int = 100) -> Sampling:
    def sometimes(value: float, off: float) -> float:
        return value if rng.random() < 0.4 else off

    return Sampling(
        max_tokens=max_tokens,
        seed=rng.randrange(2**64),
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0, 1.8)),
        top_k=int(sometimes(rng.randrange(1, vocab), 0)),
        top_p=sometimes(rng.uniform(0.3, 0.99), 1.0),
        min_p=sometimes(rng.uniform(0.01, 0.2), 0.0),
        repetition_penalty=sometimes(rng.uniform(0.6, 1.7), 1.0),
        presence_penalty=sometimes(rng.uniform(-1, 1), 0.0),
        frequency_penalty=sometimes(rng.uniform(-1, 1), 0.0),
        logit_bias={rng.randrange(vocab): rng.uniform(-5, 5) for _ in range(rng.choice((0, 0, 3)))},
        min_tokens=rng.choice((0, 0, 8)),
        stop_token_ids=tuple(rng.randrange(vocab) for _ in range(rng.choice((0, 2)))),
        logprobs=rng.choice((None, None, 0, 4)),
    )


def by_the_oracle(logits: Tensor, inputs: list[SampleInput]) -> list[Sampled]:
    return Sampler(EOS)(logits.clone(), [SampleInput(Request(i.request.work), *i[1:]) for i in inputs])


def random_logits(rng: random.Random, count: int, vocab: int, spoilt: int | None = None) -> Tensor:
    """`spoilt`: a row that holds a NaN."""
    logits = 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    if spoilt is not None:
        logits[spoilt, rng.randrange(vocab)] = torch.nan
    return logits

"""From logits to tokens: bias and penalties, the draw, log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.sampling import sample
from workers.engine.plan import NOT_A_NUMBER, Sampled
from workers.engine.request import Request
from workers.protocol.messages import Sampling, TokenLogprobs


class SampleInput(NamedTuple):
    """What the choice of one token hangs on besides the logits: the request's sampling and its tokens so far."""

    request: Request
    position: int  # index of the token among the output tokens
    draft: Sequence[int] = ()  # speculated tokens between the request's known ones and this position


def drawn(row: torch.Tensor, given: SampleInput) -> int:
    """One token from a row of logits, float32 [vocab], bias and penalties applied."""
    sampling = given.request.sampling
    return sample(
        row,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        position=given.position,
    )


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def __call__(self, logits: torch.Tensor, inputs: Sequence[SampleInput]) -> list[Sampled]:
        """`logits` is float32 [len(inputs), vocab]; rows are changed in place where bias or penalties apply."""
        best, ids = logits.max(dim=-1)  # NaN where there is one
        broken = best.isnan().tolist()
        greedy = ids.tolist()
        results = []
        for row, given in enumerate(inputs):
            if broken[row]:
                results.append(Sampled(NOT_A_NUMBER, None))
                continue
            sampling = given.request.sampling
            # Log-probabilities are the model's own: taken before bias, penalties and temperature.
            raw = torch.log_softmax(logits[row], dim=-1) if sampling.logprobs is not None else None
            if _plain_greedy(sampling):
                token = greedy[row]
            else:
                self._adjust(logits[row], given)
                token = drawn(logits[row], given)
            results.append(Sampled(token, _logprobs(raw, token, sampling.logprobs)))
        return results

    def _adjust(self, row: torch.Tensor, given: SampleInput) -> None:
        request, sampling = given.request, given.request.sampling
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(list({*request.token_ids, *given.draft}), device=row.device)
            values = row[seen]
            penalty = sampling.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = Counter([*request.output_token_ids, *given.draft])
            if counts:
                tokens = torch.tensor(list(counts), device=row.device)
                times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
                row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias), device=row.device)
            row[tokens] += torch.tensor(
                list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device
            )
        if given.position < sampling.min_tokens:
            ends = [*self._eos_token_ids, *sampling.stop_token_ids]
            row[torch.tensor(ends, dtype=torch.int64, device=row.device)] = -torch.inf


def _plain_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0.0 and not (
        sampling.logit_bias
        or sampling.min_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _logprobs(raw: torch.Tensor | None, token: int, count: int | None) -> TokenLogprobs | None:
    if raw is None or count is None:
        return None
    top: list[tuple[int, float]] = []
    if count > 0:
        values, ids = torch.topk(raw, min(count, raw.numel()))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprob=float(raw[token]), top=top)

"""What the sampler keeps of a request between steps."""

from __future__ import annotations

import torch

from kernels.sampling import COLDEST
from workers.engine.occurrences import Occurrences
from workers.engine.request import Request


class Memo:
    __slots__ = (
        "adjusts", "bias", "biased", "counted", "ends", "filtered", "frequency_penalty", "log_min_p", "logprobs",
        "min_tokens", "plain", "presence_penalty", "repetition_penalty", "seed", "seen", "temperature", "top_k",
        "top_p",
    )  # fmt: skip

    def __init__(self, request: Request, eos_token_ids: frozenset[int]) -> None:
        sampling = request.sampling
        drawn = sampling.temperature >= COLDEST  # else an argmax, whatever the filters
        self.temperature = sampling.temperature if drawn else 0.0
        self.top_k, self.top_p = (sampling.top_k, sampling.top_p) if drawn else (0, 1.0)
        # The logarithm is the CPU's: a GPU's may differ in the last bit.
        self.log_min_p = float(torch.log(torch.tensor(sampling.min_p if drawn else 0.0)))
        self.filtered = self.top_k > 0 or self.top_p < 1.0
        self.seed = sampling.seed
        self.repetition_penalty = sampling.repetition_penalty
        self.presence_penalty, self.frequency_penalty = sampling.presence_penalty, sampling.frequency_penalty
        self.seen = Occurrences() if self.repetition_penalty != 1.0 else None
        penalized = self.presence_penalty or self.frequency_penalty
        self.counted = Occurrences(request.num_prompt_tokens) if penalized else None
        self.biased, self.bias = list(sampling.logit_bias), list(sampling.logit_bias.values())
        self.min_tokens = sampling.min_tokens
        self.ends = [*eos_token_ids, *sampling.stop_token_ids]
        self.logprobs = sampling.logprobs
        self.adjusts = bool(self.seen or self.counted or self.biased or self.min_tokens)
        self.plain = not drawn and not self.adjusts  # the best token as the model has it

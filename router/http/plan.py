"""What a request for generation comes to: validated, tokenized, ready to be run. One for both endpoints and streams."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from router.admission.quota import Permit
from router.chat.answer import AnswerReader
from router.chat.prompt import Prompts
from router.chat.stops import StopAutomaton
from router.generation import Generation, ModelInfo
from router.http.asked import AskedAnswer
from router.metrics import RequestRecord
from router.sampling import (
    TextOptions,
    checked_cache_salt,
    checked_priority,
    checked_timeout,
    choice_seed,
    num_choices,
    to_sampling,
    to_text_options,
)
from router.sequences import Sequence
from router.tenants import Caller, Tenant
from workers.protocol.messages import Sampling


@dataclass(frozen=True, slots=True)
class Plan:
    """Choice p * n + i of the answer is the i-th answer to prompt p."""

    request_id: str
    model: ModelInfo
    prompts: list[list[int]]
    samplings: list[Sampling]  # one per prompt, of its first choice
    n: int
    text: TextOptions
    tenant: Tenant
    deadline: float | None = None  # time.monotonic()
    cache_salt: str = ""
    priority: int = 0
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    echo: list[str] = field(default_factory=list)  # the prompts' texts, when they are to be repeated
    created: int = field(default_factory=lambda: int(time.time()))  # s since 1970

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def wants_logprobs(self) -> bool:
        return self.samplings[0].logprobs is not None

    def permit(self) -> Permit:
        """Lets the request into the tenant's limits. Raises `TenantLimit`, `Refusal`."""
        max_tokens = [sampling.max_tokens for sampling in self.samplings for _ in range(self.n)]
        return self.tenant.quota.enter(sum(map(len, self.prompts)), max_tokens, time.monotonic())

    def sequences(self, prompts: Prompts, record: RequestRecord) -> list[Sequence]:
        """One for each choice, in order."""
        automaton = StopAutomaton(self.text.stop) if self.text.stop else None
        return [self._sequence(choice, prompts, automaton, record) for choice in range(self.num_choices)]

    def _sequence(
        self, choice: int, prompts: Prompts, automaton: StopAutomaton | None, record: RequestRecord
    ) -> Sequence:
        index, copy = divmod(choice, self.n)
        sampling = self.samplings[index]
        if copy:
            sampling = replace(sampling, seed=choice_seed(sampling.seed, copy))
        prompt = self.prompts[index]
        request_id = self.request_id if self.num_choices == 1 else f"{self.request_id}-{choice}"
        generation = Generation(
            request_id,
            prompt,
            sampling,
            self.cache_salt,
            self.priority,
            self.tenant.name,
            self.deadline,
            self.tenant.quota.expected_output(sampling.max_tokens),
        )
        reader = AnswerReader(
            prompts.tokenizer, self.text, automaton, sampling.stop_token_ids, self.wants_logprobs
        )
        return Sequence(generation, reader, record.sequence(0 if copy else len(prompt)))


def make_plan(
    asked: AskedAnswer,
    kind: str,
    model: ModelInfo,
    prompts: list[list[int]],
    logprobs: int | None,
    caller: Caller,
    *,
    prompt_param: str = "prompt",
    max_tokens_param: str = "max_tokens",
    echo: list[str] | None = None,
) -> Plan:
    """`kind` is the prefix of the request's id. Raises `Refusal`."""
    n = num_choices(asked, len(prompts))
    samplings = [
        to_sampling(
            asked,
            model,
            len(prompt),
            logprobs,
            prompt_param=prompt_param,
            max_tokens_param=max_tokens_param,
        )
        for prompt in prompts
    ]
    options = asked.stream_options
    return Plan(
        request_id=f"{kind}-{secrets.token_hex(16)}",
        model=model,
        prompts=prompts,
        samplings=samplings,
        n=n,
        text=to_text_options(asked),
        tenant=caller.tenant,
        deadline=caller.deadline(checked_timeout(asked)),
        cache_salt=caller.tenant.cache_salt(checked_cache_salt(asked)),
        priority=caller.tenant.priority(checked_priority(asked)),
        stream=bool(asked.stream),
        include_usage=options is not None and bool(options.include_usage),
        return_token_ids=bool(asked.return_token_ids),
        echo=echo or [],
    )

"""What one step can give a request besides one token: several at once, or a failure of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.workers.test_worker import Client, Start, alone, model, start  # noqa: F401
from workers.engine.engine import Engine
from workers.engine.plan import NOT_A_NUMBER, Plan, Sampled, StepResult
from workers.engine.step_input import StepInput
from workers.protocol.messages import Accepted, Failed, Reserve, Sampling, Tokens, Work


class Foreknowledge:
    """Guesses what is known to come."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def propose(self, plan: Plan) -> Mapping[str, list[int]]:
        return {
            item.request.request_id: self.tokens[item.request.num_output_tokens :][:3] for item in plan.items
        }

    def observe(self, plan: Plan, result: StepResult, seconds: float) -> None:
        pass


def reserve(client: Client, name: str, prompt: list[int], sampling: Sampling) -> None:
    client.send(Reserve(Work(name, prompt, sampling), f"t-{name}", 5.0, local_prefill_max=1000))
    client.next(Accepted)


def test_tokens_of_one_step_leave_in_one_delta(start: Start, alone: Engine) -> None:  # noqa: F811
    sampling = Sampling(max_tokens=21, seed=4, temperature=0.7, logprobs=1, ignore_eos=True)
    prompt = list(range(50, 80))
    [expected] = alone.generate([prompt], sampling)
    worker = start()
    worker.engine.speculation = Foreknowledge(expected.tokens)  # type: ignore[assignment]
    client = Client(worker.info.address)
    reserve(client, "a", prompt, sampling)
    tokens: list[int] = []
    sizes, reason = [], None
    while reason is None:
        [delta] = client.next(Tokens).deltas
        assert delta.index == len(tokens)
        assert len(delta.logprobs) == len(delta.tokens)
        tokens += delta.tokens
        sizes.append(len(delta.tokens))
        reason = delta.finish_reason
    assert (tokens, reason) == (expected.tokens, "length")
    assert sizes == [4, 4, 4, 4, 4, 1]
    status = client.status(want_metrics=True)
    assert b"headrace_accepted_tokens_total" in status.metrics
    assert status.referenced_blocks == 0


def test_a_request_whose_logits_are_not_numbers_fails_alone(start: Start, alone: Engine) -> None:  # noqa: F811
    sampling = Sampling(max_tokens=30, seed=4, temperature=0.0, ignore_eos=True)
    worker = start()
    run = worker.engine.runner.run

    def spoiled(step: StepInput) -> list[Sampled]:
        pairs = zip(step.samples, run(step), strict=True)
        return [
            Sampled(NOT_A_NUMBER, None) if s.request.request_id == "bad" and s.position == 3 else choice
            for s, choice in pairs
        ]

    worker.engine.runner.run = spoiled  # type: ignore[method-assign]
    client = Client(worker.info.address)
    reserve(client, "good", [5, 6, 7], sampling)
    client.send(Reserve(Work("bad", [8, 9], sampling), "t-bad", 5.0, local_prefill_max=1000))
    outcomes: dict[str, Any] = {"good": [], "bad": []}
    failure = None
    while len(outcomes["good"]) < 30 or failure is None:
        message = client.next(Tokens, Accepted, Failed)
        if isinstance(message, Failed):
            failure = message
        elif isinstance(message, Tokens):
            for delta in message.deltas:
                outcomes[delta.request_id] += delta.tokens
    assert (failure.request_id, failure.code) == ("bad", "internal")
    assert "not a number" in failure.message
    assert len(outcomes["bad"]) == 3
    assert outcomes["good"] == alone.generate([[5, 6, 7]], sampling)[0].tokens
    status = client.status(want_metrics=True)
    assert status.referenced_blocks == 0
    assert re.search(rb'headrace_worker_requests_total{[^}]*outcome="internal"[^}]*} 1\.0', status.metrics)

"""Speculation: the policy against brute force and a simulated machine, the output against the same without it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.block_pool import BlockPool
from workers.engine.plan import Plan, Sampled
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler
from workers.engine.speculation import Acceptance, Speculation, StepCost, draft_lengths
from workers.protocol.messages import Sampling, TokenLogprobs, Work

Model = Callable[[Sequence[int]], int]


# --- the policy -------------------------------------------------------------------------------------------------------


@given(
    credits=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=3),
    room=st.integers(0, 3),
    costs=st.lists(st.floats(0.0, 1.0), min_size=10, max_size=10),
    round_s=st.floats(0.0, 0.5),
)
def test_no_other_choice_promises_more(
    credits: list[float], room: int, costs: list[float], round_s: float
) -> None:
    num = len(credits)
    seconds = 1.0 + np.cumsum(costs)

    def rate(lengths: Sequence[int]) -> float:
        tokens = num + sum(c**j for c, n in zip(credits, lengths, strict=True) for j in range(1, n + 1))
        return float(tokens / (seconds[sum(lengths)] + round_s * max(lengths)))

    chosen = draft_lengths(credits, [room] * num, num, lambda n: seconds[n - num], round_s)
    best = max(map(rate, itertools.product(range(room + 1), repeat=num)))
    # Guesses are added in order of their worth, so a choice with fewer rounds and the same worth can be missed.
    assert rate(chosen) >= best / 1.03 - 1e-9 or round_s > 0
    assert rate(chosen) >= rate([0] * num) - 1e-9


def test_rows_that_cost_nothing_are_all_taken_and_dear_ones_are_not() -> None:
    flat, linear = (lambda n: np.ones(n.shape)), (lambda n: n.astype(float))
    assert draft_lengths([0.5, 0.9], [4, 2], 2, flat) == [4, 2]
    assert draft_lengths([0.9] * 3, [4] * 3, 3, linear) == [0, 0, 0]
    assert draft_lengths([], [], 0, flat) == []


def test_a_share_of_right_guesses_is_found() -> None:
    rng = random.Random(0)
    track = Acceptance()
    for _ in range(300):
        accepted = next((i for i in range(4) if rng.random() > 0.8), 4)
        track.observe(4, accepted)
    assert track.rate == pytest.approx(0.8, abs=0.2)


def test_cost_is_interpolated_and_never_falls() -> None:
    cost = StepCost()
    for size, seconds in [(1, 0.01), (4, 0.04), (2, 0.005), (64, 0.1), (4, 9.0), (4, 0.04)]:
        cost.observe(size, seconds)
    assert cost(np.array([1, 2, 3, 4, 100])) == pytest.approx([0.01, 0.01, 0.025, 0.04, 0.1])


class Oracle:
    """Guesses right with a probability that can change."""

    is_free = True

    def __init__(self, model: Model, chance: float, seed: int = 0) -> None:
        self.model, self.chance, self.rng = model, chance, random.Random(seed)

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        guesses = []
        for request, most in wanted:
            known, guess = list(request.token_ids), []
            for _ in range(most):
                token = self.model([*known, *guess])
                guess.append(token if self.rng.random() < self.chance else token + 1)
            guesses.append(guess)
        return guesses


def drive(
    batch: int, chances: Sequence[float], seconds_of: Callable[[int], float], steps: int = 400
) -> list[tuple[float, float]]:
    """(tokens guessed per request and step, tokens per second) in the second half of each phase, a chance each."""
    model: Model = lambda tokens: 1 + sum(tokens[-3:]) % 5  # noqa: E731
    scheduler = make_scheduler(1 << 16)
    proposer = Oracle(model, chances[0])
    speculation = Speculation(proposer, max_tokens=4)
    for i in range(batch):
        scheduler.add(make_request(f"r{i}", [i + 1] * 3, Sampling(max_tokens=10**6, seed=0)))
    figures = []
    for chance in chances:
        proposer.chance = chance
        guessed = tokens = 0
        seconds = 0.0
        for step in range(steps):
            plan = scheduler.schedule()
            plan = scheduler.extend(plan, speculation.propose(plan))
            result = scheduler.update(plan, run(plan, model))
            speculation.observe(plan, result, seconds_of(plan.num_tokens))
            if step >= steps // 2:
                guessed += sum(len(item.draft) for item in plan.items)
                tokens += len(result.tokens)
                seconds += seconds_of(plan.num_tokens)
        figures.append((guessed / (steps - steps // 2) / batch, tokens / seconds))
    return figures


def bound_by_memory(num_tokens: int) -> float:
    return 0.01 + 0.0001 * num_tokens


def bound_by_arithmetic(num_tokens: int) -> float:
    return 0.001 + 0.001 * num_tokens


def test_good_guesses_are_used_bad_ones_are_not_and_it_comes_back_on() -> None:
    good, bad, good_again = drive(1, [0.95, 0.0, 0.95], bound_by_memory)
    plain = 1 / bound_by_memory(1)
    assert good[0] > 3.5
    assert good[1] > 3 * plain
    assert bad[0] < 0.1
    assert bad[1] > 0.98 * plain
    assert good_again[0] > 3.5


def test_a_step_bound_by_arithmetic_gets_no_guesses() -> None:
    [large] = drive(32, [0.7], bound_by_arithmetic)
    assert large[0] < 0.05
    assert large[1] > 0.98 * 32 / bound_by_arithmetic(32)


# --- the output -------------------------------------------------------------------------------------------------------

EOS = 0


def make_scheduler(num_blocks: int, budget: int = 256) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=4,
        hash_root=b"r" * 16,
        max_num_seqs=64,
        max_num_batched_tokens=budget,
        eos_token_ids=frozenset({EOS}),
    )


def make_request(name: str, prompt: list[int], sampling: Sampling) -> Request:
    return Request(Work(request_id=name, prompt=prompt, sampling=sampling))


def run(plan: Plan, model: Model) -> list[Sampled]:
    sampled = []
    for item in plan.items:
        for guessed in range(item.num_samples):
            token = model([*item.request.token_ids, *item.draft[:guessed]])
            sampled.append(Sampled(token, TokenLogprobs(-float(token))))
    return sampled


def hashed(tokens: Sequence[int]) -> int:
    """Any token, EOS included."""
    return hash(tuple(tokens[-4:])) % 6


@settings(max_examples=200, deadline=None)
@given(
    works=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=12),  # prompt
            st.integers(1, 20),  # max_tokens
            st.integers(0, 8),  # min_tokens
            st.sampled_from([(), (3,), (4, 5)]),  # stop tokens
            st.booleans(),  # ignore_eos
            st.none() | st.integers(0, 12),  # cancelled before this step
        ),
        min_size=1,
        max_size=6,
    ),
    num_blocks=st.integers(9, 24),
    budget=st.integers(6, 30),
    chance=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    longest=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_output_is_that_without_speculation(
    works: list[tuple[list[int], int, int, tuple[int, ...], bool, int | None]],
    num_blocks: int,
    budget: int,
    chance: float,
    longest: int,
    seed: int,
) -> None:
    """Under preemption and cancels, with guesses that are right, wrong or right at first."""

    def outputs(speculate: bool) -> dict[str, tuple[list[int], list[float], str | None, int | None]]:
        scheduler = make_scheduler(num_blocks, budget)
        oracle = Oracle(hashed, chance, seed)
        collected: dict[str, tuple[list[int], list[float]]] = {}
        requests = {}
        for i, (prompt, max_tokens, min_tokens, stops, ignore_eos, _) in enumerate(works):
            sampling = Sampling(
                max_tokens=max_tokens,
                seed=0,
                min_tokens=min_tokens,
                stop_token_ids=stops,
                ignore_eos=ignore_eos,
            )
            requests[f"r{i}"] = make_request(f"r{i}", prompt, sampling)
            collected[f"r{i}"] = ([], [])
            scheduler.add(requests[f"r{i}"])
        for step in range(2000):
            if not scheduler.has_work:
                break
            plan = scheduler.schedule()
            if speculate:
                wanted = [(item.request, longest) for item in plan.items]
                drafts = oracle.propose(wanted)
                plan = scheduler.extend(
                    plan, {r.request_id: draft for (r, _), draft in zip(wanted, drafts, strict=True)}
                )
                assert plan.num_tokens <= budget
            for i, (*_, cancelled) in enumerate(works):
                if cancelled == step:
                    scheduler.cancel(f"r{i}")
            for new in scheduler.update(plan, run(plan, hashed)).tokens:
                tokens, logprobs = collected[new.request.request_id]
                assert new.index == len(tokens)
                assert new.logprobs is not None
                tokens.append(new.token)
                logprobs.append(new.logprobs.logprob)
            scheduler.check()
        assert not scheduler.requests
        assert scheduler.pool.num_referenced == 0
        return {
            name: (*collected[name], request.finish_reason, request.stop_token)
            for name, request in requests.items()
        }

    plain, speculated = outputs(False), outputs(True)
    for i, (*_, cancelled) in enumerate(works):
        ours, theirs = speculated[f"r{i}"], plain[f"r{i}"]
        if cancelled is None:
            assert ours == theirs
        else:  # it came as far as it came
            shorter = min(len(ours[0]), len(theirs[0]))
            assert ours[0][:shorter] == theirs[0][:shorter]


def test_right_guesses_save_steps() -> None:
    scheduler = make_scheduler(64)
    request = make_request("a", [1, 2, 3], Sampling(max_tokens=20, seed=0, ignore_eos=True))
    scheduler.add(request)
    oracle, steps = Oracle(hashed, 1.0), 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        [draft] = oracle.propose([(request, 4)])
        plan = scheduler.extend(plan, {"a": draft})
        scheduler.update(plan, run(plan, hashed))
        steps += 1
    assert steps == 4  # 5 tokens each: the first with the prompt
    assert (scheduler.drafted_tokens, scheduler.accepted_tokens) == (16, 16)


def test_accepted_tokens_are_found_by_later_prompts() -> None:
    scheduler = make_scheduler(64)
    scheduler.add(make_request("a", [1] * 4, Sampling(max_tokens=13, seed=0, ignore_eos=True)))
    request = scheduler.requests["a"]
    while scheduler.has_work:
        plan = scheduler.schedule()
        plan = scheduler.extend(plan, {"a": Oracle(hashed, 1.0).propose([(request, 4)])[0]})
        scheduler.update(plan, run(plan, hashed))
    again = make_request("b", [*request.token_ids, 9], Sampling(max_tokens=1, seed=0))
    assert scheduler.uncached_tokens(again) == 2  # the 17th token was sampled, not computed

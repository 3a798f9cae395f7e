"""Steps that are scheduled while the one before them runs: the tokens are those of one step after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.workers.engine.late_runner import Late, Memory
from tests.workers.engine.test_scheduler import make_request, make_scheduler, run
from workers.config import EngineConfig
from workers.engine.engine import Engine, StepFailed
from workers.engine.fill import Fill
from workers.engine.plan import NOT_A_NUMBER, Sampled, StepResult
from workers.engine.request import Request, State
from workers.protocol.messages import KvLayout, Sampling, Work

BLOCK = 4
EOS = 0
LAYOUT = KvLayout(1, 1, 1, BLOCK, "float32", "00")


def of_history(context: list[int], history: list[int]) -> int:
    """0 to 8, of which 0 ends a text; from what lies in the cache, and what penalties would count."""
    return (sum(context) * 31 + len(context) + 5 * sum(history)) % 9


def text_of(work: Work) -> list[int]:
    """What such a model says, computed without an engine."""
    sampling, tokens = work.sampling, [*work.prompt, *work.output]
    given = len(work.output)
    penalized = sampling.repetition_penalty != 1.0
    while len(tokens) - len(work.prompt) < sampling.max_tokens:
        tokens.append(of_history(tokens, tokens if penalized else []))
        if tokens[-1] in (EOS, *sampling.stop_token_ids) and not (tokens[-1] == EOS and sampling.ignore_eos):
            break
    return tokens[len(work.prompt) + given :]


def make_engine(
    memory: Memory, *, late: bool, budget: int, seqs: int, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    runner = Late(memory) if late else memory
    backend = SimpleNamespace(
        layout=LAYOUT,
        num_blocks=lambda: len(memory.cells),
        runner=lambda num_blocks, share_kv: runner,
    )
    monkeypatch.setattr("workers.engine.engine.open_backend", lambda *given: backend)
    model = SimpleNamespace(max_model_len=32, vocab_size=100, eos_token_ids=(EOS,))
    config = EngineConfig(
        block_size=BLOCK,
        num_blocks=len(memory.cells),
        max_num_seqs=seqs,
        max_num_batched_tokens=max(budget, seqs),
        device="cpu",
    )
    return Engine(config, model)  # type: ignore[arg-type]


# --- the scheduler's side -------------------------------------------------------------------------------------------


def test_the_next_step_is_scheduled_before_its_tokens_are_known() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(request := make_request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], max_tokens=3))
    plans = deque([scheduler.schedule(), scheduler.schedule()])
    seen = [(i.start, i.count, i.samples, i.carried) for plan in plans for i in plan.items]
    assert seen == [(0, 8, False, False), (8, 2, True, False)], (
        "the rest of the prompt behind its first chunk"
    )
    while plans:
        scheduler.update(plans[0], run(plans.popleft()))
        plan = scheduler.schedule()
        if plan.items:
            plans.append(plan)
            seen += [(i.start, i.count, i.samples, i.carried) for i in plan.items]
        scheduler.check()
    assert seen[2:] == [(10, 1, True, True), (11, 1, True, True)], (
        "and nothing behind the last token that it may have"
    )
    assert request.num_output_tokens == 3
    assert not scheduler.has_work


def test_who_ended_in_one_step_keeps_its_blocks_until_the_next_has_run() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1, 2, 3], max_tokens=9, stop=(7,))
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    result = scheduler.update(first, [Sampled(7, None)])
    assert [new.token for new in result.tokens] == [7]
    assert (request.finish_reason, request.state) == ("stop", State.LEAVING)
    assert scheduler.num_seats_taken == 0, "its place is free at once"
    assert scheduler.pool.num_referenced == 1, "the second step writes into its block"
    assert scheduler.has_work, "and is to be waited for"
    scheduler.cancel("a")
    scheduler.check()
    assert scheduler.update(second, [Sampled(5, None)]).tokens == []
    assert (request.token_ids, request.state) == ([1, 2, 3, 7], State.FINISHED)
    assert scheduler.pool.num_referenced == 0
    assert not scheduler.has_work


def test_a_prompt_for_another_worker_samples_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3, 4, 5], prefill_only=True))
    plan = scheduler.schedule()
    assert scheduler.schedule().items == ()
    result = scheduler.update(plan, run(plan))
    assert [request.state for request in result.progressed] == [State.PREFILLED]


def test_penalties_wait_for_the_token_that_they_count() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("plain", [1, 2, 3]))
    sampling = Sampling(max_tokens=4, seed=0, frequency_penalty=0.5)
    scheduler.add(Request(Work("counts", [1, 2, 3], sampling)))
    plan = scheduler.schedule()
    assert len(plan.items) == 2
    assert scheduler.schedule().items == (), (
        "all wait: else those without penalties would get two tokens for its one"
    )
    scheduler.update(plan, run(plan))
    assert len(scheduler.schedule().items) == 2


def test_nobody_is_preempted_while_a_step_writes_into_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name in ("old", "young"):
        scheduler.add(make_request(name, [ord(name[0])] * 8, max_tokens=3))
    plan = scheduler.schedule()
    assert len(plan.items) == 2
    assert scheduler.schedule().items == ()
    assert scheduler.preemptions == 0
    scheduler.update(plan, run(plan))
    plan = scheduler.schedule()
    assert scheduler.preemptions == 1
    assert [item.request.request_id for item in plan.items] == ["old"]


def test_room_made_by_a_step_in_flight_spares_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name, max_tokens in (("long", 3), ("short", 1)):
        scheduler.add(make_request(name, [ord(name[0])] * 8, max_tokens=max_tokens))
    plan = scheduler.schedule()
    assert scheduler.schedule().items == ()
    scheduler.update(plan, run(plan))
    assert [item.request.request_id for item in scheduler.schedule().items] == ["long"]
    assert scheduler.preemptions == 0


def test_what_follows_no_number_is_void() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3, 4]))
    first, second = scheduler.schedule(), scheduler.schedule()
    result = scheduler.update(first, [Sampled(NOT_A_NUMBER, None)])
    assert [request.request_id for request in result.failed] == ["a"]
    assert scheduler.update(second, [Sampled(3, None)]) == StepResult([], [], [], [])
    assert scheduler.pool.num_referenced == scheduler.pool.num_cached == 0


def test_a_third_step_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3, 4]))
    scheduler.schedule(), scheduler.schedule()
    with pytest.raises(RuntimeError, match="two plans"):
        scheduler.schedule()


# --- the engine's side ----------------------------------------------------------------------------------------------


@dataclass
class Case:
    prompt: list[int]
    sampling: Sampling


TOKENS = st.lists(st.integers(1, 2), min_size=1, max_size=14)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 9),
    seed=st.just(0),
    stop_token_ids=st.sampled_from([(), (), (3,)]),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.5]),
)


class EngineMachine(RuleBasedStateMachine):
    """Whatever happens to an engine, its tokens are those of the model, and nothing is held in the end."""

    late = True

    @initialize(num_blocks=st.integers(8, 20), budget=st.integers(4, 20), seqs=st.integers(1, 5))
    def start(self, num_blocks: int, budget: int, seqs: int) -> None:
        self.memory = Memory(num_blocks, BLOCK, of_history)
        patch = pytest.MonkeyPatch()
        self.engine = make_engine(self.memory, late=self.late, budget=budget, seqs=seqs, monkeypatch=patch)
        patch.undo()
        self.scheduler = self.engine.scheduler
        self.works: dict[str, Work] = {}
        self.tokens: dict[str, list[int]] = {}
        self.gone: set[str] = set()
        self.fills: list[tuple[Request, Fill]] = []

    def _new(
        self, prompt: list[int], output: list[int], sampling: Sampling, prefill_only: bool = False
    ) -> Request:
        output = output[: sampling.max_tokens - 1]
        work = Work(f"r{len(self.works)}", prompt, sampling, output=output)
        self.works[work.request_id] = work
        return Request(work, prefill_only=prefill_only)

    @rule(
        prompt=TOKENS,
        output=st.lists(st.integers(1, 2), max_size=4),
        sampling=SAMPLINGS,
        prefill=st.booleans(),
    )
    def add(self, prompt: list[int], output: list[int], sampling: Sampling, prefill: bool) -> None:
        self.scheduler.add(self._new(prompt, output, sampling, prefill))

    @rule(prompt=TOKENS, sampling=SAMPLINGS)
    def reserve(self, prompt: list[int], sampling: Sampling) -> None:
        self.scheduler.reserve(self._new(prompt, [], sampling))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        reserved = [r for r in self.scheduler.requests.values() if r.state is State.RESERVED]
        if reserved:
            request = data.draw(st.sampled_from(reserved))
            self.memory.write(request.block_table, request.token_ids, request.num_stored_blocks)
            token = text_of(request.work)[0]
            self._take(self.scheduler.commit(request, token, None, 0).request, [token])

    @rule(prompt=TOKENS, count=st.integers(1, 4))
    def begin_fill(self, prompt: list[int], count: int) -> None:
        request = Request(Work("never added", prompt, Sampling(max_tokens=1, seed=0)))
        fill = self.scheduler.begin_fill(request, count)
        if fill is not None:
            self.fills.append((request, fill))

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def end_fill(self, data: st.DataObject) -> None:
        request, fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        end = BLOCK * len(fill.table)
        self.memory.write(fill.table, request.token_ids[:end], fill.first_index)
        self.scheduler.end_fill(fill, data.draw(st.integers(0, len(fill.blocks))))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.scheduler.requests:
            name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
            self.gone.add(name)
            self.scheduler.cancel(name)

    @rule()
    def fail(self) -> None:
        self.memory.fail = [ValueError("in the middle of a step")]

    @rule()
    def refuse(self) -> None:
        if isinstance(self.engine.runner, Late):
            self.engine.runner.refuse = [ValueError("before a step")]

    @rule(repeats=st.integers(1, 4))
    def step(self, repeats: int) -> None:
        for _ in range(repeats):
            try:
                self.engine.step(self._deliver)
            except StepFailed as failed:
                for request in failed.requests:
                    self.gone.add(request.request_id)
                    self.scheduler.cancel(request.request_id)

    def _deliver(self, result: StepResult) -> None:
        for new in result.tokens:
            self._take(new.request, [new.token])
        for request in result.progressed:
            # What a hand-over would send now.
            computed = request.num_computed_tokens
            assert self.memory.read(request.block_table, computed) == request.token_ids[:computed]
            if request.state is State.PREFILLED:
                self.gone.add(request.request_id)
                self.scheduler.cancel(request.request_id)

    def _take(self, request: Request, tokens: list[int]) -> None:
        self.tokens.setdefault(request.request_id, []).extend(tokens)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_seats_taken <= self.scheduler.max_num_seqs
            assert self.scheduler.num_flying == len(self.engine._flights)

    @invariant()
    def tokens_are_right(self) -> None:
        for name, tokens in getattr(self, "tokens", {}).items():
            assert tokens == text_of(self.works[name])[: len(tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.memory.fail = []
        if isinstance(self.engine.runner, Late):
            self.engine.runner.refuse = []
        for request, fill in self.fills:
            assert request.state is State.WAITING
            self.scheduler.end_fill(fill, 0)
        for request in list(self.scheduler.requests.values()):
            if request.state is State.RESERVED:
                self.gone.add(request.request_id)
                self.scheduler.cancel(request.request_id)
        begun = set(self.scheduler.requests) | set(self.tokens)
        steps = 0
        while self.engine.step(self._deliver):
            steps += 1
            assert steps < 2000, "the engine does not come to an end"
        assert not self.scheduler.requests
        assert self.engine.pool.num_referenced == 0
        for name in begun - self.gone:
            assert self.tokens[name] == text_of(self.works[name])


class OneAfterTheOther(EngineMachine):
    late = False


EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestOverlappingEngine = EngineMachine.TestCase
OneAfterTheOther.TestCase.settings = settings(max_examples=20, stateful_step_count=50, deadline=None)
TestOneStepAfterTheOther = OneAfterTheOther.TestCase

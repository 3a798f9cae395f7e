"""The scheduler, driven by a fake model whose next token is a function of the tokens before it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.engine.block_pool import BlockPool
from workers.engine.fill import Fill
from workers.engine.plan import NOT_A_NUMBER, Plan, Sampled
from workers.engine.request import Request, State
from workers.engine.scheduler import Scheduler
from workers.protocol.messages import Room, Sampling, Work

BLOCK = 4
ROOT = b"r" * 16
EOS = 0


def next_token(token_ids: list[int]) -> int:
    """Never EOS, so that requests run to max_tokens."""
    return 1 + (sum(token_ids) * 31 + len(token_ids)) % 7


def make_scheduler(
    num_blocks: int = 64, budget: int = 16, max_num_seqs: int = 8, max_queued_tokens: int | None = None
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK,
        hash_root=ROOT,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_queued_tokens=max_queued_tokens,
        eos_token_ids=frozenset({EOS}),
    )


def make_request(
    name: str, prompt: list[int], max_tokens: int = 4, stop: tuple[int, ...] = (), **kwargs: object
) -> Request:
    sampling = Sampling(max_tokens=max_tokens, seed=0, stop_token_ids=stop)
    work = Work(request_id=name, prompt=prompt, sampling=sampling)
    return Request(work, **kwargs)  # type: ignore[arg-type]


def run(plan: Plan) -> list[Sampled]:
    return [
        Sampled(next_token([*item.request.token_ids, *item.draft[:guessed]]), None)
        for item in plan.items
        for guessed in range(item.num_samples)
    ]


def run_to_end(scheduler: Scheduler, limit: int = 500) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(limit):
        if not scheduler.has_work:
            return tokens
        plan = scheduler.schedule()
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        for new in scheduler.update(plan, run(plan)).tokens:
            tokens.setdefault(new.request.request_id, []).append(new.token)
        scheduler.check()
    raise AssertionError("the scheduler does not come to an end")


def expected(prompt: list[int], max_tokens: int, stop: tuple[int, ...] = ()) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def test_long_prompt_is_cut_into_chunks() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", list(range(1, 21))))
    counts = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        counts.append(plan.num_tokens)
        scheduler.update(plan, run(plan))
    assert counts == [8, 8, 4, 1, 1, 1]


def test_running_streams_go_before_a_long_prompt() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("long", list(range(1, 41))))
    scheduler.update(plan := scheduler.schedule(), run(plan))
    short = make_request("short", [1], max_tokens=10)
    scheduler.reserve(short)
    scheduler.commit(short, 5, None, 0)
    plan = scheduler.schedule()
    assert {item.request.request_id: item.count for item in plan.items} == {"short": 1, "long": 7}


def test_prefix_is_found_and_last_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 9))
    scheduler.add(make_request("a", prompt))
    first = run_to_end(scheduler)
    again = make_request("b", prompt)
    scheduler.add(again)
    plan = scheduler.schedule()
    assert [(item.start, item.count) for item in plan.items] == [(4, 4)]
    scheduler.update(plan, run(plan))
    assert again.num_cached_tokens == 4
    assert run_to_end(scheduler) | {} == {"b": first["a"][1:]}


def test_preemption_changes_no_token() -> None:
    prompts = {f"r{i}": [i + 1] * 10 for i in range(5)}
    scheduler = make_scheduler(num_blocks=12, budget=16)
    for name, prompt in prompts.items():
        scheduler.add(make_request(name, prompt, max_tokens=20))
    tokens = run_to_end(scheduler)
    assert scheduler.preemptions > 0
    assert tokens == {name: expected(prompt, 20) for name, prompt in prompts.items()}
    assert scheduler.pool.num_referenced == 0


def test_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in [("late", 5), ("first", 0), ("second", 0)]:
        work = Work(
            request_id=name, prompt=[1, 2], sampling=Sampling(max_tokens=1, seed=0), priority=priority
        )
        scheduler.add(Request(work))
    assert list(run_to_end(scheduler)) == ["first", "second", "late"]


def test_cancel_in_flight_keeps_blocks_until_the_step_has_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3]))
    plan = scheduler.schedule()
    scheduler.cancel("a")
    assert scheduler.pool.num_referenced == 1, "the step still writes into the block"
    result = scheduler.update(plan, run(plan))
    assert result.tokens == []
    assert scheduler.pool.num_referenced == 0
    assert scheduler.requests == {}


def test_stop_reasons() -> None:
    def finish(token: int, **sampling: object) -> Request:
        scheduler = make_scheduler()
        work = Work(request_id="a", prompt=[1], sampling=Sampling(max_tokens=2, seed=0, **sampling))  # type: ignore[arg-type]
        request = Request(work)
        scheduler.add(request)
        plan = scheduler.schedule()
        scheduler.update(plan, [Sampled(token, None)])
        return request

    assert (finish(EOS).finish_reason, finish(EOS).stop_token) == ("stop", EOS)
    assert finish(EOS, ignore_eos=True).finish_reason is None
    assert finish(6, stop_token_ids=(6,)).stop_token == 6
    assert finish(5).finish_reason is None


def test_a_request_whose_logits_are_not_numbers_ends_alone() -> None:
    scheduler = make_scheduler(budget=32)
    for name in ("good", "bad"):
        scheduler.add(make_request(name, [ord(name[0])] * 9))
    plan = scheduler.schedule()
    result = scheduler.update(plan, [Sampled(3, None), Sampled(NOT_A_NUMBER, None)])
    assert [request.request_id for request in result.failed] == ["bad"]
    assert [new.request.request_id for new in result.tokens] == ["good"]
    scheduler.check()
    assert list(scheduler.requests) == ["good"]
    assert scheduler.uncached_tokens(make_request("again", [ord("b")] * 9)) == 9, "its blocks are not shared"


def test_reserve_refuses_without_room_and_holds_nothing() -> None:
    scheduler = make_scheduler(num_blocks=2)
    assert scheduler.reserve(make_request("big", [1] * 12)) is None
    assert scheduler.requests == {}
    assert scheduler.pool.num_referenced == 0
    assert scheduler.reserve(make_request("fits", [1] * 8)) == 0
    assert scheduler.pool.num_referenced == 2
    scheduler.cancel("fits")
    assert scheduler.pool.num_referenced == 0


def test_no_more_may_wait_than_is_set() -> None:
    """So that the engine always finds work, and everybody else waits where the line is fair."""
    scheduler = make_scheduler(budget=16, max_num_seqs=100, max_queued_tokens=32)
    taken = 0
    while (lacks := scheduler.lacks(make_request("probe", [9] * 12), computed_here=True)) is None:
        scheduler.add(make_request(f"r{taken}", [taken] * 12))
        taken += 1
    assert taken == 3, "32 tokens and what goes beyond them"
    assert lacks == Room(requests=0, blocks=0, tokens=1)
    assert not scheduler.room.covers(lacks)
    assert scheduler.lacks(make_request("probe", [9] * 12), computed_here=False) is None, (
        "its KV comes from elsewhere"
    )
    plan = scheduler.schedule()
    scheduler.update(plan, run(plan))
    assert scheduler.room.covers(lacks)
    assert scheduler.waiting, "there is work for the next step, whenever the router hears of the room"
    run_to_end(scheduler)
    assert scheduler.preemptions == 0


def test_what_is_cached_does_not_fill_the_queue() -> None:
    scheduler = make_scheduler(budget=16, max_queued_tokens=32)
    prompt = [1, 2, 3, 4] * 6
    scheduler.add(make_request("first", prompt))
    run_to_end(scheduler)
    scheduler.add(make_request("again", prompt))
    assert scheduler.queued_prefill_tokens == 4
    assert scheduler.room.tokens == 28


def test_blocks_of_those_that_wait_are_promised() -> None:
    scheduler = make_scheduler(num_blocks=8, max_queued_tokens=32)
    scheduler.add(make_request("first", [1] * 17))
    assert scheduler.room == Room(requests=7, blocks=3, tokens=15)
    lacks = scheduler.lacks(make_request("second", [2] * 17), computed_here=True)
    assert lacks == Room(requests=0, blocks=5, tokens=0)
    assert scheduler.reserve(make_request("third", [3] * 12)) == 0
    assert scheduler.lacks(make_request("fourth", [4]), computed_here=True) == Room(blocks=1)
    scheduler.cancel("third")
    scheduler.cancel("first")
    assert scheduler.room.covers(lacks)


def test_nobody_begins_what_it_would_have_to_give_up() -> None:
    """The blocks that a long prompt will need are not given to the next one, which came to read a first chunk."""
    scheduler = make_scheduler(num_blocks=12, budget=8)
    scheduler.add(make_request("first", [1] * 32, max_tokens=1))
    scheduler.add(make_request("second", [2] * 31, max_tokens=1))
    tokens = run_to_end(scheduler)
    assert sorted(tokens) == ["first", "second"]
    assert scheduler.preemptions == 0


def test_new_reservations_leave_room_for_those_that_were_preempted() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for name in ("old", "young"):
        request = make_request(name, [ord(name[0])] * 15, max_tokens=12)
        scheduler.reserve(request)
        scheduler.commit(request, 1, None, 0)
    while scheduler.preemptions == 0:
        plan = scheduler.schedule()
        scheduler.update(plan, run(plan))
    assert [request.request_id for request in scheduler.waiting] == ["young"]
    for step in range(200):
        if "young" not in scheduler.requests:
            break
        newcomer = make_request(f"new{step}", [100 + step] * 7, max_tokens=8)
        if scheduler.reserve(newcomer) is not None:
            scheduler.commit(newcomer, 1, None, 0)
        plan = scheduler.schedule()
        scheduler.update(plan, run(plan))
    assert "young" not in scheduler.requests, "it has found no room while others came and went"


def test_a_filled_prefix_is_found_and_only_as_far_as_it_is_good() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 20))
    request = make_request("a", prompt)
    assert len(scheduler.missing_hashes(request)) == 4, "the last block holds tokens to compute"
    fill = scheduler.begin_fill(request, 3)
    assert fill is not None
    assert (fill.first_index, len(fill.blocks), fill.parent) == (0, 3, ROOT)
    scheduler.check()
    assert scheduler.uncached_tokens(request) == 19, "nobody finds blocks that are being written"
    scheduler.end_fill(fill, 2)
    assert scheduler.pool.num_referenced == 0
    assert scheduler.uncached_tokens(request) == 19 - 8
    again = scheduler.begin_fill(request, 100)
    assert again is not None
    assert (again.first_index, again.hashes, again.parent) == (
        2,
        fill.hashes[2:] + again.hashes[1:],
        fill.hashes[1],
    )
    scheduler.end_fill(again, 0)
    scheduler.add(request)
    assert run_to_end(scheduler) == {"a": expected(prompt, 4)}
    assert request.num_cached_tokens == 8


def test_a_fill_takes_no_block_that_a_waiting_request_needs() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_request("waits", [1] * 20))
    assert scheduler.begin_fill(make_request("big", [2] * 13), 1) is None
    fill = scheduler.begin_fill(make_request("fits", [2] * 12), 9)
    assert fill is not None
    assert len(fill.blocks) == 2
    scheduler.end_fill(fill, 2)
    assert scheduler.begin_fill(make_request("has all", [2] * 12), 9) is None


STOPS = st.sampled_from([(), (), (3,), (1, 4, 6)])


class SchedulerMachine(RuleBasedStateMachine):
    """Any mix of arrivals, reservations, commits, cancels and steps, one or two in flight: tokens stay right and nothing
    leaks."""

    @initialize(num_blocks=st.integers(8, 24), budget=st.integers(4, 24), seqs=st.integers(1, 4))
    def start(self, num_blocks: int, budget: int, seqs: int) -> None:
        self.scheduler = make_scheduler(num_blocks, budget, seqs)
        self.count = 0
        self.prompts: dict[str, tuple[list[int], int, tuple[int, ...]]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.plans: list[Plan] = []  # in flight, oldest first
        self.fills: list[Fill] = []

    def _new(self, prompt: list[int], max_tokens: int, stop: tuple[int, ...], **kwargs: object) -> Request:
        self.count += 1
        name = f"r{self.count}"
        self.prompts[name] = (prompt, max_tokens, stop)
        return make_request(name, prompt, max_tokens, stop, **kwargs)

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20),
        max_tokens=st.integers(1, 8),
        stop=STOPS,
        prefill_only=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, stop: tuple[int, ...], prefill_only: bool) -> None:
        self.scheduler.add(self._new(prompt, max_tokens, stop, prefill_only=prefill_only))

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20), max_tokens=st.integers(1, 8), stop=STOPS
    )
    def reserve(self, prompt: list[int], max_tokens: int, stop: tuple[int, ...]) -> None:
        self.scheduler.reserve(self._new(prompt, max_tokens, stop))

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20), count=st.integers(1, 5))
    def begin_fill(self, prompt: list[int], count: int) -> None:
        fill = self.scheduler.begin_fill(make_request("never added", prompt), count)
        if fill is not None:
            assert 0 < len(fill.blocks) == len(fill.hashes) <= count
            self.fills.append(fill)

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def end_fill(self, data: st.DataObject) -> None:
        fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        self.scheduler.end_fill(fill, data.draw(st.integers(0, len(fill.blocks))))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        reserved = [r for r in self.scheduler.requests.values() if r.state is State.RESERVED]
        if reserved:
            request = data.draw(st.sampled_from(reserved))
            new = self.scheduler.commit(request, next_token(request.token_ids), None, 0)
            self.tokens.setdefault(request.request_id, []).append(new.token)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.scheduler.requests:
            name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
            self.scheduler.cancel(name)
            self.cancelled.add(name)

    @precondition(lambda self: len(self.plans) < 2 and not any(i.draft for p in self.plans for i in p.items))
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        if not plan.items:
            return
        for item in plan.items:
            known = item.request.num_tokens
            assert item.start + item.count <= known or (item.carried and item.start == known)
            assert item.samples == (item.start + item.count >= known)
        self.plans.append(plan)

    @precondition(lambda self: len(self.plans) == 1)
    @rule(data=st.data())
    def speculate(self, data: st.DataObject) -> None:
        [plan] = self.plans
        drafts = {}
        for item in plan.items:
            known = [*item.request.token_ids]
            right = expected(known, data.draw(st.integers(0, 6)))
            drafts[item.request.request_id] = right + data.draw(st.lists(st.integers(1, 7), max_size=2))
        self.plans = [plan := self.scheduler.extend(plan, drafts)]
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        for item in plan.items:
            assert len(item.request.block_table) * BLOCK >= item.start + item.num_tokens

    @precondition(lambda self: self.plans)
    @rule()
    def update(self) -> None:
        plan = self.plans.pop(0)
        result = self.scheduler.update(plan, run(plan))
        for new in result.tokens:
            self.tokens.setdefault(new.request.request_id, []).append(new.token)
        for request in result.progressed:
            if request.state is State.PREFILLED:
                self.scheduler.cancel(request.request_id)

    @precondition(lambda self: self.plans)
    @rule()
    def abandon(self) -> None:
        self.scheduler.abandon(self.plans.pop())

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_seats_taken <= self.scheduler.max_num_seqs
            assert self.scheduler.num_flying == len(self.plans)

    @invariant()
    def blocks_in_flight_are_held_and_written_by_one(self) -> None:
        owners: dict[int, str] = {}
        for plan in getattr(self, "plans", []):
            for item in plan.items:
                request = item.request
                for p in range(item.start // BLOCK, -(-(item.start + item.num_tokens) // BLOCK)):
                    assert owners.setdefault(request.block_table[p], request.request_id) == request.request_id

    @invariant()
    def who_is_refused_hears_of_room_when_there_is_some(self) -> None:
        """What is told as lacking is lacking, and nothing else is."""
        if not hasattr(self, "scheduler"):
            return
        for probe in (make_request("probe", [1, 2] * 5), make_request("probe", [3])):
            lacks, room = self.scheduler.lacks(probe, computed_here=True), self.scheduler.room
            assert (lacks is None) != (lacks is not None and not room.covers(lacks))
            assert room.requests >= 0
            if lacks is None:
                assert room.covers(Room(1, 0, 1))

    @invariant()
    def tokens_are_right(self) -> None:
        for name, tokens in getattr(self, "tokens", {}).items():
            assert tokens == expected(*self.prompts[name])[: len(tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.plans:
            self.update()
        for fill in self.fills:
            self.scheduler.end_fill(fill, 0)
        for request in list(self.scheduler.requests.values()):
            if request.state is State.RESERVED:
                self.scheduler.cancel(request.request_id)
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.schedule()
            if self.plans:
                self.update()
        assert not self.scheduler.requests
        assert self.scheduler.pool.num_referenced == 0


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase

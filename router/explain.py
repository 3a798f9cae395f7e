"""Why a request went where it went, and what became of it: the last requests of one router replica, kept to be asked.

A `Trace` is of one request; each placement adds a `Step`. Times are spans of one clock: what a step's `Times` hold, the
attempt writes as it goes (router/attempt.py).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from router.policy import Choice, Score
from workers.protocol.messages import PrefillDone

LAST = "last"  # as an id: the request that came last


@dataclass(slots=True)
class Times:
    """Of one attempt, time.monotonic(); None: not reached."""

    asked: float | None = None  # Reserve was sent
    answered: float | None = None  # D has taken the request
    first_token: float | None = None
    prefill: PrefillDone | None = None  # what P says of its part, as soon as its hand-over has ended


@dataclass(slots=True)
class Step:
    """One placement."""

    choice: Choice
    times: Times
    queue_s: float  # from looking for a worker to having chosen one, without the choice itself
    choose_s: float
    known_tokens: int  # output before it
    prefill: str | None = None  # who prefills; D itself when it does. None: not begun
    outcome: str = "running"
    message: str = ""

    @property
    def local(self) -> bool:
        return self.prefill == self.choice.decode.worker_id

    def seconds(self) -> Iterator[tuple[str, float]]:
        """Stage by stage, as far as it got. prefill_queue, prefill and transfer are parts of first_token."""
        times, done = self.times, self.times.prefill
        yield "queue", self.queue_s
        yield "choose", self.choose_s
        if times.asked is not None and times.answered is not None:
            yield "reserve", times.answered - times.asked
        if done is not None:
            yield "prefill_queue", done.queue_s
            yield "prefill", done.prefill_s
            yield "transfer", done.transfer_s
        if times.answered is not None and times.first_token is not None:
            yield "first_token", times.first_token - times.answered

    def as_dict(self) -> dict[str, Any]:
        choice, done = self.choice, self.times.prefill
        chosen = {choice.decode.worker_id, choice.prefill.worker_id if choice.prefill else None}
        return {
            "decode": choice.decode.worker_id,
            "prefill": self.prefill
            or (choice.prefill.worker_id if choice.prefill else choice.decode.worker_id),
            "cost": round(choice.cost, 2),
            "distance": round(choice.distance, 2),
            "prompt_tokens": choice.demand.prompt_tokens,
            "output_tokens_before": self.known_tokens,
            "cached_tokens": choice.decode.cached_tokens,
            "workers_with_a_prefix": len(choice.demand.cached_blocks),
            "local_prefill_max": choice.local_prefill_max,
            "candidates": [_candidate(score, score.worker_id in chosen) for score in choice.scores],
            "seconds": {stage: round(span, 6) for stage, span in self.seconds()},
            "transfer_bytes": None if done is None else done.transfer_bytes,
            "channel": None if done is None else done.channel,
            "outcome": self.outcome,
            "message": self.message,
        }


def _candidate(score: Score, chosen: bool) -> dict[str, Any]:
    facts = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in score._asdict().items()
    }
    return {**facts, "chosen": chosen}


@dataclass(slots=True)
class Trace:
    request_id: str
    policy: str
    prompt_tokens: int
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)  # s since 1970
    looking_since: float = 0.0  # for a worker
    steps: list[Step] = field(default_factory=list)
    output_tokens: int = 0
    outcome: str = "waiting"
    message: str = ""
    _choosing_since: float = 0.0

    def __post_init__(self) -> None:
        self.looking_since = self.began

    def choosing(self) -> float:
        """The policy is asked now: time.monotonic()."""
        self._choosing_since = time.monotonic()
        return self._choosing_since

    def chosen(self, choice: Choice, known_tokens: int) -> Step:
        queue_s = self._choosing_since - self.looking_since
        step = Step(choice, Times(), queue_s, time.monotonic() - self._choosing_since, known_tokens)
        self.steps.append(step)
        self.outcome = "running"
        return step

    def failed(self, message: str) -> None:
        """The placement under way did."""
        self.steps[-1].message = message

    def left(self, outcome: str) -> None:
        """The placement under way is over, well or not."""
        self.looking_since = time.monotonic()
        self.steps[-1].outcome = outcome

    def ended(self, outcome: str, message: str = "") -> None:
        """The first word counts."""
        if self.outcome in ("waiting", "running"):
            self.outcome, self.message = outcome, message

    def as_dict(self) -> dict[str, Any]:
        first = next((s.times.first_token for s in self.steps if s.times.first_token is not None), None)
        return {
            "request_id": self.request_id,
            "policy": self.policy,
            "began_at": round(self.began_at, 3),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "first_token_s": None if first is None else round(first - self.began, 6),
            "outcome": self.outcome,
            "message": self.message,
            "placements": [step.as_dict() for step in self.steps],
        }


class Decisions:
    """The last `keep` requests, those that are under way included."""

    def __init__(self, keep: int, policy: str) -> None:
        self._keep = keep
        self._policy = policy
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def open(self, request_id: str, prompt_tokens: int) -> Trace:
        """An id that is used again stands for the newest request."""
        trace = Trace(request_id, self._policy, prompt_tokens)
        if self._keep:
            self._traces.pop(request_id, None)
            self._traces[request_id] = trace
            while len(self._traces) > self._keep:
                self._traces.popitem(last=False)
        return trace

    def of(self, request_id: str) -> list[Trace]:
        """The sequences of a request in order: id, or id-0, id-1, ... of one with several choices; or of `LAST`."""
        if request_id == LAST:
            return list(self._traces.values())[-1:]
        if request_id in self._traces:
            return [self._traces[request_id]]
        choices: list[Trace] = []
        while (trace := self._traces.get(f"{request_id}-{len(choices)}")) is not None:
            choices.append(trace)
        return choices

    def __len__(self) -> int:
        return len(self._traces)

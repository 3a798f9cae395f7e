"""How many tokens to guess ahead, decided from what guesses were worth so far.

A guess costs a row of the next step and is worth a token when it and all guesses before it are right. Both are
measured: each request's share of right guesses, and the time of a step by its number of tokens. A step is then given
the guesses that make expected tokens per second largest; often, in large batches above all, these are none.

Pure Python and numpy. Drafts change no token of the output: see Scheduler.update.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from workers.engine.plan import Plan, StepResult
from workers.engine.request import Request

_WORTHWHILE = 1.03  # less expected gain than this is within the error of the estimates
_FIRST_GUESS = 0.6  # share of right guesses before anything is known
_HOPE = 0.8  # what a request is credited with when it is given another chance
_PATIENCE = (16, 256)  # steps without guesses until then, first and at most
_RETRY = 256  # steps without any guess after which the price of guesses is measured anew
_PLAIN = 64  # steps with guesses after which the price of a step without is measured anew


class Proposer(Protocol):
    """Where guesses come from."""

    @property
    def is_free(self) -> bool:
        """Guessing takes no time to speak of, so it is done before the number of guesses is chosen."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """For each request at most so many tokens that may follow its known ones."""


@dataclass(slots=True)
class Acceptance:
    """The share of a request's guesses that are right, given that those before them were; recent ones weigh more."""

    rate: float = _FIRST_GUESS
    idle_steps: int = 0
    patience: int = _PATIENCE[0]

    def observe(self, proposed: int, accepted: int) -> None:
        for right in [1.0] * accepted + [0.0] * (
            accepted < proposed
        ):  # what follows a wrong guess tells nothing
            self.rate += 0.1 * (right - self.rate)
        if accepted:
            self.patience = _PATIENCE[0]
        elif self.idle_steps >= self.patience:  # the chance was in vain
            self.patience = min(2 * self.patience, _PATIENCE[1])
        self.idle_steps = 0

    def credit(self) -> float:
        return max(self.rate, _HOPE) if self.idle_steps >= self.patience else self.rate


@dataclass(slots=True)
class StepCost:
    """Seconds of a step by its number of tokens, of which each is sampled: medians of recent steps like it."""

    _recent: dict[int, deque[float]] = field(default_factory=dict)
    _tokens: list[int] = field(default_factory=list)  # ascending
    _seconds: list[float] = field(default_factory=list)  # beside _tokens, never falling

    @staticmethod
    def _size(num_tokens: int) -> int:
        """One by one up to 16, then in steps of a twelfth: batches that differ less cost the same."""
        return num_tokens if num_tokens <= 16 else round(2 ** (round(8 * math.log2(num_tokens)) / 8))

    def knows(self, num_tokens: int) -> bool:
        return self._size(num_tokens) in self._recent

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = self._size(num_tokens)
        if size not in self._recent:
            self._recent[size] = deque(maxlen=9)
            bisect.insort(self._tokens, size)
        self._recent[size].append(seconds)
        medians = [statistics.median(self._recent[size]) for size in self._tokens]
        self._seconds = np.maximum.accumulate(medians).tolist()

    def __call__(self, num_tokens: np.ndarray) -> np.ndarray:
        """Expected seconds; beyond what was seen the last value, so that larger steps are tried."""
        if not self._tokens:
            return np.ones(num_tokens.shape)
        return np.asarray(np.interp(num_tokens, self._tokens, self._seconds))


def draft_lengths(
    credits: Sequence[float],
    room: Sequence[int],
    num_tokens: int,
    cost: Callable[[np.ndarray], np.ndarray],
    round_s: float = 0.0,
) -> list[int]:
    """Guesses for each request so that expected tokens per second are most.

    credits: probability that a guess is right. room: guesses that a request can take. num_tokens: of the step without
    guesses, each of which gives one token. round_s: seconds to guess the next token of all requests.
    """
    most = max(room, default=0)
    lengths = [0] * len(room)
    if most == 0:
        return lengths
    place = np.arange(1, most + 1)
    worth = np.minimum(np.asarray(credits), 0.999)[:, None] ** place  # falls from left to right
    worth[place > np.asarray(room)[:, None]] = 0.0
    order = np.argsort(-worth, axis=None, kind="stable")[: sum(room)]
    gained = np.concatenate(([0.0], np.cumsum(worth.reshape(-1)[order])))
    rounds = np.concatenate(([0], np.maximum.accumulate(order % most + 1)))
    seconds = cost(num_tokens + np.arange(len(gained))) + round_s * rounds
    rate = (num_tokens + gained) / seconds
    best = int(np.argmax(rate))
    if rate[best] < _WORTHWHILE * rate[0]:
        return lengths
    for row in (order[:best] // most).tolist():
        lengths[row] += 1
    return lengths


class Speculation:
    """Guesses for a step, and what is learnt from it. Used by the thread that runs the steps."""

    def __init__(
        self, proposer: Proposer, max_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._proposer = proposer
        self._max_tokens = max_tokens
        self._clock = clock
        self._cost = StepCost()
        self._rounds_s: deque[float] = deque(maxlen=9)  # to guess the next token of all requests
        self._acceptance: WeakKeyDictionary[Request, Acceptance] = WeakKeyDictionary()
        self._typical = _FIRST_GUESS
        self._declined = 0  # steps in a row that were given no guess
        self._guessed = 0  # steps in a row that were given some

    def propose(self, plan: Plan) -> Mapping[str, list[int]]:
        """Drafts by request id. A step that reads prompts gets none: it is bound by arithmetic, each row costs."""
        if plan.num_tokens != len(plan.items):
            return {}
        if not self._cost.knows(plan.num_tokens) or self._guessed >= _PLAIN:
            self._guessed = 0
            return {}
        wanted = [(item.request, self._room(item.request)) for item in plan.items]
        guesses: list[list[int]] | None = None
        if self._proposer.is_free:
            guesses = self._proposer.propose(wanted)
            wanted = [(request, len(guess)) for (request, _), guess in zip(wanted, guesses, strict=True)]
        lengths = self._lengths(wanted, plan.num_tokens)
        if not any(lengths):
            return {}
        if guesses is None:
            began = self._clock()
            guesses = self._proposer.propose(
                [(request, length) for (request, _), length in zip(wanted, lengths, strict=True)]
            )
            self._rounds_s.append((self._clock() - began) / max(lengths))
        return {
            request.request_id: guess[:length]
            for (request, _), guess, length in zip(wanted, guesses, lengths, strict=True)
            if length and guess
        }

    def observe(self, plan: Plan, result: StepResult, seconds: float) -> None:
        """`seconds` that the step took, without the guessing."""
        if plan.num_tokens == plan.num_samples:
            self._cost.observe(plan.num_tokens, seconds)
        for verified in result.verified:
            self._track(verified.request).observe(verified.proposed, verified.accepted)
            share = verified.accepted / verified.proposed
            self._typical += 0.02 * (share - self._typical)

    def _room(self, request: Request) -> int:
        """The last token that a request may have is sampled, never guessed."""
        return (
            0
            if request.prefill_only
            else min(self._max_tokens, request.max_total_tokens - request.num_tokens - 1)
        )

    def _track(self, request: Request) -> Acceptance:
        track = self._acceptance.get(request)
        if track is None:
            track = self._acceptance[request] = Acceptance(rate=self._typical)
        return track

    def _lengths(self, wanted: Sequence[tuple[Request, int]], num_tokens: int) -> list[int]:
        room = [most for _, most in wanted]
        tracks = [self._track(request) for request, _ in wanted]
        lengths = draft_lengths(
            [track.credit() for track in tracks],
            room,
            num_tokens,
            self._cost,
            statistics.median(self._rounds_s or [0.0]),
        )
        if any(lengths):
            self._declined, self._guessed = 0, self._guessed + 1
        elif any(room):
            self._declined, self._guessed = self._declined + 1, 0
            if self._declined % _RETRY == 0:
                lengths = [min(1, most) for most in room]
        for track, length in zip(tracks, lengths, strict=True):
            track.idle_steps += length == 0
        return lengths

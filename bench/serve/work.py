"""What is asked of a server, before anything is sent: sessions of one or more turns, and when each begins.

A single request is a session of one turn. In an open loop a session begins at `due_s` whatever the server does; in a
closed loop when one of the users is free, and `due_s` is not looked at.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.serve.prompts import Part
from cluster.planner.trace import Trace


@dataclass(frozen=True)
class Turn:
    """`parts` follow everything that was said before; the turn begins `think_s` after the answer before it."""

    parts: tuple[Part, ...]
    output_tokens: int
    think_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


@dataclass(frozen=True)
class Session:
    due_s: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Range:
    """A number of tokens, drawn evenly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """`128` or `128:512`. Raises ValueError."""
        low, _, high = text.partition(":")
        made = cls(int(low), int(high or low))
        if not 0 <= made.low <= made.high:
            raise ValueError(f"{text!r}: wanted is N or LOW:HIGH with LOW at most HIGH")
        return made

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Synthetic:
    """Every prompt is `shared` tokens that all have (or one of `shared_kinds` such beginnings) and some of its own."""

    shared_tokens: int
    shared_kinds: int
    own_tokens: Range
    output_tokens: Range
    turns: int = 1
    turn_tokens: Range = Range(64, 64)  # what a user adds in the second turn and later
    think_s: float = 0.0  # mean of an exponential

    def sessions(self, rng: random.Random, due: Iterable[float]) -> Iterator[Session]:
        for number, due_s in enumerate(due):
            yield Session(due_s, tuple(self._turns(rng, number)))

    def _turns(self, rng: random.Random, number: int) -> Iterator[Turn]:
        shared = Part(("shared", rng.randrange(self.shared_kinds)), self.shared_tokens)
        for turn in range(self.turns):
            drawn = self.own_tokens if turn == 0 else self.turn_tokens
            own = Part((number, turn), max(drawn.draw(rng), 0 if self.shared_tokens and not turn else 1))
            parts = (shared, own) if turn == 0 and self.shared_tokens else (own,)
            think_s = rng.expovariate(1 / self.think_s) if turn and self.think_s else 0.0
            yield Turn(
                tuple(part for part in parts if part.num_tokens),
                max(1, self.output_tokens.draw(rng)),
                think_s,
            )


def replayed(trace: Trace, max_tokens: int | None = None) -> Iterator[Session]:
    """One session for each request. `max_tokens`: of prompt and answer, longer prompts are cut at their end."""
    for number, request in enumerate(trace.requests):
        output = request.output_tokens if max_tokens is None else min(request.output_tokens, max_tokens // 2)
        length = request.prompt_tokens
        if max_tokens is not None:
            length = min(length, max_tokens - output)
        yield Session(request.at_s, (Turn(tuple(_blocks(trace, number, length)), output),))


def _blocks(trace: Trace, number: int, length: int) -> Iterator[Part]:
    """The part behind the last known block is the request's own."""
    left = length
    for block in trace.requests[number].blocks:
        if not left:
            return
        take = min(left, trace.block_tokens)
        left -= take
        yield Part(("block", block), take)
    if left:
        yield Part(("own", number), left)


def until(
    sessions: Iterable[Session], *, requests: int | None = None, due_s: float | None = None
) -> Iterator[Session]:
    """Sessions for at most so many requests, of those due before `due_s`."""
    asked = 0
    for session in itertools.takewhile(lambda s: due_s is None or s.due_s < due_s, sessions):
        if requests is not None and asked >= requests:
            return
        asked += len(session.turns)
        yield session

"""What passes between the scheduler and whoever runs its steps: the plan, what was sampled, what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from workers.engine.request import NewToken, Request
from workers.protocol.messages import TokenLogprobs


@dataclass(slots=True, eq=False)
class Scheduled:
    """Tokens [start, start + count) of one request; `samples` when they reach the last token that it has.

    Then a draft may follow: tokens that were guessed for the positions behind it. `carried`: the last token is not
    known yet, the step before this one samples it; it is the only token then. Not frozen, as NewToken.
    """

    request: Request
    start: int
    count: int
    samples: bool
    carried: bool = False
    draft: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.count + len(self.draft)

    @property
    def num_samples(self) -> int:
        return 1 + len(self.draft) if self.samples else 0


@dataclass(frozen=True, slots=True)
class Plan:
    items: tuple[Scheduled, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_samples(self) -> int:
        return sum(item.num_samples for item in self.items)


NOT_A_NUMBER = -1


class Sampled(NamedTuple):
    """What the runner chose at one sampled position; those of the plan's items follow each other."""

    token: int  # NOT_A_NUMBER: the logits held a NaN, and this request alone fails
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class StepResult:
    """What `update` made of a step."""

    tokens: list[NewToken]
    # Prefill-only requests with newly computed blocks; PREFILLED ones are to be finished.
    progressed: list[Request]
    failed: list[Request]  # those whose logits were not numbers; they hold nothing any more
    verified: list[Verified]


class Verified(NamedTuple):
    """How good a draft was."""

    request: Request
    proposed: int
    accepted: int

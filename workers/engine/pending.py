"""A step that was handed to a runner and may still run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from workers.engine.plan import Sampled


class Pending(Protocol):
    def wait(self) -> list[Sampled]:
        """One entry for each of the step's samples, when it has run. Called once, in the order of submission.

        Raises what the step raised.
        """


@dataclass(frozen=True, slots=True)
class Ready:
    """A step that had run when `submit` returned."""

    sampled: list[Sampled]

    def wait(self) -> list[Sampled]:
        return self.sampled

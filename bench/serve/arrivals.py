"""When requests come, in seconds from the start: pure functions of a rate and a random source."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["poisson", "constant", "gamma", "onoff"]
KINDS: tuple[Kind, ...] = ("poisson", "constant", "gamma", "onoff")


@dataclass(frozen=True)
class Arrivals:
    """`rate`: requests per second on the average, whatever the kind."""

    kind: Kind
    rate: float
    cv: float = 2.0  # gamma: standard deviation of the gaps over their mean; 1 is Poisson
    on_s: float = 5.0  # onoff: Poisson for so long, at the rate that makes the average right ...
    off_s: float = 5.0  # ... then nothing for so long

    def __post_init__(self) -> None:
        for name in ("rate", "cv", "on_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}, it must be above 0")
        if self.off_s < 0:
            raise ValueError(f"off_s is {self.off_s:g}, it must be at least 0")

    def times(self, rng: random.Random) -> Iterator[float]:
        """Ascending, without end. The first is a gap away from zero, as any other is from the one before."""
        if self.kind == "onoff":
            yield from self._on_off(rng)
        at = 0.0
        for _ in itertools.count():
            at += self._gap(rng)
            yield at

    def _gap(self, rng: random.Random) -> float:
        match self.kind:
            case "constant":
                return 1 / self.rate
            case "gamma":
                shape = self.cv**-2
                return rng.gammavariate(shape, 1 / (self.rate * shape))
            case _:
                return rng.expovariate(self.rate)

    def _on_off(self, rng: random.Random) -> Iterator[float]:
        period = self.on_s + self.off_s
        rate = self.rate * period / self.on_s
        busy = 0.0  # time spent in on-phases
        while True:
            busy += rng.expovariate(rate)
            yield busy // self.on_s * period + busy % self.on_s

"""What is asked of the answers: limits in seconds, and the share of requests that must keep them."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds; None: not asked for. TTFT counts from when a request was due, its waiting included."""

    ttft_s: float | None = None
    tpot_s: float | None = None  # mean of a request after its first token
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `ttft=1.0,tpot=0.05`. Raises ValueError that says what is allowed."""
        limits: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            if name not in _NAMES or not equals:
                raise ValueError(
                    f"slo: {part!r} is not understood; allowed are {', '.join(f'{n}=SECONDS' for n in _NAMES)}, "
                    "separated by commas"
                )
            if name in limits:
                raise ValueError(f"slo: {name} is given twice")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ValueError(f"slo: {name} is {value!r}, it must be a number of seconds") from None
            if not 0 < limits[name] < math.inf:
                raise ValueError(f"slo: {name} is {value}, it must be above 0")
        if not limits:
            raise ValueError("slo: nothing is asked; give at least one of ttft, tpot, e2e")
        return cls(limits.get("ttft"), limits.get("tpot"), limits.get("e2e"))

    def met(self, ttft_s: float, tpot_s: float, e2e_s: float) -> bool:
        """By one request."""
        pairs = ((self.ttft_s, ttft_s), (self.tpot_s, tpot_s), (self.e2e_s, e2e_s))
        return all(limit is None or value <= limit for limit, value in pairs)

    def shown(self) -> str:
        pairs = (("ttft", self.ttft_s), ("tpot", self.tpot_s), ("e2e", self.e2e_s))
        return ", ".join(f"{name} ≤ {limit:g} s" for name, limit in pairs if limit is not None)

"""How long a step of an engine takes: a function of what is in it, whatever it was fitted from.

    step = max(prompt(T), decode_base if B) + pair·A + sequence·B + context·C

T are the prompt tokens computed in the step, A the pairs of a prompt token and a position it attends to, B the sequences that
get one token each, C the positions they attend to together. `prompt` is linear between measured points, and its first
point holds what a step costs that reads the weights for very few tokens. Reading the weights is shared between prompt
and decode, hence the maximum: only the larger of both is paid.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class CostError(ValueError):
    """A cost model that can't be used; the message names the field."""


@dataclass(frozen=True)
class StepCost:
    """All in seconds; `prompt` holds (tokens, seconds), ascending."""

    prompt: tuple[tuple[float, float], ...]
    pair_s: float
    decode_base_s: float
    sequence_s: float
    context_s: float
    kv_token_bytes: float  # that a hand-over sends for one token
    source: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise CostError("prompt is empty: at least one point (tokens, seconds) is needed")
        for name in ("pair_s", "decode_base_s", "sequence_s", "context_s", "kv_token_bytes"):
            if not getattr(self, name) >= 0:
                raise CostError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        for (tokens, seconds), (later, longer) in zip(self.prompt, self.prompt[1:], strict=False):
            if not (0 <= tokens < later and 0 <= seconds <= longer):
                raise CostError(f"prompt falls or repeats at {later:g} tokens: {self.prompt}")

    def step_s(self, tokens: float, pairs: float, sequences: int, context: float) -> float:
        base = self.prompt_s(tokens) if tokens else 0.0
        if sequences and base < self.decode_base_s:
            base = self.decode_base_s
        return base + self.pair_s * pairs + self.sequence_s * sequences + self.context_s * context

    def prompt_s(self, tokens: float) -> float:
        """Of the linear layers, attention left out. Beyond the last point it goes on as between the last two."""
        points = self.prompt
        if tokens <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = min(bisect_right(points, (tokens, float("inf"))), len(points) - 1)
        (left_tokens, left_s), (right_tokens, right_s) = points[right - 1], points[right]
        return left_s + (tokens - left_tokens) * (right_s - left_s) / (right_tokens - left_tokens)

    def token_s(self, chunk: int) -> float:
        """Of a prompt token among `chunk` of them: what an engine has measured when it weighs loading against it."""
        return self.step_s(chunk, chunk * chunk / 2, 0, 0) / chunk

    def scaled(self, speed: float) -> StepCost:
        """The same engine on a machine that is `speed` times as fast."""
        return StepCost(
            prompt=tuple((tokens, seconds / speed) for tokens, seconds in self.prompt),
            pair_s=self.pair_s / speed,
            decode_base_s=self.decode_base_s / speed,
            sequence_s=self.sequence_s / speed,
            context_s=self.context_s / speed,
            kv_token_bytes=self.kv_token_bytes,
            source=f"{self.source} x {speed:g}",
        )

    # --- as a file --------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> StepCost:
        """Raises CostError."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CostError(f"{path}: {error}") from None
        return cls.of(found, str(path))

    @classmethod
    def of(cls, found: Mapping[str, Any], where: str) -> StepCost:
        wanted = cls.__dataclass_fields__.keys()
        if unknown := sorted(found.keys() - wanted):
            raise CostError(
                f"{where}: {unknown[0]} is not a field of a cost model; there are {', '.join(wanted)}"
            )
        if missing := sorted(wanted - found.keys() - {"source"}):
            raise CostError(f"{where}: {missing[0]} is missing")
        try:
            numbers = {name: float(found[name]) for name in wanted if name not in ("prompt", "source")}
            points = tuple((float(tokens), float(seconds)) for tokens, seconds in found["prompt"])
        except (TypeError, ValueError) as error:
            raise CostError(f"{where}: {error}") from None
        return cls(prompt=points, source=str(found.get("source", where)), **numbers)


def non_decreasing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Measured points with dips (noise) lifted to what fewer tokens took already."""
    lifted: list[tuple[float, float]] = []
    for tokens, seconds in sorted(points):
        lifted.append((tokens, max(seconds, lifted[-1][1]) if lifted else seconds))
    return tuple(lifted)

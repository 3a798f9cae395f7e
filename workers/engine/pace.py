"""How long steps take here, measured as they go: what routers estimate queues by.

A prompt token costs what the layers cost, `token_s`, and for each position that it attends to `pair_s` more. Told apart,
both hold for prompts of any length; their mean would call a worker slow for as long as it reads a long prompt.
"""

from __future__ import annotations

_NEWEST = 0.2  # weight of the newest step
_NEWEST_PAIRS = 0.01  # in what tells the two apart: prompts of several lengths must be in it
_SAME_REACH = 100.0  # positions: where they differ by less, noise would be taken for the cost of attention


class Pace:
    """Seconds; None while nothing was measured."""

    def __init__(self) -> None:
        self.token_s: float | None = None  # of a prompt token, what it attends to left out
        self.pair_s = 0.0  # of a prompt token and a position that it attends to
        self.decode_step_s: float | None = None  # of a step that only decodes
        self._most_tokens = 1
        self._reach = self._step_s = (
            0.0  # means over steps: positions that a token attends to, seconds of a token
        )
        self._reach_reach = self._reach_step = 0.0  # variance and covariance of these

    def prompts(self, tokens: int, pairs: float, seconds: float) -> None:
        """A step of mostly prompt tokens, which attended to `pairs` positions together."""
        # What a small step takes is mostly what any step takes: it says little of a longer prompt.
        self._most_tokens = max(self._most_tokens, tokens)
        weight = (tokens / self._most_tokens) ** 2
        reach, step_s = pairs / tokens, seconds / tokens
        if self.token_s is None:
            self._reach, self._step_s, self.token_s = reach, step_s, step_s
            return
        # The slope of step_s over reach, over many steps (West, 1979).
        more_reach, more_s = reach - self._reach, step_s - self._step_s
        share = _NEWEST_PAIRS * weight
        self._reach += share * more_reach
        self._step_s += share * more_s
        self._reach_reach += share * ((1 - share) * more_reach * more_reach - self._reach_reach)
        self._reach_step += share * ((1 - share) * more_reach * more_s - self._reach_step)
        self.pair_s = max(self._reach_step / (self._reach_reach + _SAME_REACH**2), 0.0)
        now = max(step_s - self.pair_s * reach, 0.1 * step_s)
        self.token_s += _NEWEST * weight * (now - self.token_s)

    def decodes(self, seconds: float, steps: int = 1) -> None:
        """So many steps in a row that took so long each."""
        before = seconds if self.decode_step_s is None else self.decode_step_s
        self.decode_step_s = seconds + (before - seconds) * (1 - _NEWEST) ** steps

"""What a tenant may use up: requests and tokens per minute, answers at once. Pure: `now` is in seconds.

Rates are token buckets that hold a minute's worth. Tokens are estimated when a request comes (its prompt, and answers as
long as the tenant's have been) and settled with the true count when it ends. A bucket may go below zero: what was used
beyond the estimate is owed, and the next request waits for it, so that over time the rate is exact. A request larger
than a whole bucket passes when the bucket is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from router.admission.drain import Typical
from router.config import TenantConfig
from router.generation import TenantLimit
from router.refusal import Refusal

_MINUTE_S = 60.0
_FIRST_ANSWER = 256  # tokens, until answers were seen
_FIRST_DURATION_S = 5.0
_MAX_RETRY_AFTER_S = 60.0  # of a guess; what a bucket says is exact and not cut


class Bucket:
    """Holds at most `per_minute`, is full at first."""

    def __init__(self, per_minute: float) -> None:
        self.capacity = per_minute
        self._per_s = per_minute / _MINUTE_S
        self._level = per_minute
        self._at = 0.0

    def level(self, now: float) -> float:
        self._level = min(self._level + max(now - self._at, 0.0) * self._per_s, self.capacity)
        self._at = max(now, self._at)
        return self._level

    def take(self, amount: float, now: float) -> None:
        """A negative amount gives back."""
        self._level = min(self.level(now) - amount, self.capacity)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken: 0, or until it is there, or until the bucket is full."""
        return max(min(amount, self.capacity) - self.level(now), 0.0) / self._per_s

    def full_in_s(self, now: float) -> float:
        return (self.capacity - self.level(now)) / self._per_s


@dataclass(eq=False, slots=True)
class Permit:
    """A request that was let in. It must be settled, once; settling again does nothing."""

    quota: Quota
    answers: int
    prompt_tokens: int
    estimate: int  # tokens
    entered_at: float
    settled: bool = False
    used_prompt_tokens: int = 0
    used_answer_tokens: int = 0

    def settle(self, answer_tokens: int, finished: bool, now: float) -> None:
        """`finished`: every answer came to its end. Nothing is charged for tokens when no answer has begun."""
        if not self.settled:
            self.settled = True
            self.used_prompt_tokens = self.prompt_tokens if answer_tokens else 0
            self.used_answer_tokens = answer_tokens
            self.quota._settle(self, finished, now)


class Quota:
    """One tenant's, on one of `replicas` router replicas: each has an equal part of the limits."""

    def __init__(self, config: TenantConfig, replicas: int = 1) -> None:
        self._name = config.name
        self._replicas = replicas
        self._requests = _bucket(config.max_requests_per_minute, replicas)
        self._tokens = _bucket(config.max_tokens_per_minute, replicas)
        self._max_concurrent = (
            None if config.max_concurrent is None else math.ceil(config.max_concurrent / replicas)
        )
        self._of_all = config
        self._concurrent = 0
        self._answer_tokens = Typical()
        self._duration_s = Typical()

    @property
    def concurrent(self) -> int:
        return self._concurrent

    def expected_output(self, max_tokens: int) -> int:
        """How many tokens an answer will have: as many as the tenant's others, at most what was asked for."""
        mean = self._answer_tokens.mean
        return min(max_tokens, _FIRST_ANSWER if mean is None else max(round(mean), 1))

    def enter(self, prompt_tokens: int, max_tokens: list[int], now: float) -> Permit:
        """`max_tokens` of each answer. Raises TenantLimit; Refusal when no waiting would help. Nothing is taken then."""
        answers = len(max_tokens)
        estimate = prompt_tokens + sum(map(self.expected_output, max_tokens))
        self._check_concurrency(answers)
        self._check_rate("max_requests_per_minute", self._requests, 1, now)
        self._check_rate("max_tokens_per_minute", self._tokens, estimate, now)
        if self._requests is not None:
            self._requests.take(1, now)
        if self._tokens is not None:
            self._tokens.take(estimate, now)
        self._concurrent += answers
        return Permit(self, answers, prompt_tokens, estimate, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """As OpenAI's clients know them; of this replica's part. Empty without limits."""
        return [
            (f"x-ratelimit-{what}-{unit}".encode(), value.encode())
            for unit, bucket in (("requests", self._requests), ("tokens", self._tokens))
            if bucket is not None
            for what, value in _told(bucket, now)
        ]

    def _check_concurrency(self, answers: int) -> None:
        limit = self._max_concurrent
        if limit is None or self._concurrent + answers <= limit:
            return
        if answers > limit:
            raise Refusal(
                f"the request asks for {answers} answers, tenant {self._name!r} may have {limit} under way at once"
                f"{self._part('max_concurrent')}",
                "n",
            )
        duration_s = self._duration_s.mean
        guess_s = (_FIRST_DURATION_S if duration_s is None else duration_s) / self._concurrent
        retry_after_s = min(max(guess_s * (self._concurrent + answers - limit), 1.0), _MAX_RETRY_AFTER_S)
        raise TenantLimit(
            f"tenant {self._name!r} has {self._concurrent} answers under way, {answers} more is above its limit of "
            f"{limit}{self._part('max_concurrent')}; retry in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
            reason="max_concurrent",
        )

    def _check_rate(self, limit: str, bucket: Bucket | None, amount: int, now: float) -> None:
        wait_s = 0.0 if bucket is None else bucket.wait_s(amount, now)
        if bucket is None or wait_s <= 0:
            return
        unit = "requests" if bucket is self._requests else "tokens"
        used = bucket.capacity - bucket.level(now)
        raise TenantLimit(
            f"tenant {self._name!r} has used {used:.0f} of {bucket.capacity:.0f} {unit} per minute"
            f"{self._part(limit)}, the request needs {amount} more; retry in {math.ceil(wait_s)} s",
            retry_after_s=wait_s,
            reason=limit,
        )

    def _part(self, limit: str) -> str:
        if self._replicas == 1:
            return f" ({limit})"
        whole = getattr(self._of_all, limit)
        return f" ({limit} is {whole}, shared by {self._replicas} router replicas)"

    def _settle(self, permit: Permit, finished: bool, now: float) -> None:
        self._concurrent -= permit.answers
        used = permit.used_prompt_tokens + permit.used_answer_tokens
        if self._tokens is not None:
            self._tokens.take(used - permit.estimate, now)
        if finished:
            self._answer_tokens.add(permit.used_answer_tokens / permit.answers)
            self._duration_s.add(now - permit.entered_at)


def _bucket(per_minute: int | None, replicas: int) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute / replicas)


def _told(bucket: Bucket, now: float) -> Iterator[tuple[str, str]]:
    yield "limit", str(math.floor(bucket.capacity))
    yield "remaining", str(max(math.floor(bucket.level(now)), 0))
    yield "reset", duration(bucket.full_in_s(now))


def duration(seconds: float) -> str:
    """As Go writes it, and OpenAI's headers: 17ms, 1.5s, 6m0s."""
    millis = math.ceil(max(seconds, 0.0) * 1000)
    if millis < 1000:
        return f"{millis}ms"
    minutes, millis = divmod(millis, 60_000)
    tail = f"{millis / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{tail}" if hours else f"{minutes}m{tail}" if minutes else tail

"""Token buckets against a count by hand, and a brute-force one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission.quota import Bucket, Quota, duration
from router.config import TenantConfig
from router.generation import TenantLimit
from router.refusal import Refusal


def quota(replicas: int = 1, **limits: int) -> Quota:
    return Quota(TenantConfig(name="acme", **limits), replicas)


def headers(q: Quota, now: float) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in q.headers(now)}


def test_requests_per_minute() -> None:
    q = quota(max_requests_per_minute=60)
    for _ in range(60):
        q.enter(10, [10], 100.0).settle(1, True, 100.0)
    with pytest.raises(TenantLimit) as limited:
        q.enter(10, [10], 100.0)
    error = limited.value
    assert (error.status, error.reason, error.retry_after_s) == (429, "max_requests_per_minute", 1.0)
    assert "tenant 'acme' has used 60 of 60 requests per minute (max_requests_per_minute)" in error.message
    assert "retry in 1 s" in error.message
    q.enter(10, [10], 100.0 + error.retry_after_s)  # what was told is true
    with pytest.raises(TenantLimit):
        q.enter(10, [10], 101.5)
    assert headers(q, 101.5) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "59.5s",
    }


def test_tokens_are_estimated_then_settled() -> None:
    q = quota(max_tokens_per_minute=6000)
    permit = q.enter(1000, [4000], 0.0)
    assert permit.estimate == 1000 + 256  # nothing is known of this tenant's answers
    assert headers(q, 0.0)["x-ratelimit-remaining-tokens"] == str(6000 - 1256)
    permit.settle(4000, True, 0.0)
    permit.settle(4000, True, 0.0)  # counts once
    assert headers(q, 0.0)["x-ratelimit-remaining-tokens"] == "1000"
    assert q.expected_output(10_000) == 4000
    assert q.expected_output(50) == 50
    with pytest.raises(
        TenantLimit, match=r"has used 5000 of 6000 tokens per minute .* needs 1500 more"
    ) as limited:
        q.enter(1450, [50], 0.0)
    assert limited.value.retry_after_s == pytest.approx(5.0)
    q.enter(1450, [50], 5.01).settle(0, False, 5.01)
    assert headers(q, 5.01)["x-ratelimit-remaining-tokens"] == "1501"  # no answer began: nothing is charged


def test_what_was_used_beyond_the_estimate_is_owed() -> None:
    q = quota(max_tokens_per_minute=600)
    q.enter(100, [5000], 0.0).settle(1700, True, 0.0)
    assert headers(q, 0.0)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(TenantLimit) as limited:
        q.enter(10, [10], 0.0)
    assert limited.value.retry_after_s == pytest.approx((1800 - 600 + 20) / 10)


def test_a_request_larger_than_the_bucket_passes_when_it_is_full() -> None:
    q = quota(max_tokens_per_minute=100)
    q.enter(700, [100], 0.0)
    with pytest.raises(TenantLimit) as limited:
        q.enter(700, [100], 1.0)
    assert limited.value.retry_after_s == pytest.approx(480 - 1)
    q.enter(700, [100], 480.0)


def test_concurrency() -> None:
    q = quota(max_concurrent=3)
    first = q.enter(1, [5, 5], 0.0)
    with pytest.raises(
        TenantLimit, match="has 2 answers under way, 2 more is above its limit of 3"
    ) as limited:
        q.enter(1, [5, 5], 0.0)
    assert limited.value.reason == "max_concurrent"
    q.enter(1, [5], 0.0)
    first.settle(5, True, 8.0)
    q.enter(1, [5, 5], 8.0)
    with pytest.raises(TenantLimit) as limited:
        q.enter(1, [5], 8.0)
    assert limited.value.retry_after_s == pytest.approx(8 / 3)
    with pytest.raises(Refusal, match="asks for 4 answers, tenant 'acme' may have 3"):
        q.enter(1, [5] * 4, 8.0)
    assert not q.headers(8.0)


def test_a_refused_request_has_taken_nothing() -> None:
    q = quota(max_requests_per_minute=60, max_tokens_per_minute=100, max_concurrent=5)
    q.enter(95, [5], 0.0)
    before = headers(q, 0.0)
    with pytest.raises(TenantLimit):
        q.enter(95, [5], 0.0)
    assert headers(q, 0.0) == before
    assert q.concurrent == 1


def test_replicas_have_equal_parts() -> None:
    q = quota(3, max_requests_per_minute=10, max_concurrent=4)
    for _ in range(3):
        q.enter(1, [1], 0.0).settle(1, True, 0.0)
    with pytest.raises(TenantLimit, match="max_requests_per_minute is 10, shared by 3 router replicas"):
        q.enter(1, [1], 0.0)
    assert headers(q, 0.0)["x-ratelimit-limit-requests"] == "3"
    whole = [quota(3, max_concurrent=4) for _ in range(3)]
    let_in = 0
    for one in whole:
        for _ in range(4):
            try:
                one.enter(1, [1], 0.0)
                let_in += 1
            except TenantLimit:
                pass
    assert let_in == 6  # rounded up for each


@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), min_size=1, max_size=80),
)
@settings(max_examples=200, deadline=None)
def test_no_window_sees_more_than_the_rate_and_a_bucket(
    per_minute: int, asks: list[tuple[float, int]]
) -> None:
    """Brute force over all windows; and whoever comes back after what was told is let in."""
    bucket, now = Bucket(float(per_minute)), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in asks:
        now += pause
        amount = min(amount, per_minute)
        wait_s = bucket.wait_s(amount, now)
        if wait_s == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
        else:
            assert wait_s <= 60 + 1e-6
            later = Bucket(float(per_minute))
            later._level, later._at = bucket._level, bucket._at
            assert later.wait_s(amount, now + wait_s) == pytest.approx(0, abs=1e-6)
    for i, (start, _) in enumerate(taken):
        for j in range(i, len(taken)):
            used = sum(amount for _, amount in taken[i : j + 1])
            assert used <= per_minute + per_minute / 60 * (taken[j][0] - start) + 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0165, "17ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3725.25, "1h2m5.25s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert re.fullmatch(r"(\d+h)?(\d+m)?[\d.]+(ms|s)", text)

"""What is measured of a made-up machine whose costs are known."""

from __future__ import annotations

import random

import pytest

from workers.engine.pace import Pace


def read(
    pace: Pace, prompt: int, token_s: float, pair_s: float, chunk: int = 512, noise: float = 0.0
) -> None:
    rng = random.Random(prompt)
    for start in range(0, prompt, chunk):
        tokens = min(chunk, prompt - start)
        pairs = tokens * (start + tokens / 2)
        seconds = token_s * tokens + pair_s * pairs
        pace.prompts(tokens, pairs, seconds * rng.uniform(1 - noise, 1 + noise))


def test_nothing_is_known_before_anything_was_measured() -> None:
    pace = Pace()
    assert (pace.token_s, pace.pair_s, pace.decode_step_s) == (None, 0.0, None)


def test_tokens_and_what_they_attend_to_are_told_apart() -> None:
    pace = Pace()
    for prompt in (900, 30_000, 4_000, 12_000, 2_000):
        read(pace, prompt, 8e-5, 1e-9, noise=0.05)
    assert pace.token_s == pytest.approx(8e-5, rel=0.05)
    assert pace.pair_s == pytest.approx(1e-9, rel=0.25)


def test_reading_a_long_prompt_makes_no_worker_slow() -> None:
    long, short = Pace(), Pace()
    for pace in (long, short):
        for prompt in (20_000, 3_000):
            read(pace, prompt, 8e-5, 1e-9)
    read(long, 100_000, 8e-5, 1e-9)
    assert long.token_s == pytest.approx(short.token_s, rel=0.03)


def test_prompts_of_one_length_tell_nothing_of_attention() -> None:
    pace = Pace()
    for seed in range(200):
        pace.prompts(64, 64 * 32, 64 * 1e-4 * random.Random(seed).uniform(0.9, 1.1))
    assert pace.token_s == pytest.approx(1e-4, rel=0.1)
    assert pace.pair_s * 64 < 1e-5


def test_a_worker_that_has_become_slower_is_noticed_and_small_steps_say_little() -> None:
    pace = Pace()
    read(pace, 20_000, 8e-5, 1e-9)
    for _ in range(20):
        pace.prompts(16, 16 * 8, 0.01)  # 8 times what its tokens take: what any step takes
    assert pace.token_s == pytest.approx(8e-5, rel=0.05)
    for _ in range(20):
        pace.prompts(512, 512 * 256, 512 * 2e-4)
    assert pace.token_s == pytest.approx(2e-4, rel=0.1)


def test_steps_that_only_decode() -> None:
    one, many = Pace(), Pace()
    for seconds, steps in ((0.01, 1), (0.02, 5), (0.015, 3)):
        many.decodes(seconds, steps)
        for _ in range(steps):
            one.decodes(seconds)
    assert one.decode_step_s is not None
    assert many.decode_step_s == pytest.approx(one.decode_step_s)

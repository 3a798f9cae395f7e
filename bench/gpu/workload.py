"""What many users ask at a time, alike for every system that is measured: prompts and answers of very different lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    max_tokens: int  # all of them are written


@dataclass(frozen=True)
class Workload:
    requests: int = 512
    concurrency: int = 256
    prompt_tokens: tuple[int, int] = (128, 1024)  # drawn evenly between
    output_tokens: tuple[int, int] = (32, 512)

    def asks(self, vocab_size: int, seed: int = 0) -> list[Ask]:
        rng = random.Random(seed)
        return [
            Ask(
                rng.choices(range(vocab_size), k=rng.randint(*self.prompt_tokens)),
                rng.randint(*self.output_tokens),
            )
            for _ in range(self.requests)
        ]

    @property
    def most_tokens(self) -> int:
        """That requests running at a time can hold."""
        return self.concurrency * (self.prompt_tokens[1] + self.output_tokens[1])


FULL = Workload()
TINY = Workload(6, 4, (5, 20), (2, 6))

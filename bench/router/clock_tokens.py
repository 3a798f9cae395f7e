"""Tokens that tell the time: a simulated worker writes when it sent a token as which token it sent.

Every one of them is a plain English-looking word with a text of its own, so that whoever reads the answer knows the
time in it. Time goes round every `RANGE_S`: what is older than that cannot be told from what is new.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from router.chat.tokenizer import TextTokenizer

TICK_US = 64
NUM_TOKENS = 8192
RANGE_S = NUM_TOKENS * TICK_US / 1e6

_WORD = re.compile(rb" [a-z]{2,12}")


def tick(now: Callable[[], float] = time.monotonic) -> int:
    """Which of the tokens stands for now. The clock is the machine's, the same in every process."""
    return int(now() * 1e6) // TICK_US % NUM_TOKENS


def age_s(then: int, now: int) -> float:
    """Between two ticks less than `RANGE_S` apart."""
    return (now - then) % NUM_TOKENS * TICK_US / 1e6


def clock_tokens(tokenizer: TextTokenizer) -> list[tuple[int, str]]:
    """`NUM_TOKENS` tokens and their texts. Raises ValueError when the vocabulary has fewer words."""
    found = []
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        if _WORD.fullmatch(data):
            found.append((token_id, data.decode()))
            if len(found) == NUM_TOKENS:
                return found
    raise ValueError(
        f"the tokenizer has {len(found)} tokens that are words behind a space, {NUM_TOKENS} are needed"
    )

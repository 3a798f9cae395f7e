"""Prompts that are text and have an exact number of tokens, so that every server reads the same ones."""

from __future__ import annotations

import argparse
import asyncio.base_events
import inspect
import pathlib
import random
import tarfile
import textwrap
import typing
from collections.abc import Sequence
from typing import Protocol

_TRIES = 200


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Book:
    """Text that every Python has, source code and prose, cut where its pieces come back as the tokens they were."""

    def __init__(self, tokenizer: Tokenizer, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(library_text() if text is None else text)

    def passage(self, num_tokens: int, rng: random.Random) -> str:
        """A random passage of exactly `num_tokens` tokens."""
        return self.after("", num_tokens, rng)

    def after(self, text: str, num_tokens: int, rng: random.Random) -> str:
        """A random passage that, appended to `text`, adds exactly `num_tokens` tokens and changes none of `text`.

        Text that a tokenizer does not map onto itself (cut characters, merges across the seam) is passed over. Raises
        ValueError when the book is too short or no such passage is found.
        """
        if num_tokens > len(self._ids):
            raise ValueError(f"{num_tokens} tokens wanted of a book of {len(self._ids)}")
        before = self._tokenizer.encode(text) if text else []
        for _ in range(_TRIES):
            start = rng.randrange(len(self._ids) - num_tokens + 1)
            ids = self._ids[start : start + num_tokens]
            piece = self._tokenizer.decode(ids)
            if self._tokenizer.encode(text + piece) == before + ids:
                return piece
        raise ValueError(f"no passage of {num_tokens} tokens that fits behind the text was found")

    def sharing(self, shared_tokens: int, own_tokens: Sequence[int], rng: random.Random) -> list[str]:
        """One prompt for each of `own_tokens`: a passage that all share and one of its own."""
        shared = self.passage(shared_tokens, rng) if shared_tokens else ""
        return [shared + self.after(shared, own, rng) for own in own_tokens]


def library_text() -> str:
    modules = (argparse, textwrap, pathlib, tarfile, asyncio.base_events, typing)
    return "".join(inspect.getsource(module) for module in modules)

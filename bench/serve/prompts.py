"""Prompts of a given length, as token ids or as text, made of pieces: the same piece is the same tokens every time."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Form = Literal["ids", "text"]
Piece = list[int] | str

# Short and frequent: with a space before it each is one token in nearly every vocabulary.
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "one",
    "had",
    "by",
    "word",
    "but",
    "not",
    "what",
    "all",
    "were",
    "we",
    "when",
    "your",
    "can",
    "said",
    "there",
    "use",
    "an",
    "each",
    "which",
    "she",
    "do",
    "how",
    "their",
    "if",
    "will",
    "up",
    "other",
    "about",
    "out",
    "many",
    "then",
    "them",
    "these",
    "so",
    "some",
    "her",
    "would",
    "make",
    "like",
    "him",
    "into",
    "time",
    "has",
    "look",
    "two",
    "more",
    "write",
    "go",
    "see",
    "number",
    "no",
    "way",
    "could",
    "people",
    "my",
    "than",
    "first",
    "water",
    "been",
    "call",
    "who",
    "oil",
    "its",
    "now",
    "find",
    "long",
    "down",
    "day",
    "did",
    "get",
    "come",
    "made",
    "may",
    "part",
    "over",
    "new",
    "sound",
    "take",
    "only",
    "little",
    "work",
    "know",
    "place",
    "year",
    "live",
    "me",
    "back",
    "give",
    "most",
    "very",
    "after",
    "thing",
    "our",
    "just",
    "name",
    "good",
    "sentence",
    "man",
    "think",
    "say",
    "great",
    "where",
    "help",
    "through",
    "much",
    "before",
    "line",
    "right",
    "too",
    "mean",
    "old",
    "any",
    "same",
    "tell",
    "boy",
    "follow",
    "came",
    "want",
    "show",
    "also",
    "around",
    "form",
    "three",
    "small",
    "set",
    "put",
    "end",
    "does",
    "another",
    "well",
    "large",
    "must",
    "big",
    "even",
    "such",
    "because",
    "turn",
    "here",
    "why",
    "ask",
    "went",
    "men",
    "read",
    "need",
    "land",
    "different",
    "home",
    "us",
    "move",
    "try",
    "kind",
    "hand",
    "picture",
    "again",
    "change",
    "off",
    "play",
    "spell",
    "air",
    "away",
    "animal",
    "house",
    "point",
    "page",
    "letter",
]


@dataclass(frozen=True)
class Part:
    """Tokens of a prompt. Parts with equal keys begin alike, and are equal where their lengths are."""

    key: Hashable
    num_tokens: int


class PromptMaker:
    def __init__(
        self, form: Form, *, seed: int, vocab_size: int = 32_000, words_per_token: float = 1.0
    ) -> None:
        self.form = form
        self._seed = seed
        self._first_id = 100 if vocab_size >= 1000 else min(3, vocab_size - 1)  # below: control tokens
        self._vocab_size = vocab_size
        self._words_per_token = words_per_token
        self._piece = lru_cache(maxsize=65_536)(self._make)

    def piece(self, part: Part) -> Piece:
        """Text begins with a space, so that pieces can be put together."""
        made = self._piece(part)
        return made if isinstance(made, str) else list(made)

    def join(self, pieces: Sequence[Piece]) -> Piece:
        if self.form == "text":
            return "".join(str(piece) for piece in pieces)
        return [token for piece in pieces if not isinstance(piece, str) for token in piece]

    def _make(self, part: Part) -> Piece:
        rng = random.Random(f"{self._seed}/{part.key}")
        if self.form == "ids":
            return rng.choices(range(self._first_id, self._vocab_size), k=part.num_tokens)
        count = max(1, round(part.num_tokens * self._words_per_token))
        return "".join(f" {word}" for word in rng.choices(_WORDS, k=count))

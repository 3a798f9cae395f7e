"""Token ids of words that came before: a prompt is mostly words that the tokenizer has split already.

A text is cut behind a letter (A to Z, a to z) that another ASCII character follows which is neither a letter nor an
apostrophe. The splits of GPT-2, Llama 3 and Qwen 2 have a boundary there whatever stands around it: none of their
alternatives goes on behind a letter but with letters, and none looks back. So the ids of the pieces, one after another,
are the ids of the text. `word_memo` gives a memo to tokenizers that are known to split in this way, and to no others.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

MAX_CHARS = (
    8192  # of a text; longer ones are better left to the library, which lets other threads run meanwhile
)
_MAX_WORDS = 65_536  # remembered: some 15 MB
_MAX_WORD_CHARS = 32
_MAX_NEW = 24  # words of one text that are looked at one by one; with more of them the whole text costs less
_LEARNED = 8  # of such a text, so that the next one like it has fewer

_cut = re.compile(r"(?<=[A-Za-z])(?=[\x00-&(-@\[-`{-\x7f])").split

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = {
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",  # Qwen 2
}


class WordMemo:
    """Thread-safe, as dicts are: what two threads find out at once is the same."""

    def __init__(self, backend: Tokenizer, added: dict[str, int], only_ascii: bool) -> None:
        """`added`: tokens that stand for a text wherever it occurs."""
        self._backend = backend
        self._only_ascii = only_ascii
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._fixed = {"": [], **{text: [token_id] for text, token_id in added.items()}}
        self._ids: dict[str, list[int]] = dict(self._fixed)

    def encode(self, text: str) -> list[int] | None:
        """Without special tokens around it. None: the whole text is to be encoded."""
        if self._only_ascii and not text.isascii():
            return None
        words = self._words(text)
        found: list[list[int] | None] = list(map(self._ids.get, words))
        if None in found:
            new = [place for place, ids in enumerate(found) if ids is None]
            if len(new) > _MAX_NEW:
                self._encode_all([words[place] for place in new[:_LEARNED]])
                return None
            for place, told in zip(new, self._encode_all([words[place] for place in new]), strict=True):
                found[place] = told
        joined: list[int] = []
        for ids in found:
            joined += ids  # type: ignore[arg-type]  # none is None any more
        return joined

    def _words(self, text: str) -> list[str]:
        if self._added is None or self._added.search(text) is None:
            return _cut(text)
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                words.append(part)
            else:
                words += _cut(part)
        return words

    def _encode_all(self, words: list[str]) -> list[list[int]]:
        # One by one: a batch of several is shared out to threads, which for words costs twice what it does.
        encode = self._backend.encode_batch_fast
        all_ids: list[list[int]] = [encode([word], add_special_tokens=False)[0].ids for word in words]
        if len(self._ids) > _MAX_WORDS:
            self._ids = dict(self._fixed)
        for word, ids in zip(words, all_ids, strict=True):
            if len(word) <= _MAX_WORD_CHARS:
                self._ids[word] = ids
        return all_ids


def word_memo(backend: Tokenizer) -> WordMemo | None:
    """None: it is not known that this tokenizer's texts can be cut."""
    described = json.loads(backend.to_str())
    added = described["added_tokens"]
    if backend.encode_special_tokens or not (
        _is_plain_bpe(described["model"])
        and _splits_behind_letters(described["pre_tokenizer"])
        and (described["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        and len({token["normalized"] for token in added})
        <= 1  # the library looks for one kind after the other
    ):
        return None
    only_ascii = described["normalizer"] is not None  # which NFC leaves as it is
    return WordMemo(backend, {token["content"]: token["id"] for token in added}, only_ascii)


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    """Each word by itself, without chance, and every byte known."""
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(name) for name in unusual)


def _splits_behind_letters(pre_tokenizer: dict[str, Any] | None) -> bool:
    """GPT-2's own split, with or without single digits before it, or one of those that are known."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return all(step["type"] == "Digits" for step in before)
    return len(before) == 1 and _is_known_split(before[0])


def _is_known_split(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _KNOWN_SPLITS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )

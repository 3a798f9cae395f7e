"""Token ids in, text out, one token at a time. The pieces put together are the text of all tokens decoded at once.

No piece ends inside a UTF-8 character: such a tail is held back until the tokens that complete it have come, or until
the end, where it becomes U+FFFD as it would in a decode of the whole. (One exception: byte fallback decodes a whole
run of byte tokens to U+FFFD when one of them is invalid; characters of such a run that are already out stay.)
"""

from __future__ import annotations

import codecs
from typing import Protocol

from router.chat.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes and a token at least one: what is still broken after that many never heals.
_MAX_HELD_TOKENS = 8


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often one token's, sometimes none or several tokens'."""

    def finish(self) -> str:
        """What was held back. Nothing may be pushed after it."""


def detokenizer(tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> Detokenizer:
    if tokenizer.byte_pieces is not None:
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        return _ByteLevelDetokenizer(tokenizer.byte_pieces, tokenizer.whole_pieces, hidden)
    return _WindowDetokenizer(tokenizer, skip_special_tokens)


class _ByteLevelDetokenizer:
    """For byte-level BPE, whose tokens are bytes whatever stands beside them: a table and a UTF-8 decoder.

    Nearly every token is whole characters, and is looked up; the decoder is for the others and what follows them.
    """

    def __init__(self, pieces: list[bytes], whole_pieces: list[str | None], hidden: frozenset[int]) -> None:
        self._pieces = pieces
        self._whole_pieces = whole_pieces
        self._hidden = hidden
        self._decoder: codecs.IncrementalDecoder | None = None  # while it holds half a character

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or token_id >= len(self._pieces):
            return ""
        decoder = self._decoder
        if decoder is None:
            whole = self._whole_pieces[token_id]
            if whole is not None:
                return whole
            decoder = self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self._pieces[token_id])
        if not decoder.getstate()[0]:
            self._decoder = None
        return text

    def finish(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", True)


class _WindowDetokenizer:
    """For every other decoder: decodes a short window twice, without and with the new tokens, and takes the rest.

    The window starts one emission back, so that what a decoder does to the first token (sentencepiece drops its
    space) falls on both decodes and cancels. The idea is text-generation-inference's.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._num_emitted = 0  # tokens of the window whose text is out
        self._emitted = ""  # their text, decoded alone

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or token_id >= self._tokenizer.vocab_size:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_emitted < _MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        if text.startswith(self._emitted):
            piece = text[len(self._emitted) :]
        else:  # byte fallback turns a whole run of bytes into U+FFFD when a later one is invalid
            piece = self._decode(self._window[self._num_emitted :])
        if piece:
            del self._window[: self._num_emitted]
            self._num_emitted = len(self._window)
            self._emitted = self._decode(self._window)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

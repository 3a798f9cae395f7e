"""Text to token ids and back, with the `tokenizers` library alone: the same ids as transformers' AutoTokenizer.

transformers adds two things to tokenizer.json when it loads it, and so does this file: added tokens that stand only in
tokenizer_config.json, and special tokens that are none in tokenizer.json. Whether a BOS token goes in front is said by
tokenizer.json's post-processor alone: transformers 5 no longer reads `add_bos_token` where there is a tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from router.chat.word_memo import MAX_CHARS, word_memo

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The model directory has no tokenizer that can be used. Raised at start, with the path."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the model directory; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return content


class TextTokenizer:
    """Encodes and decodes. Thread-safe: long prompts are encoded off the event loop."""

    def __init__(self, model_path: Path) -> None:
        path = model_path / "tokenizer.json"
        if not path.exists():
            raise TokenizerError(
                f"{path} does not exist: the router needs the model directory's fast tokenizer"
            )
        try:
            self._backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        config = read_json(model_path / "special_tokens_map.json") | read_json(
            model_path / "tokenizer_config.json"
        )
        self.special_tokens = _special_tokens(config)
        self._add_tokens_of(config)
        if config.get("split_special_tokens"):
            self._backend.encode_special_tokens = True
        self._memo = word_memo(self._backend)
        self._adds = self._backend.num_special_tokens_to_add(False)  # around a text
        self.eos_token_ids = _eos_token_ids(
            read_json(model_path / "generation_config.json"), self.token_id("eos_token")
        )
        self.special_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self.max_token_chars: int = max(map(len, vocab), default=1)
        self.byte_pieces = _byte_pieces(vocab, self.vocab_size) if self._is_byte_level() else None
        self.whole_pieces = [_whole(piece) for piece in self.byte_pieces or []]  # None: no whole characters
        self._decoded_pieces: dict[
            int, bytes
        ] = {}  # only where there is no byte alphabet; at most the vocabulary

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._memo is not None and len(text) <= MAX_CHARS and not (add_special_tokens and self._adds):
            found = self._memo.encode(text)
            if found is not None:
                return found
        # Unlike `encode`, a batch releases the GIL, and the fast one computes no offsets, which nobody asks for here.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary (a padded embedding has some) decode to nothing."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, ..."""
        content = self.special_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)

    def token_string(self, token_id: int) -> str:
        """As it stands in the vocabulary, e.g. 'Ġthe'; empty for an id beyond it."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for inside a text, special tokens included. May be half a UTF-8 character."""
        if self.byte_pieces is not None:
            return self.byte_pieces[token_id] if token_id < self.vocab_size else b""
        return self._decoded_token_bytes(token_id)

    def _decoded_token_bytes(self, token_id: int) -> bytes:
        piece = self._decoded_pieces.get(token_id)
        if piece is None:
            piece = self._decoded_pieces[token_id] = self._decode_piece(token_id)
        return piece

    def _decode_piece(self, token_id: int) -> bytes:
        string = self.token_string(token_id)
        if len(string) == 6 and string.startswith("<0x") and string.endswith(">"):
            return bytes([int(string[3:5], 16)])  # byte fallback of sentencepiece vocabularies
        # Decoders strip the space before the first token, so a token is decoded behind itself.
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :].encode()

    def _is_byte_level(self) -> bool:
        decoder = self._backend.decoder
        return decoder is not None and type(decoder).__name__ == "ByteLevel"

    def _add_tokens_of(self, config: dict[str, Any]) -> None:
        declared = config.get("added_tokens_decoder") or {}
        tokens = [
            _added_token(fields) for _, fields in sorted(declared.items(), key=lambda item: int(item[0]))
        ]
        present = {repr(token) for token in self._backend.get_added_tokens_decoder().values()}
        self._backend.add_tokens([token for token in tokens if repr(token) not in present])
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = [config[name] for name in SPECIAL_TOKENS if config.get(name)]
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for token in [*named, *(extra.values() if isinstance(extra, dict) else extra)]:
            if _content(token) not in added:
                added.add(_content(token))
                self._backend.add_special_tokens([_added_token(token)])


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _added_token(token: Any) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(str(token), special=True)
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: token[name] for name in names if name in token})


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    return {name: _content(config[name]) for name in SPECIAL_TOKENS if config.get(name)}


def _eos_token_ids(generation_config: dict[str, Any], eos_token_id: int | None) -> frozenset[int]:
    ids = generation_config.get("eos_token_id")
    if isinstance(ids, int):
        ids = [ids]
    if isinstance(ids, list):
        return frozenset(ids)
    return frozenset() if eos_token_id is None else frozenset({eos_token_id})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map between bytes and printable characters (openai/gpt-2, encoder.py: bytes_to_unicode), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    shifted = 256
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(shifted)] = byte
            shifted += 1
    return alphabet


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _byte_pieces(vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """[vocab_size]: the bytes of each token of a byte-level vocabulary.

    A token that has a character outside the alphabet (an added token with a space, say) stands for itself in UTF-8.
    """
    alphabet = _byte_alphabet()
    pieces = [b""] * vocab_size
    for string, token_id in vocab.items():
        try:
            pieces[token_id] = bytes([alphabet[char] for char in string])
        except KeyError:
            pieces[token_id] = string.encode()
    return pieces

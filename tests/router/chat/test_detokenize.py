from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat.detokenize import detokenizer
from router.chat.tokenizer import TextTokenizer


def pieces(tokenizer: TextTokenizer, ids: list[int], skip: bool = True) -> list[str]:
    incremental = detokenizer(tokenizer, skip)
    return [*map(incremental.push, ids), incremental.finish()]


@given(ids=st.lists(st.integers(0, 400), max_size=60), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_are_the_whole_decode_for_any_tokens(
    byte_level: TextTokenizer, ids: list[int], skip: bool
) -> None:
    assert "".join(pieces(byte_level, ids, skip)) == byte_level.decode(ids, skip)


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_pieces_of_encoded_text_are_the_text(
    byte_level: TextTokenizer, sentencepiece: TextTokenizer, text: str
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
        assert "".join(pieces(tokenizer, ids, skip=False)) == tokenizer.decode(ids, False)


@given(
    words=st.lists(
        st.sampled_from(["▁", "▁t", "h", "e", "</s>", "<s>", "<|im_end|>", "▁▁", "a"]), max_size=30
    )
)
@settings(max_examples=300, deadline=None)
def test_sentencepiece_spaces_and_special_tokens(sentencepiece: TextTokenizer, words: list[str]) -> None:
    ids = [token for word in words if (token := sentencepiece._backend.token_to_id(word)) is not None]
    for skip in (True, False):
        assert "".join(pieces(sentencepiece, ids, skip)) == sentencepiece.decode(ids, skip)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_no_piece_ends_inside_a_character(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("wheels 🙂🙃 東京 größer", add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids))


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_broken_tail_is_shown_at_the_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("the🙂", add_special_tokens=False)[:-1]
    got = pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(got[:-1])
    assert "\ufffd" in got[-1]
    assert "".join(got) == tokenizer.decode(ids)


def test_broken_bytes_for_ever_hold_back_little(sentencepiece: TextTokenizer) -> None:
    """A model gone astray must not make each token dearer than the last."""
    broken = sentencepiece._backend.token_to_id("<0xE2>")
    incremental = detokenizer(sentencepiece)
    shown = sum(len(incremental.push(broken)) for _ in range(2000))
    assert 1900 <= shown <= 2600
    assert len(incremental._window) < 20  # type: ignore[attr-defined]


def test_ids_beyond_the_vocabulary_are_nothing(
    byte_level: TextTokenizer, sentencepiece: TextTokenizer
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode("ab", add_special_tokens=False)
        assert "".join(pieces(tokenizer, [ids[0], 10**6, *ids[1:]])) == "ab"


def test_random_byte_tokens_keep_valid_text_intact(sentencepiece: TextTokenizer) -> None:
    """Byte fallback decodes a run of bytes as a whole; what was shown of it before stays."""
    rng = random.Random(5)
    for _ in range(200):
        word = sentencepiece._backend.token_to_id("a")
        run = [sentencepiece._backend.token_to_id(f"<0x{rng.randrange(256):02X}>") for _ in range(3)]
        ids = [*sentencepiece.encode("é€", add_special_tokens=False), *run, word]
        text = "".join(pieces(sentencepiece, ids))
        assert text.startswith("é€")
        assert text.endswith("a")

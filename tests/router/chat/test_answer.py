from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat.answer import AnswerReader, Piece
from router.chat.stops import StopAutomaton
from router.chat.tokenizer import TextTokenizer
from router.generation import TokenChunk
from router.sampling import TextOptions
from workers.protocol.messages import TokenLogprobs


def reader(tokenizer: TextTokenizer, **options: object) -> AnswerReader:
    text_options = TextOptions(**options)  # type: ignore[arg-type]
    automaton = StopAutomaton(text_options.stop) if text_options.stop else None
    return AnswerReader(tokenizer, text_options, automaton, (7,), want_logprobs=True)


def chunks(tokens: list[int], size: int, **last: object) -> list[TokenChunk]:
    parts = [tokens[start : start + size] for start in range(0, len(tokens), size)] or [[]]
    return [
        TokenChunk(part, **(last if index == len(parts) - 1 else {}))  # type: ignore[arg-type]
        for index, part in enumerate(parts)
    ]


def read(answer: AnswerReader, given: list[TokenChunk]) -> list[Piece]:
    pieces = []
    for chunk in given:
        pieces.append(answer.read(chunk))
        if pieces[-1].finish_reason:
            break
    return pieces


@given(text=st.text(max_size=50), size=st.integers(1, 7), cut=st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_text_is_cut_alike_however_tokens_come(
    byte_level: TextTokenizer, text: str, size: int, cut: int
) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False)
    stop = text[cut : cut + 3]
    answer = reader(byte_level, stop=(stop,) if stop else ())
    pieces = read(answer, chunks(tokens, size, finish_reason="length"))
    assert "".join(piece.text for piece in pieces) == (text[: text.find(stop)] if stop else text)
    assert pieces[-1].finish_reason == ("stop" if stop else "length")
    used = [token for piece in pieces for token in piece.token_ids]
    assert used == tokens[: len(used)]
    if stop:  # as many tokens as it took, not one more
        assert stop in byte_level.decode(used)
        assert stop not in byte_level.decode(used[:-1])


def test_stop_tokens(byte_level: TextTokenizer) -> None:
    tokens = byte_level.encode("ab", add_special_tokens=False)
    eos = byte_level.token_id("eos_token")
    assert eos is not None
    (piece,) = read(reader(byte_level), [TokenChunk([*tokens, eos], [], "stop", eos)])
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("ab", "stop", None)
    (piece,) = read(reader(byte_level), [TokenChunk([*tokens, 7], [], "stop", 7)])
    assert (piece.text, piece.stop_reason) == ("ab", 7)
    shown = read(
        reader(byte_level, include_stop=True, skip_special_tokens=False),
        [TokenChunk([*tokens, eos], [], "stop", eos)],
    )
    assert shown[0].text == "ab<|im_end|>"


def test_stop_strings_wait_for_min_tokens(byte_level: TextTokenizer) -> None:
    tokens = byte_level.encode("a", add_special_tokens=False) * 5
    answer = reader(byte_level, stop=("a",), min_tokens=3)
    (piece,) = read(answer, [TokenChunk(tokens, [], "length")])
    assert (piece.text, len(piece.token_ids), piece.stop_reason) == ("aaa", 4, "a")


def test_held_text_comes_with_the_last_piece(byte_level: TextTokenizer) -> None:
    tokens = byte_level.encode("wheels EN", add_special_tokens=False)
    pieces = read(reader(byte_level, stop=("END",)), chunks(tokens, 1, finish_reason="length"))
    assert "".join(piece.text for piece in pieces) == "wheels EN"
    assert pieces[-1].text == "EN"


def test_logprobs_have_bytes_offsets_and_no_infinity(byte_level: TextTokenizer) -> None:
    tokens = byte_level.encode("aé🙂b", add_special_tokens=False)
    given = [TokenLogprobs(-math.inf if i == 0 else -0.5, [(t, math.nan)]) for i, t in enumerate(tokens)]
    (piece,) = read(reader(byte_level), [TokenChunk(tokens, given, "length")])
    assert b"".join(entry.data for entry in piece.logprobs).decode() == "aé🙂b"
    assert piece.logprobs[0].logprob == -9999.0
    assert piece.logprobs[0].top == [(piece.logprobs[0].data, -9999.0)]
    for entry in piece.logprobs:
        assert "aé🙂b"[entry.offset :].encode().startswith(entry.data) or not entry.data.isascii()
    assert piece.logprobs[-1].offset == 3

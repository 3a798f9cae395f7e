"""The tokens of one answer become text: detokenized, cut at stop strings, with the tokens' probabilities if asked."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from router.chat.detokenize import detokenizer
from router.chat.stops import StopAutomaton, StopScanner
from router.chat.tokenizer import TextTokenizer
from router.generation import TokenChunk
from router.sampling import TextOptions
from workers.protocol.messages import FinishReason, TokenLogprobs

# JSON has no -inf. The value that OpenAI and vLLM send for "as good as impossible".
LEAST_LOGPROB = -9999.0


@dataclass(slots=True)
class TokenText:
    """One token and how likely it was (natural log)."""

    data: bytes  # may be half a character
    logprob: float
    top: list[tuple[bytes, float]]  # most likely first
    offset: int  # characters of the answer before this token


class Piece(Struct):
    """What one chunk of tokens adds to an answer. `text` may lag behind `token_ids`; the last piece catches up."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenText] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the client's stop token id that ended it
    cached_tokens: int = 0


class AnswerReader:
    """Of one sequence. After a piece with a finish_reason nothing more is read."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        options: TextOptions,
        automaton: StopAutomaton | None = None,
        stop_token_ids: tuple[int, ...] = (),
        want_logprobs: bool = False,
    ) -> None:
        """`automaton` is that of `options.stop`; choices of one request share it."""
        self._tokenizer = tokenizer
        self._options = options
        self._detokenizer = detokenizer(tokenizer, options.skip_special_tokens)
        self._scanner = None if automaton is None else StopScanner(automaton, options.include_stop)
        self._push = self._detokenizer.push
        self._plain = self._scanner is None and not want_logprobs  # text is all that is asked for
        self._stop_token_ids = stop_token_ids
        self._want_logprobs = want_logprobs
        self._num_tokens = 0
        self._num_chars = 0  # of detokenized text, held back or not

    def read(self, chunk: TokenChunk) -> Piece:
        if self._plain and chunk.finish_reason is None:
            return Piece(
                "".join(map(self._push, chunk.tokens)), chunk.tokens, [], None, None, chunk.cached_tokens
            )
        text = ""
        logprobs: list[TokenText] = []
        last = len(chunk.tokens) - 1
        for position, token in enumerate(chunk.tokens):
            if self._want_logprobs and position < len(chunk.logprobs):
                logprobs.append(self._token_text(token, chunk.logprobs[position]))
            ends_here = position == last and chunk.stop_token == token
            if not ends_here or self._options.include_stop:
                text += self._add(self._push(token))
            self._num_tokens += 1
            if self._scanner is not None and self._scanner.found is not None:
                token_ids = chunk.tokens[: position + 1]
                return Piece(text, token_ids, logprobs, "stop", self._scanner.found, chunk.cached_tokens)
        piece = Piece(text, chunk.tokens, logprobs, cached_tokens=chunk.cached_tokens)
        if chunk.finish_reason is not None:
            self._finish(piece, chunk)
        return piece

    def _finish(self, piece: Piece, chunk: TokenChunk) -> None:
        piece.text += self._add(self._detokenizer.finish())
        piece.finish_reason = chunk.finish_reason
        if self._scanner is not None:
            piece.text += self._scanner.finish()
            if self._scanner.found is not None:
                piece.finish_reason, piece.stop_reason = "stop", self._scanner.found
                return
        if chunk.stop_token in self._stop_token_ids:
            piece.stop_reason = chunk.stop_token

    def _add(self, text: str) -> str:
        """The part of a token's text that may be shown now."""
        self._num_chars += len(text)
        if self._scanner is None or self._num_tokens < self._options.min_tokens:
            return text
        return self._scanner.push(text)

    def _token_text(self, token: int, given: TokenLogprobs) -> TokenText:
        token_bytes = self._tokenizer.token_bytes
        top = [(token_bytes(other), _finite(logprob)) for other, logprob in given.top]
        return TokenText(token_bytes(token), _finite(given.logprob), top, self._num_chars)


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # NaN compares false

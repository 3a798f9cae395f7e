"""Sequences of one request, run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.chat.answer import AnswerReader
from router.chat.tokenizer import TextTokenizer
from router.generation import Generation, TokenChunk, Unavailable
from router.metrics import RouterMetrics
from router.sampling import TextOptions
from router.sequences import Sequence, close, run_all
from tests.router.fake_dispatcher import FakeDispatcher
from tests.router.tiny_model import write_byte_level_model
from workers.protocol.messages import Sampling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level_model(Path(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def dispatcher(tokenizer: TextTokenizer) -> FakeDispatcher:
    return FakeDispatcher(tokenizer.vocab_size, tokenizer.encode("abc", False), 2)


def sequences(tokenizer: TextTokenizer, count: int) -> list[Sequence]:
    record = RouterMetrics().request("m", "test", 0.0)
    return [
        Sequence(
            Generation(str(index), [1], Sampling(max_tokens=100, seed=index)),
            AnswerReader(tokenizer, TextOptions()),
            record.sequence(1),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 50])
async def test_each_is_whole_and_in_order(
    dispatcher: FakeDispatcher, tokenizer: TextTokenizer, count: int
) -> None:
    texts = [""] * count
    async for index, piece in run_all(dispatcher, sequences(tokenizer, count)):
        texts[index] += piece.text
    assert texts == ["abc"] * count
    assert dispatcher.open == 0


@pytest.mark.parametrize("count", [1, 2, 50])
async def test_closing_early_closes_all(
    dispatcher: FakeDispatcher, tokenizer: TextTokenizer, count: int
) -> None:
    pieces = run_all(dispatcher, sequences(tokenizer, count))
    await anext(pieces)
    await close(pieces)
    assert dispatcher.open == 0
    assert len(asyncio.all_tasks()) == 1


async def test_the_first_error_ends_the_others(dispatcher: FakeDispatcher, tokenizer: TextTokenizer) -> None:
    async def third_fails(generation: Generation) -> AsyncIterator[TokenChunk]:
        yield TokenChunk([5])
        if generation.request_id == "2":
            raise Unavailable("gone")
        await asyncio.sleep(10)

    dispatcher.script = third_fails
    seen = []

    async def read() -> None:
        async for index, _ in run_all(dispatcher, sequences(tokenizer, 4)):
            seen.append(index)

    with pytest.raises(Unavailable, match="gone"):
        await read()
    assert sorted(seen) == [0, 1, 2, 3]
    assert dispatcher.open == 0

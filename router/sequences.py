"""Runs the sequences of one request: tokens from the dispatcher, pieces of text out, each closed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from router.chat.answer import AnswerReader, Piece
from router.generation import Dispatcher, Generation, GenerationError
from router.metrics import SequenceRecord


@dataclass(slots=True)
class Sequence:
    generation: Generation
    reader: AnswerReader
    record: SequenceRecord


async def run(dispatcher: Dispatcher, sequence: Sequence) -> AsyncIterator[Piece]:
    """Ends after the piece that has a finish_reason. Closing it cancels the sequence everywhere."""
    chunks = dispatcher.generate(sequence.generation)
    read, measure = sequence.reader.read, sequence.record.tokens
    try:
        async for chunk in chunks:
            piece = read(chunk)
            measure(len(piece.token_ids), piece.cached_tokens)
            yield piece
            if piece.finish_reason is not None:
                return
        raise GenerationError("the stream of tokens ended without a finish reason")
    finally:
        sequence.record.end()
        await close(chunks)


async def run_all(dispatcher: Dispatcher, sequences: list[Sequence]) -> AsyncIterator[tuple[int, Piece]]:
    """(index of the sequence, piece), interleaved as they come. The first error ends them all."""
    if len(sequences) == 1:
        pieces = run(dispatcher, sequences[0])
        try:
            async for piece in pieces:
                yield 0, piece
        finally:
            await close(pieces)
        return
    queue: asyncio.Queue[tuple[int, Piece] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        pieces = run(dispatcher, sequences[index])
        try:
            async for piece in pieces:
                queue.put_nowait((index, piece))
        finally:
            await close(pieces)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(sequences))]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what ended it
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def close(iterator: AsyncIterator[object]) -> None:
    """Async generators are closed at once, not when they are collected; other iterators have nothing to close."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()

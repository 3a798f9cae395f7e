"""Runs the sequences of one request: tokens from the dispatcher, pieces of text out, each closed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from router.chat.answer import AnswerReader, Piece
from router.generation import Dispatcher, Generation, GenerationError
from router.metrics import SequenceRecord

_QUEUED_PIECES = 16  # of each sequence; when its reader is slower, the rest waits in the attempt's inbox


@dataclass(slots=True)
class Sequence:
    generation: Generation
    reader: AnswerReader
    record: SequenceRecord


async def run(dispatcher: Dispatcher, sequence: Sequence, write: Callable[[Piece], Awaitable[None]]) -> None:
    """Hands each piece to `write`; the last has a finish_reason. Cancelling it cancels the sequence everywhere.

    A call back, not a generator: one more generator around the dispatcher's would be felt with every token.
    """
    chunks = dispatcher.generate(sequence.generation)
    read, measure = sequence.reader.read, sequence.record.tokens
    try:
        async for chunk in chunks:
            piece = read(chunk)
            measure(len(piece.token_ids), piece.cached_tokens)
            await write(piece)
            if piece.finish_reason is not None:
                return
        raise GenerationError("the stream of tokens ended without a finish reason")
    finally:
        sequence.record.end()
        await close(chunks)


async def run_all(dispatcher: Dispatcher, sequences: list[Sequence]) -> AsyncIterator[tuple[int, Piece]]:
    """(index of the sequence, piece), interleaved as they come. The first error ends them all."""
    queue: asyncio.Queue[tuple[int, Piece] | asyncio.Task[None]] = asyncio.Queue()
    room = asyncio.Semaphore(_QUEUED_PIECES * len(sequences))

    def writer(index: int) -> Callable[[Piece], Awaitable[None]]:
        async def write(piece: Piece) -> None:
            await room.acquire()
            queue.put_nowait((index, piece))

        return write

    tasks = [
        asyncio.create_task(run(dispatcher, sequence, writer(index)))
        for index, sequence in enumerate(sequences)
    ]
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
                room.release()
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

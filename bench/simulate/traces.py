"""Traces: published ones, and sessions of bench's own.

Mooncake names each block of 512 prompt tokens by a number, equal numbers being equal prefixes. Azure's tells only
lengths. In sessions every turn sends again all that was said, so that prompts and answers of one turn are the prefix of
the next; their hashes are the real ones, of made-up tokens.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.simulate.jobs import Asked
from workers.protocol.hashes import HASH_BYTES, extend_hashes, hash_root

MOONCAKE_BLOCK = 512  # tokens


class TraceError(ValueError):
    """A trace that can't be read; the message names file, line and field."""


def _name(*parts: object) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:HASH_BYTES]


# --- published ------------------------------------------------------------------------------------------------------


def read_mooncake(path: Path, block_size: int = MOONCAKE_BLOCK, most: int | None = None) -> list[Asked]:
    """JSONL with timestamp (ms), input_length, output_length, hash_ids. Blocks of the answers are nobody else's."""
    if block_size < 1 or MOONCAKE_BLOCK % block_size:
        raise TraceError(
            f"block size {block_size}: the trace's blocks of {MOONCAKE_BLOCK} tokens must be a multiple"
        )
    parts = MOONCAKE_BLOCK // block_size
    names: dict[int, tuple[bytes, ...]] = {}
    trace = []
    for number, row in enumerate(_mooncake_rows(path, most)):
        prompt, output, ids = row
        full = prompt // block_size
        hashes: list[bytes] = []
        for block in ids:
            found = names.get(block)
            if found is None:
                found = names[block] = tuple(_name(block, part) for part in range(parts))
            hashes += found
        del hashes[full:]
        total = (prompt + output[0]) // block_size
        hashes += [_name("answer", number, at) for at in range(full, total)]
        trace.append(Asked(output[1], prompt, output[0], tuple(hashes)))
    return trace


def _mooncake_rows(path: Path, most: int | None) -> Iterator[tuple[int, tuple[int, float], list[int]]]:
    with _open(path) as lines:
        for at, line in enumerate(lines, 1):
            if most is not None and at > most:
                return
            try:
                row: dict[str, Any] = json.loads(line)
            except ValueError as error:
                raise TraceError(f"{path}:{at}: not JSON: {error}") from None
            where = f"{path}:{at}"
            prompt = _length(row, "input_length", where)
            output = _length(row, "output_length", where)
            time_ms = row.get("timestamp")
            if not isinstance(time_ms, int | float) or time_ms < 0:
                raise TraceError(f"{where}: timestamp is {time_ms!r}: it must be milliseconds, 0 or more")
            ids = row.get("hash_ids")
            if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
                raise TraceError(f"{where}: hash_ids must be a list of integers")
            if len(ids) < prompt // MOONCAKE_BLOCK:
                raise TraceError(
                    f"{where}: {len(ids)} hash_ids for {prompt} tokens, blocks of {MOONCAKE_BLOCK} need "
                    f"{prompt // MOONCAKE_BLOCK}"
                )
            yield prompt, (output, time_ms / 1000), ids


def endless_block_hits(path: Path) -> tuple[int, int]:
    """(blocks of a Mooncake trace that came before in it, all blocks): hits with endless memory, partial blocks too."""
    seen: set[int] = set()
    hits = total = 0
    for _, _, ids in _mooncake_rows(path, None):
        total += len(ids)
        hits += sum(block in seen for block in ids)
        seen.update(ids)
    return hits, total


def read_azure(path: Path, block_size: int, most: int | None = None) -> list[Asked]:
    """CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Nobody shares anything."""
    trace: list[Asked] = []
    first: datetime | None = None
    with _open(path) as lines:
        rows = csv.DictReader(lines)
        wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
        if missing := sorted(wanted - set(rows.fieldnames or ())):
            raise TraceError(f"{path}: column {missing[0]} is missing")
        for at, row in enumerate(rows, 2):
            if most is not None and len(trace) >= most:
                break
            where = f"{path}:{at}"
            try:
                # Seven digits of a second; datetime knows six.
                moment = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                lengths: dict[str, Any] = {
                    name: int(row[name]) for name in ("ContextTokens", "GeneratedTokens")
                }
            except (TypeError, ValueError) as error:
                raise TraceError(f"{where}: {error}") from None
            prompt = _length(lengths, "ContextTokens", where)
            output = _length(lengths, "GeneratedTokens", where)
            first = first or moment
            total = (prompt + output) // block_size
            hashes = tuple(_name("azure", at, block) for block in range(total))
            trace.append(Asked((moment - first).total_seconds(), prompt, output, hashes))
    return trace


def _open(path: Path) -> Any:
    try:
        return path.open(newline="")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}; give the file with --trace") from None


def _length(row: dict[str, Any], field: str, where: str) -> int:
    value = row.get(field)
    if not isinstance(value, int) or value < 1:
        raise TraceError(f"{where}: {field} is {value!r}: it must be an integer of at least 1")
    return value


# --- sessions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SessionsShape:
    """Multi-turn conversations, by default like those of agents: long prompts that grow, short answers.

    Lengths are drawn from ranges, evenly; times are in seconds.
    """

    sessions: int = 1500
    turns: tuple[int, int] = (2, 10)
    think_s: float = 5.0  # mean of an exponential pause between an answer and the next question
    question_tokens: tuple[int, int] = (1000, 8000)
    answer_tokens: tuple[int, int] = (50, 400)
    system_prompts: int = 32
    system_tokens: tuple[int, int] = (2000, 12_000)
    zipf: float = 1.0  # popularity of the n-th system prompt is n ** -zipf
    per_s: float = 1.0  # sessions begun, a Poisson stream; the rate is scaled by the load
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("turns", "question_tokens", "answer_tokens", "system_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise TraceError(f"{name} is {low} to {high}: it must be a range that begins at 1 or above")
        for name in ("sessions", "system_prompts"):
            if getattr(self, name) < 1:
                raise TraceError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.think_s < 0 or self.zipf < 0 or not self.per_s > 0:
            raise TraceError("think_s and zipf must be 0 or more, per_s above 0")


def sessions(shape: SessionsShape, block_size: int) -> list[Asked]:
    """Turns in the order in which they would come if answers took no time."""
    rng = random.Random(f"sessions/{shape.seed}")
    root = hash_root("simulated", "bfloat16", block_size)
    prompts = [_tokens(rng, rng.randint(*shape.system_tokens)) for _ in range(shape.system_prompts)]
    heads: list[list[bytes]] = [[] for _ in prompts]
    for prompt, head in zip(prompts, heads, strict=True):
        extend_hashes(head, prompt, block_size, root)
    popular = list(accumulate((n + 1) ** -shape.zipf for n in range(len(prompts))))
    turns: list[tuple[float, int, int, Asked]] = []  # (about when, session, turn, ...)
    start_s = 0.0
    for session in range(shape.sessions):
        start_s += rng.expovariate(shape.per_s)
        chosen = bisect_left(popular, rng.random() * popular[-1])
        stream, hashes = list(prompts[chosen]), list(heads[chosen])
        about_s, pause_s = start_s, start_s
        for turn in range(rng.randint(*shape.turns)):
            if turn:
                pause_s = rng.expovariate(1 / shape.think_s) if shape.think_s else 0.0
                about_s += pause_s
            stream += _tokens(rng, rng.randint(*shape.question_tokens))
            prompt_tokens = len(stream)
            stream += _tokens(rng, rng.randint(*shape.answer_tokens))
            extend_hashes(hashes, stream, block_size, root)
            asked = Asked(pause_s, prompt_tokens, len(stream) - prompt_tokens, tuple(hashes))
            turns.append((about_s, session, turn, asked))
    turns.sort(key=lambda entry: entry[:3])
    number_of = {(session, turn): number for number, (_, session, turn, _) in enumerate(turns)}
    return [
        asked
        if turn == 0
        else Asked(
            asked.at_s,
            asked.prompt_tokens,
            asked.output_tokens,
            asked.hashes,
            after=number_of[session, turn - 1],
        )
        for _, session, turn, asked in turns
    ]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return list(memoryview(rng.randbytes(2 * count)).cast("H"))


# --- about a trace --------------------------------------------------------------------------------------------------


def rate_per_s(trace: Sequence[Asked]) -> float:
    """Requests a second, all turns of a session counted where it begins."""
    starts = [asked.at_s for asked in trace if asked.after is None]
    span = max(starts) - min(starts) if starts else 0.0
    if span <= 0:
        raise TraceError("all requests of the trace come at once: it has no rate to scale")
    return len(trace) / span


def endless_tokens(trace: Sequence[Asked], block_size: int) -> list[int]:
    """Prompt tokens of each request that one cache without an end, known to all at once, would save, in the order of
    the trace."""
    seen: set[bytes] = set()
    saved = []
    for asked in trace:
        usable = (asked.prompt_tokens - 1) // block_size
        depth = 0
        for block_hash in asked.hashes[:usable]:
            if block_hash not in seen:
                break
            depth += 1
        saved.append(depth * block_size)
        seen.update(asked.hashes)
    return saved

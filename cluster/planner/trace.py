"""Recorded load as it is published: Mooncake's JSONL (lengths and block hashes) and Azure's CSV (lengths)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

MOONCAKE_BLOCK = 512  # tokens that one hash id stands for


class TraceError(ValueError):
    """The file cannot be read as a trace; the message says where and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`at_s` counts from the first request. Equal ids in `blocks`, from the first on, are equal prefixes."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """In order of time. `block_tokens`: tokens of each of a request's `blocks`, the last one perhaps fewer."""

    requests: tuple[TraceRequest, ...]
    block_tokens: int = MOONCAKE_BLOCK

    @property
    def seconds(self) -> float:
        return self.requests[-1].at_s

    def changed(self, *, speedup: float = 1.0, scale: float = 1.0, limit: int | None = None) -> Trace:
        """The first `limit` requests, `speedup` times as fast, with lengths times `scale`; prefixes stay shared.

        Raises ValueError for a scale that leaves a block no token.
        """
        block = round(self.block_tokens * scale)
        if block < 1:
            raise ValueError(f"scale: {scale:g} leaves nothing of blocks of {self.block_tokens} tokens")
        scale = block / self.block_tokens
        return Trace(
            tuple(
                replace(
                    request,
                    at_s=request.at_s / speedup,
                    prompt_tokens=max(1, round(request.prompt_tokens * scale)),
                    output_tokens=max(1, round(request.output_tokens * scale)),
                )
                for request in self.requests[:limit]
            ),
            block,
        )


def read_trace(path: Path) -> Trace:
    """By its content. Raises TraceError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path} can't be read: {error}") from error
    lines = text.splitlines()
    found = list(_mooncake(lines) if text.lstrip().startswith("{") else _azure(lines))
    if not found:
        raise TraceError(f"trace {path} has no requests")
    found.sort(key=lambda request: request.at_s)
    start = found[0].at_s
    return Trace(tuple(replace(request, at_s=request.at_s - start) for request in found))


def _mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            request = TraceRequest(
                at_s=float(entry["timestamp"]) / 1000,
                prompt_tokens=int(entry["input_length"]),
                output_tokens=int(entry["output_length"]),
                blocks=tuple(int(block) for block in entry.get("hash_ids", ())),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise TraceError(
                f"line {number} of the trace: {type(error).__name__} {error}; wanted is "
                '{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}'
            ) from None
        yield _checked(request, number)


def _azure(lines: list[str]) -> Iterator[TraceRequest]:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = csv.DictReader(lines)
    if not set(columns) <= set(rows.fieldnames or ()):
        raise TraceError(
            f"the trace is neither Mooncake JSONL nor a CSV with {', '.join(columns)}: "
            f"its first line is {(lines or [''])[0]!r:.100}"
        )
    for number, row in enumerate(rows, 2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])  # published with seven digits of a second
            request = TraceRequest(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, TypeError) as error:
            raise TraceError(f"line {number} of the trace: {error}") from None
        yield _checked(request, number)


def _checked(request: TraceRequest, number: int) -> TraceRequest:
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        raise TraceError(
            f"line {number} of the trace: {request.prompt_tokens} tokens in, {request.output_tokens} out; "
            "allowed are 1 or more in, 0 or more out"
        )
    return replace(request, output_tokens=max(1, request.output_tokens))  # every answer has a first token

"""Traces as they are published, and limits as they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.planner.slo import Slo
from cluster.planner.trace import TraceError, TraceRequest, read_trace

MOONCAKE = (
    '{"timestamp": 3000, "input_length": 600, "output_length": 50, "hash_ids": [0, 1]}\n'
    '{"timestamp": 4500, "input_length": 1025, "output_length": 7, "hash_ids": [0, 2, 3]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,0\n"
)


def written(directory: Path, text: str) -> Path:
    path = directory / "trace"
    path.write_text(text)
    return path


def test_mooncake(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE))
    assert trace.requests == (TraceRequest(0.0, 600, 50, (0, 1)), TraceRequest(1.5, 1025, 7, (0, 2, 3)))
    assert trace.seconds == 1.5


def test_azure(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE)).requests
    assert (first.prompt_tokens, first.output_tokens) == (4808, 10)
    assert second.at_s == pytest.approx(0.052)
    assert second.output_tokens == 1  # there is no answer without a token


def test_changed(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE)).changed(speedup=3, scale=0.125)
    assert trace.block_tokens == 64
    assert [r.prompt_tokens for r in trace.requests] == [75, 128]
    assert trace.requests[1].at_s == pytest.approx(0.5)
    assert len(read_trace(written(tmp_path, MOONCAKE)).changed(limit=1).requests) == 1
    with pytest.raises(ValueError, match="leaves nothing"):
        trace.changed(scale=0.001)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "neither Mooncake JSONL nor a CSV"),
        ("a,b\n1,2\n", "'a,b'"),
        ('{"timestamp": 1}\n', "line 1 of the trace: KeyError 'input_length'"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "0 tokens in"),
        (AZURE + "yesterday,1,1\n", "line 4"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(TraceError) as error:
        read_trace(written(tmp_path, text))
    assert told in str(error.value)


def test_limits() -> None:
    slo = Slo.parse("ttft=1.0, tpot=0.05")
    assert slo == Slo(1.0, 0.05)
    assert slo.met(1.0, 0.05, 99.0)
    assert not slo.met(1.01, 0.01, 0.0)
    assert slo.shown() == "ttft ≤ 1 s, tpot ≤ 0.05 s"


@pytest.mark.parametrize("text", ["", "ttft", "ttft=soon", "ttft=-1", "ttft=1,ttft=2", "itl=1", "ttft=nan"])
def test_limits_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="slo: "):
        Slo.parse(text)

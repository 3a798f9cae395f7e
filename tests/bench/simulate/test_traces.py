"""Reading traces and making sessions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.simulate.jobs import Asked
from bench.simulate.traces import (
    SessionsShape,
    TraceError,
    endless_block_hits,
    endless_tokens,
    rate_per_s,
    read_azure,
    read_mooncake,
    sessions,
)

TRACES = Path(os.environ.get("HEADRACE_TRACES", Path(__file__).parents[4] / "shared" / "traces"))
CONVERSATION = TRACES / "mooncake" / "conversation_trace.jsonl"
AZURE = TRACES / "azure" / "AzureLLMInferenceTrace_code.csv"

ROWS = [
    {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 9]},
    {"timestamp": 500, "input_length": 1024, "output_length": 600, "hash_ids": [7, 8]},
]


def written(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncake_blocks_become_names_and_answers_are_nobody_elses(tmp_path: Path) -> None:
    first, second = read_mooncake(written(tmp_path / "t.jsonl", ROWS))
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 1100, 3)
    assert (second.at_s, second.prompt_tokens, second.output_tokens) == (0.5, 1024, 600)
    assert first.hashes == second.hashes[:2]  # the block with id 9 is not full
    assert len(second.hashes) == (1024 + 600) // 512
    assert all(len(name) == 16 for name in second.hashes)
    assert len(set(second.hashes)) == 3


def test_smaller_blocks_divide_those_of_the_trace(tmp_path: Path) -> None:
    first, second = read_mooncake(written(tmp_path / "t.jsonl", ROWS), 16)
    assert len(first.hashes) == 1103 // 16
    assert first.hashes[:64] == second.hashes[:64]  # all of 1,024 tokens
    with pytest.raises(TraceError, match="block size 100"):
        read_mooncake(tmp_path / "t.jsonl", 100)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input_length": 0}, "t.jsonl:2: input_length is 0: it must be"),
        ({"output_length": "x"}, "output_length is 'x'"),
        ({"timestamp": None}, "timestamp is None"),
        ({"hash_ids": [1]}, "1 hash_ids for 1024 tokens"),
        ({"hash_ids": "ab"}, "hash_ids must be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = written(tmp_path / "t.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(TraceError, match=told):
        read_mooncake(path)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="give the file with --trace"):
        read_mooncake(tmp_path / "none.jsonl")
    (tmp_path / "t.jsonl").write_text("nonsense\n")
    with pytest.raises(TraceError, match=r"t\.jsonl:1: not JSON"):
        read_mooncake(tmp_path / "t.jsonl")


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.0319600,3180,8\n"
    )
    first, second = read_azure(path, 512)
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.at_s == pytest.approx(1.052)
    assert not set(first.hashes) & set(second.hashes)
    assert rate_per_s([first, second]) == pytest.approx(2 / 1.052)
    path.write_text("TIMESTAMP,ContextTokens\n")
    with pytest.raises(TraceError, match="GeneratedTokens is missing"):
        read_azure(path, 512)


def test_every_turn_begins_with_all_that_was_said() -> None:
    shape = SessionsShape(sessions=30, turns=(2, 4), system_prompts=2)
    turns = sessions(shape, 16)
    assert turns == sessions(shape, 16)
    followers = [asked for asked in turns if asked.after is not None]
    assert followers
    for asked in followers:
        assert asked.after is not None
        before = turns[asked.after]
        assert asked.hashes[: len(before.hashes)] == before.hashes
        assert asked.prompt_tokens > before.prompt_tokens + before.output_tokens
        assert len(asked.hashes) == (asked.prompt_tokens + asked.output_tokens) // 16
    heads = {asked.hashes[0] for asked in turns}
    assert len(heads) == 2


def test_popular_system_prompts_are_popular() -> None:
    turns = sessions(
        SessionsShape(sessions=2000, turns=(1, 1), system_prompts=8, zipf=1.0, question_tokens=(9, 99)), 64
    )
    counts = sorted(
        (sum(a.hashes[0] == head for a in turns) for head in {a.hashes[0] for a in turns}), reverse=True
    )
    assert len(counts) == 8
    total = sum(1 / n for n in range(1, 9))
    assert counts[0] / 2000 == pytest.approx(1 / total, abs=0.04)
    assert counts[1] / counts[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"turns": (0, 3)}, "turns"), ({"sessions": 0}, "sessions"), ({"zipf": -1.0}, "zipf")],
)
def test_a_shape_that_makes_no_sense(change: dict[str, object], told: str) -> None:
    with pytest.raises(TraceError, match=told):
        SessionsShape(**change)  # type: ignore[arg-type]


def test_endless_memory_by_brute_force() -> None:
    turns = sessions(SessionsShape(sessions=12, turns=(1, 4), system_prompts=2), 64)
    saved = 0
    for number, asked in enumerate(turns):
        best = 0
        for before in turns[:number]:
            same = 0
            for mine, other in zip(
                asked.hashes[: (asked.prompt_tokens - 1) // 64], before.hashes, strict=False
            ):
                if mine != other:
                    break
                same += 1
            best = max(best, same)
        saved += best * 64
    assert sum(endless_tokens(turns, 64)) == saved > 0


def test_the_last_block_is_computed_even_when_it_is_cached() -> None:
    asked = Asked(0.0, 128, 1, (b"a" * 16, b"b" * 16))
    assert endless_tokens([asked, asked], 64) == [0, 64]  # of 128: a token must be sampled from something


def test_all_at_once_has_no_rate() -> None:
    with pytest.raises(TraceError, match="no rate"):
        rate_per_s([Asked(0.0, 1, 1, ())])


@pytest.mark.skipif(not CONVERSATION.is_file(), reason=f"the published trace is not at {CONVERSATION}")
def test_mooncake_conversation_hits_36_6_percent_of_blocks() -> None:
    hits, total = endless_block_hits(CONVERSATION)
    assert total == 288_500
    assert round(hits / total, 3) == 0.366


@pytest.mark.skipif(not AZURE.is_file(), reason=f"the published trace is not at {AZURE}")
def test_azure_is_read_whole() -> None:
    assert len(read_azure(AZURE, 512)) == 8819

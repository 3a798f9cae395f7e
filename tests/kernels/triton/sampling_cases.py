"""What test_triton.py runs in a process of its own, under Triton's interpreter or on the GPU: draws against the CPU's.

Tokens must be equal but where a decision lies within rounding: sums of float64 behind top-p are added up in another
order. Such a row is excused only if the CPU's form itself gives the other token when top_p moves by _MARGIN.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference_step_inputs
from kernels.sampling import gumbel_noise, sample
from kernels.triton import step_inputs
from kernels.triton.sampling import NOT_A_NUMBER, SamplingRows, sample_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MARGIN = 1e-12


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0

    def on_cpu(self, logits: Tensor) -> int:
        return sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            position=self.position,
        )


def draw(logits: Tensor, rows: list[Row], piece: int = 64, room: int = 100) -> list[int]:
    params = SamplingRows.of(
        [row.temperature for row in rows],
        [row.top_k for row in rows],
        [row.top_p for row in rows],
        [row.min_p for row in rows],
        [row.seed for row in rows],
        [row.position for row in rows],
        DEVICE,
    )
    found: list[int] = sample_rows(logits.to(DEVICE), params, piece=piece, room=room).tolist()
    return found


def random_row(rng: random.Random, vocab: int) -> Row:
    def sometimes(value: float, off: float, share: float) -> float:
        return value if rng.random() < share else off

    return Row(
        sometimes(rng.choice([0.1, 0.7, 1.0, 1.3, 5.0, 1e-5, 1e-6]), 0.0, 0.9),
        int(sometimes(rng.choice([1, 2, 20, vocab // 2, vocab, vocab + 5]), 0, 0.5)),
        sometimes(rng.choice([0.05, 0.5, 0.9, 0.95, 0.999]), 1.0, 0.6),
        sometimes(rng.choice([0.001, 0.05, 0.3, 1.0]), 0.0, 0.3),
        rng.getrandbits(63),
        rng.randrange(5000),
    )


def random_logits(rng: random.Random, rows: int, vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = rng.choice([0.5, 3.0, 10.0]) * torch.randn(rows, vocab, generator=generator)
    if rng.random() < 0.3:
        logits = logits.round()  # ties everywhere
    return logits + rng.choice([0.0, -40.0, 60.0])


def check(seed: int, rounds: int, vocab: int, piece: int, room: int, count: int = 8) -> None:
    rng = random.Random(seed)
    excused = 0
    for _ in range(rounds):
        rows = [random_row(rng, vocab) for _ in range(count)]
        logits = random_logits(rng, count, vocab)
        for row, x, token in zip(rows, logits, draw(logits, rows, piece, room), strict=True):
            if token == row.on_cpu(x):
                continue
            moved = [replace(row, top_p=row.top_p + by).on_cpu(x) for by in (-_MARGIN, _MARGIN)]
            assert token in moved, (row, token, moved)
            excused += 1
    assert excused <= rounds * count // 50


@pytest.mark.parametrize(
    ("vocab", "piece", "room"),
    [
        (5, 16, 4),
        pytest.param(300, 64, 100, marks=pytest.mark.slow),
        (257, 512, 1000),
        pytest.param(1000, 64, 10, marks=pytest.mark.slow),
        pytest.param(5000, 1024, 512, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_cpu(vocab: int, piece: int, room: int) -> None:
    check(vocab, 1, vocab, piece, room, 6)


@pytest.mark.slow
def test_many_tokens_are_those_of_the_cpu() -> None:
    check(1, 6, 200, 64, 64, 8)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: the interpreter takes minutes for a real vocabulary")
def test_whole_vocabularies() -> None:
    for vocab in (32000, 128256, 151936):
        check(vocab, 20, vocab, 4096, 8192, 32)


def test_greedy_rows_and_ties() -> None:
    logits = torch.zeros(3, 200)
    logits[0, 130:] = 2.0
    logits[1, 64] = logits[1, 63] = 1.0
    assert draw(logits, [Row(0.0), Row(0.0, top_p=0.5), Row(1e-6, top_k=3)]) == [130, 63, 0]


def test_infinities_and_nan() -> None:
    logits = torch.zeros(4, 70)
    logits[0, 40] = torch.inf
    logits[1] = -torch.inf
    logits[2, :69] = -torch.inf
    logits[3, 66] = torch.nan
    for row in (Row(0.0), Row(1.0), Row(1.0, top_p=0.5), Row(1.0, top_k=2)):
        assert draw(logits, [row] * 4) == [40, 0, 69, NOT_A_NUMBER]


def test_a_tie_at_the_edge_of_the_share_goes_to_the_lower_ids() -> None:
    """Four of eight equals make half: the fifth is never drawn."""
    logits = torch.full((12, 90), -50.0)
    logits[:, 20:84:8] = 1.0
    rows = [Row(top_p=0.4999, seed=seed) for seed in range(12)]
    found = draw(logits, rows, piece=128)
    assert set(found) <= {20, 28, 36, 44}
    assert found == [row.on_cpu(logits[0]) for row in rows]


def test_ties_at_the_kth_place_stay() -> None:
    logits = torch.full((8, 90), -5.0)
    logits[:, 3] = 1.5
    logits[:, 40:43] = 1.0
    seeds = [seed for seed in range(100) if Row(seed=seed).on_cpu(logits[0]) in (41, 42)][:8]
    rows = [Row(top_k=2, seed=seed) for seed in seeds]
    assert draw(logits, rows, piece=128) == [Row(seed=seed).on_cpu(logits[0]) for seed in seeds]


def test_neither_the_batch_nor_the_pieces_nor_gaps_between_rows_change_a_token() -> None:
    rng = random.Random(3)
    rows = [random_row(rng, 150) for _ in range(5)]
    wide = torch.full((5, 190), torch.nan)
    wide[:, :150] = torch.randn(5, 150, generator=torch.Generator().manual_seed(2)) * 3
    together = draw(wide[:, :150], rows)
    assert together == [draw(wide[i : i + 1, :150], [row])[0] for i, row in enumerate(rows)]
    assert together == draw(wide[:, :150], rows, piece=256, room=8)


def test_noise_is_that_of_the_cpu() -> None:
    """Equal logits: the token is that of the most noise, here of every one that a row can have."""
    rows = [Row(seed=seed, position=2 * seed) for seed in range(12)]
    ids = torch.arange(500)
    want = [int(gumbel_noise(row.seed, row.position, ids).argmax()) for row in rows]
    assert draw(torch.zeros(12, 500), rows, piece=128) == want


def test_what_does_not_fit_is_said() -> None:
    rows = SamplingRows.of([1.0], [0], [1.0], [0.0], [0], [0], DEVICE)
    with pytest.raises(ValueError, match="are float32"):
        sample_rows(torch.zeros(1, 8, dtype=torch.float16, device=DEVICE), rows)
    with pytest.raises(ValueError, match="2 rows of logits and parameters of 1"):
        sample_rows(torch.zeros(2, 8, device=DEVICE), rows)
    none = SamplingRows.of([], [], [], [], [], [], DEVICE)
    assert sample_rows(torch.zeros(0, 8, device=DEVICE), none).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "seqs", "longest", "table_width"),
    [(1, 1, 1, 1), (5, 5, 9, 70), (1500, 7, 131, 33), (40, 3, 4400, 1300)],
)
def test_step_inputs(tokens: int, seqs: int, longest: int, table_width: int) -> None:
    """Tokens of the step before and tables spread to full width, between whose rows nothing else is written."""
    rng, block_size = torch.Generator().manual_seed(tokens), 4
    carried = torch.randint(-3, 9, (tokens,), generator=rng, dtype=torch.int32).clamp_min(-1)
    sampled = torch.randint(-1, 50, (9,), generator=rng)
    lengths = torch.randint(1, longest + 1, (seqs,), generator=rng, dtype=torch.int32)
    lengths[0] = longest
    blocks = torch.randint(1, 99, (seqs * table_width + 9,), generator=rng, dtype=torch.int32)
    block_start = torch.arange(seqs, dtype=torch.int32) * table_width + 3
    block_start[seqs - 1] -= seqs * table_width + 5 if seqs > 1 else 0  # one that only fills up
    results = []
    for place_inputs in (reference_step_inputs.place_inputs, step_inputs.place_inputs):
        token_ids = torch.arange(tokens, device=DEVICE)
        tables = torch.full((seqs + 1, table_width), 7, dtype=torch.int32, device=DEVICE)
        given = [one.to(DEVICE) for one in (carried, sampled, blocks, block_start, lengths)]
        place_inputs(token_ids, *given, tables[:seqs], block_size)
        results.append((token_ids.tolist(), tables.tolist()))
    assert results[0] == results[1]
    assert results[0][1][seqs] == [7] * table_width
    if seqs > 1:
        assert not any(results[0][1][seqs - 1])

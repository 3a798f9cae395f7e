"""The decoder against transformers on the same random weights, through a paged cache cut into chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.attention_step import AttentionStep
from tests.workers.models.test_rope import SCALINGS
from workers.models.decoder import Decoder, load_decoder
from workers.models.random_model import write_random_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BLOCK_SIZE = 4

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "mistral_window": {"model_type": "mistral", "sliding_window": 9},
    "mistral_no_window": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "qwen2_tied": {"model_type": "qwen2"},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3_window_biases": {
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    **{f"rope_{name}": {"rope_parameters": scaling, "head_dim": 32} for name, scaling in SCALINGS.items()},
}


class Sequence:
    """Runs token ids through a decoder step by step and keeps every position's logits."""

    def __init__(
        self, decoder: Decoder, kv_cache: torch.Tensor, token_ids: torch.Tensor, blocks: torch.Tensor
    ) -> None:
        self._decoder, self._kv_cache, self._token_ids, self.blocks = decoder, kv_cache, token_ids, blocks
        self.done = 0
        self.logits: list[torch.Tensor] = []


def step(decoder: Decoder, kv_cache: torch.Tensor, work: list[tuple[Sequence, int]]) -> None:
    """One forward pass that gives each sequence its next tokens."""
    ids, positions, slots, starts, lengths = [], [], [], [0], []
    tables = torch.zeros(len(work), max(len(seq.blocks) for seq, _ in work), dtype=torch.int64)
    for row, (seq, count) in enumerate(work):
        position = torch.arange(seq.done, seq.done + count)
        ids.append(seq._token_ids[position])
        positions.append(position)
        slots.append(seq.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        tables[row, : len(seq.blocks)] = seq.blocks
        starts.append(starts[-1] + count)
        seq.done += count
        lengths.append(seq.done)
    attention = AttentionStep.of(starts, lengths, tables, torch.cat(slots))
    logits = decoder.logits(decoder.forward(torch.cat(ids), torch.cat(positions), kv_cache, attention))
    for row, (seq, _) in enumerate(work):
        seq.logits.append(logits[starts[row] : starts[row + 1]])


S = TypeVar("S")


def mixed_steps(first: S, second: S) -> list[list[tuple[S, int]]]:
    """Prefill in chunks, decode, and both kinds in one step: all 41 tokens of the first, 30 of the second."""
    return [
        [(first, 17)],
        [(first, 1), (second, 9)],
        [(second, 1), (first, 5)],
        [(first, 1), (second, 1)],
        [(second, 18), (first, 16)],
        [(first, 1), (second, 1)],
    ]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_equals_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    write_random_model(tmp_path, config, seed=5)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    decoder = load_decoder(tmp_path, torch.float32, CPU)
    kv_cache = decoder.new_kv_cache(40, BLOCK_SIZE)
    blocks = torch.randperm(40)
    first = Sequence(decoder, kv_cache, torch.randint(0, 259, (41,)), blocks[:11])
    second = Sequence(decoder, kv_cache, torch.randint(0, 259, (30,)), blocks[11:19])
    for work in mixed_steps(first, second):
        step(decoder, kv_cache, work)
    for sequence in (first, second):
        with torch.no_grad():
            expected = theirs(sequence._token_ids[None]).logits[0]
        got = torch.cat(sequence.logits)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.fixture
def tiny(tmp_path: Path) -> Decoder:
    return load_decoder(write_random_model(tmp_path), torch.float32, CPU)


def one_prompt(decoder: Decoder, rows: torch.Tensor | None) -> torch.Tensor:
    kv_cache = decoder.new_kv_cache(4, BLOCK_SIZE)
    position = torch.arange(10)
    attention = AttentionStep.of(
        [0, 10], [10], torch.tensor([[1, 3, 2]]), torch.tensor([1, 3, 2])[position // 4] * 4 + position % 4
    )
    return decoder.forward(position + 5, position, kv_cache, attention, rows)


def test_rows_give_the_same_hidden_states(tiny: Decoder) -> None:
    whole = one_prompt(tiny, None)
    torch.testing.assert_close(one_prompt(tiny, torch.tensor([9, 2])), whole[[9, 2]], rtol=1e-5, atol=1e-5)
    assert one_prompt(tiny, torch.tensor([], dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(tmp_path: Path, dtype: torch.dtype) -> None:
    write_random_model(tmp_path, {"hidden_size": 128, "num_attention_heads": 8})
    exact = load_decoder(tmp_path, torch.float32, CPU)
    half = load_decoder(tmp_path, dtype, CPU)
    expected = exact.logits(one_prompt(exact, None)).log_softmax(-1)
    got = half.logits(one_prompt(half, None)).log_softmax(-1)
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert divergence.max() < 2e-2


def test_max_positions_bounds_the_table(tmp_path: Path) -> None:
    decoder = load_decoder(write_random_model(tmp_path), torch.float32, CPU, max_positions=8)
    assert decoder.max_positions == 8
    with pytest.raises((IndexError, RuntimeError)):
        one_prompt(decoder, None)


def test_packed_and_plain_linear_agree() -> None:
    from workers.models.linear import PackedLinear, PlainLinear, make_linear

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
        for rows in (0, 1, 5):
            x = torch.randn(rows, 40).to(dtype)
            expected = PlainLinear(weight, bias)(x)
            for linear in (PackedLinear(weight, bias), make_linear(weight, bias)):
                torch.testing.assert_close(linear(x), expected, rtol=tolerance, atol=tolerance)
    assert isinstance(make_linear(torch.randn(4, 4, dtype=torch.float64)), PlainLinear)

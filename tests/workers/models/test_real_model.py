"""SmolLM2-135M-Instruct itself, against transformers on the same converted directory."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.attention_step import AttentionStep
from workers.models.catalog import PreparedModel
from workers.models.decoder import Decoder, load_decoder

BLOCK_SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompt(smollm2: PreparedModel) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2.path)
    chat = [
        {
            "role": "user",
            "content": "Name three rivers of Europe, and say in one sentence what a headrace is.",
        }
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text)
    return ids


class Run:
    """One sequence on scattered blocks."""

    def __init__(self, decoder: Decoder, num_blocks: int = 20) -> None:
        self._decoder = decoder
        self._kv_cache = decoder.new_kv_cache(num_blocks, BLOCK_SIZE)
        self._blocks = torch.randperm(num_blocks)
        self._length = 0

    def step(self, token_ids: list[int]) -> torch.Tensor:
        positions = torch.arange(self._length, self._length + len(token_ids))
        self._length += len(token_ids)
        slots = self._blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        step = AttentionStep.of([0, len(token_ids)], [self._length], self._blocks[None], slots)
        hidden = self._decoder.forward(torch.tensor(token_ids), positions, self._kv_cache, step)
        return self._decoder.logits(hidden)


def test_float32_greedy_text_is_equal(smollm2: PreparedModel, prompt: list[int]) -> None:
    run = Run(load_decoder(smollm2.path, torch.float32, torch.device("cpu")))
    run.step(prompt[:30])
    logits = run.step(prompt[30:])
    ours: list[int] = []
    for _ in range(40):
        ours.append(int(logits[-1].argmax()))
        logits = run.step(ours[-1:])
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=-1
    )
    assert ours == expected[0, len(prompt) :].tolist()


def test_bfloat16_is_closer_to_float32_than_that_of_transformers(smollm2: PreparedModel) -> None:
    """Mean KL divergence from the float32 distribution on 512 tokens of text, read in one chunk and in many."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2.path)
    text: list[int] = tokenizer.encode(Path(textwrap.__file__).read_text())[:512]

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=dtype).eval()
        with torch.inference_mode():
            log_probs: torch.Tensor = model(torch.tensor([text])).logits[0].float().log_softmax(-1)
        return log_probs

    exact, rounded = theirs(torch.float32), theirs(torch.bfloat16)

    def divergence(other: torch.Tensor) -> float:
        return (exact.exp() * (exact - other)).sum(-1).mean().item()

    decoder = load_decoder(smollm2.path, torch.bfloat16, torch.device("cpu"))
    whole = Run(decoder, num_blocks=40).step(text).log_softmax(-1)
    pieces = Run(decoder, num_blocks=40)
    in_pieces = torch.cat([pieces.step(text[i : i + 37]) for i in range(0, 512, 37)]).log_softmax(-1)
    assert divergence(whole) < divergence(rounded) / 2
    assert divergence(in_pieces) < divergence(rounded) / 2

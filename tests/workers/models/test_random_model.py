from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kernels.attention_step import AttentionStep
from workers.models.catalog import prepare_model
from workers.models.decoder import load_decoder
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    decoder = load_decoder(path, torch.float32, torch.device("cpu"))
    kv_cache = decoder.new_kv_cache(8, 16)
    tables = torch.arange(8)[None]
    tokens, fresh = list(prompt), list(prompt)
    for _ in range(count):
        length, new = len(tokens), len(fresh)
        positions = torch.arange(length - new, length)
        step = AttentionStep.of([0, new], [length], tables, positions)
        hidden = decoder.forward(torch.tensor(fresh), positions, kv_cache, step, torch.tensor([new - 1]))
        fresh = [int(decoder.logits(hidden).argmax())]
        tokens += fresh
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_text_varies(tmp_path: Path, family: str) -> None:
    tokens = greedy(write_random_model(tmp_path, family), [10, 11, 12], 80)
    assert len(set(tokens)) > 30


def test_seeds(tmp_path: Path) -> None:
    one, same, other = (write_random_model(tmp_path / str(i), seed=seed) for i, seed in enumerate([1, 1, 2]))
    assert (one / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    assert prepare_model(str(one)).fingerprint != prepare_model(str(other)).fingerprint


def test_own_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_random_model(tmp_path))
    text = "héllo\n\n  wörld 🌍 123\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, tokenizer.encode("a")[0], 2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert prompt == "<|im_start|>user\nx<|im_end|>\n"


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "source", {"vocab_size": 300})
    prepared = prepare_model(str(write_random_model(tmp_path / "copy", "qwen3", tokenizer_from=source)))
    assert prepared.vocab_size == 300
    assert prepared.eos_token_ids == (2,)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        write_random_model(tmp_path / "third", tokenizer_from=tmp_path)


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="families are"):
        write_random_model(tmp_path, "gpt2")

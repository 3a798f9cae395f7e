from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.workers.models.tiny_gguf import write_gguf
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model


def tokenizer(tmp_path: Path, **metadata: Any) -> Tokenizer:
    source = write_random_model(tmp_path / "hf", {"vocab_size": 260})
    values = {f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items()}
    file = write_gguf(source, tmp_path / "m.gguf", metadata=values)
    return Tokenizer.from_file(str(prepare_model(str(file), tmp_path).path / "tokenizer.json"))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "tekken"])
def test_text_comes_back(tmp_path: Path, pre: str) -> None:
    made = tokenizer(tmp_path, ggml__pre=pre, ggml__add_bos_token=False)
    text = "ab cab  12\n\n x's naïve 🌍"
    ids = made.encode(text).ids
    assert made.decode(ids) == text
    assert made.encode("ab").tokens == ["ab"]
    assert made.encode("<|im_start|>a<|im_end|>").ids == [1, made.token_to_id("a"), 2]


def test_start_token(tmp_path: Path) -> None:
    assert tokenizer(tmp_path / "0", ggml__add_bos_token=True).encode("a").ids[0] == 1
    assert tokenizer(tmp_path / "1").encode("a").ids[0] != 1
    assert (
        tokenizer(tmp_path / "2", ggml__pre="llama-bpe").encode("a").ids[0] == 1
    )  # llama.cpp's default there


def test_user_defined_tokens_stay_whole_and_visible(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, ggml__token_type=[3, 3, 3] + [1] * 256 + [4])
    added = made.get_added_tokens_decoder()[259]
    assert (added.content, added.special) == ("ab", False)
    assert made.decode(made.encode("xaby").ids, skip_special_tokens=True) == "xaby"


def test_merges_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="valid merges"):
        tokenizer(tmp_path, ggml__merges=["a c"])


@pytest.mark.parametrize(("add_bos", "first"), [(None, "<s>"), (True, "<s>"), (False, "▁h")])
def test_sentencepiece(tmp_path: Path, add_bos: bool | None, first: str) -> None:
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "el", "lo", "▁w", "or", "ld", "▁wor", "▁world"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    source = write_random_model(tmp_path / "hf", {"vocab_size": len(tokens)})
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
    path = prepare_model(str(write_gguf(source, tmp_path / "m.gguf", metadata=metadata)), tmp_path).path
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    encoded = made.encode("hello world é</s>")
    assert encoded.tokens[0] == first
    assert encoded.tokens[-5:] == ["▁world", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert made.decode(encoded.ids, skip_special_tokens=True) == "hello world é"


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: PreparedModel) -> Any:
    return AutoTokenizer.from_pretrained(smollm2.path)


def test_smollm2_special_tokens_are_single(smollm2_tokenizer: Any) -> None:
    ids = smollm2_tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n", add_special_tokens=False)
    assert (ids[0], ids[-2]) == (1, 2)
    assert smollm2_tokenizer.encode("hi")[0] != 1  # no start token of its own
    assert (smollm2_tokenizer.eos_token_id, smollm2_tokenizer.bos_token_id) == (2, 1)


def test_smollm2_splits_digits_before_words(smollm2_tokenizer: Any) -> None:
    pieces = lambda text: smollm2_tokenizer.convert_ids_to_tokens(smollm2_tokenizer.encode(text))  # noqa: E731
    assert pieces("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    # llama.cpp's and the original's: the run of spaces is one piece, for the digit is cut off first.
    assert pieces("a  1") == ["a", "ĠĠ", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces\n\n\nand lines\t",
        "3.14159 + 1,000,000",
        "I'm we'LL don't",
        "naïve 你好 🌍👩‍👩‍👧",
        "\x00\x07",
    ],
)
def test_smollm2_text_comes_back(smollm2_tokenizer: Any, text: str) -> None:
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


def test_smollm2_chat_template(smollm2_tokenizer: Any) -> None:
    prompt = smollm2_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

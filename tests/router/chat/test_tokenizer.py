from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from router.chat.tokenizer import TextTokenizer, TokenizerError

TEXTS = [
    "",
    " ",
    "The headrace feeds the turbine.",
    "  two spaces,\n\nlines and\ttabs ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "Zürich 東京 🙂🙃 \U0001f9d1‍\U0001f52c e\u0301",
    "a <tool box> b\x00c",
]


@pytest.fixture(params=["byte_level_path", "sentencepiece_path"])
def model_path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_same_ids_and_text_as_transformers(model_path: Path, add_special_tokens: bool) -> None:
    ours = TextTokenizer(model_path)
    theirs = AutoTokenizer.from_pretrained(model_path)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize(
    "change",
    [
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "bos_token": "<|im_end|>"},
        {"pad_token": "<|new_pad|>", "extra_special_tokens": ["<|extra|>"]},
        {"pad_token": {"__type": "AddedToken", "content": "<|new_pad|>", "lstrip": True}},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"500": {"content": "<|late|>", "special": True, "normalized": False}}},
    ],
)
def test_tokenizer_config_changes_ids_as_in_transformers(
    model_path: Path, tmp_path: Path, change: dict
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | change))
    ours, theirs = TextTokenizer(copy), AutoTokenizer.from_pretrained(copy)
    for text in ["hello", "<|im_start|>a<|im_end|>", "x <|new_pad|> y <|extra|><|late|> z"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_special_tokens_and_end_tokens(byte_level: TextTokenizer, byte_level_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(byte_level_path)
    assert byte_level.special_tokens["eos_token"] == theirs.eos_token == "<|im_end|>"
    assert byte_level.token_id("eos_token") == theirs.eos_token_id
    assert byte_level.token_id("sep_token") is None
    assert byte_level.eos_token_ids == {theirs.eos_token_id}
    assert byte_level.special_ids == set(theirs.all_special_ids)


def test_bytes_of_a_token(byte_level: TextTokenizer, sentencepiece: TextTokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        text = "The turbine 東京🙂, e\u0301"
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" " if tokenizer is sentencepiece else "") == text
        eos = tokenizer.token_id("eos_token")
        assert eos is not None
        assert tokenizer.token_bytes(eos).decode() == tokenizer.special_tokens["eos_token"]
        assert tokenizer.token_bytes(10**6) == b""
    box = byte_level.encode("<tool box>", add_special_tokens=False)
    assert [byte_level.token_bytes(token) for token in box] == [b"<tool box>"]


def test_a_directory_without_tokenizer_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        TextTokenizer(tmp_path)

"""Remembered words give the ids that the tokenizer itself gives, for every kind of split that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE

from router.chat import word_memo as module
from router.chat.tokenizer import TextTokenizer
from router.chat.word_memo import WordMemo, word_memo
from tests.router.tiny_model import CORPUS, SPECIAL

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K_LIKE = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}+")  # not one of those that are known


def byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


KINDS = {
    "gpt2": (byte_level(), None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]), None),
    "llama3": (split_by(LLAMA_3), None),
    "qwen2": (split_by(QWEN_2), normalizers.NFC()),
}


def trained(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None
) -> Tokenizer:
    """Merges that reach over everything that the split leaves together, spaces and apostrophes included."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*CORPUS, "don't we'll it's I'd\n\n    if x:\n        return y", "'stop' a1b22 "], trainer
    )
    tokenizer.add_tokens([AddedToken("<tool box>", normalized=False), AddedToken("<tool", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(*KINDS[request.param])


_text = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "a",
                "Z",
                "ab",
                " the",
                "'",
                "'s",
                "'LL",
                "'re",
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "1",
                "234",
                ".",
                "()",
                "_",
            ]
        ),
        st.sampled_from(
            ["é", "e\u0301", "\u0301", "東", "🙂", "\xa0", "\u2003", "\x1c", "\x85", "ſ", "K", "\x00"]
        ),
        st.sampled_from([*SPECIAL, "<tool box>", "<tool", "<|im_", "tool box>"]),
        st.text(max_size=4),
    ),
    max_size=30,
).map("".join)


@given(texts=st.lists(_text, min_size=1, max_size=5))
@settings(max_examples=400, deadline=None)
def test_the_same_ids_however_much_is_remembered(backend: Tokenizer, texts: list[str]) -> None:
    memo = word_memo(backend)
    assert memo is not None
    for text in [*texts, *texts]:
        found = memo.encode(text)
        assert found is None or found == backend.encode(text, add_special_tokens=False).ids


@given(
    words=st.lists(
        st.sampled_from([" the", " turbine", "(self", ".plan", "\n    if", "'s", " x1"]), max_size=20
    )
)
@settings(deadline=None)
def test_what_was_seen_is_not_asked_again(backend: Tokenizer, words: list[str]) -> None:
    memo = word_memo(backend)
    assert memo is not None
    text = "".join(words)
    first = memo.encode(text)
    assert first == backend.encode(text, add_special_tokens=False).ids
    memo._backend = None  # type: ignore[assignment]
    assert memo.encode(text) == first


def test_many_new_words_are_left_to_the_library_and_learned_little_by_little(backend: Tokenizer) -> None:
    memo = word_memo(backend)
    assert memo is not None
    text = " ".join(f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(100))
    answers = [memo.encode(text) for _ in range(12)]
    assert answers[0] is None
    assert answers[-1] == backend.encode(text, add_special_tokens=False).ids


def test_memory_is_bounded(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WORDS", 100)
    memo = word_memo(backend)
    assert memo is not None
    for number in range(500):
        text = f" {'x' * 40} " + " ".join(
            f"k{chr(97 + number % 26)}{chr(97 + n)}{'y' * (number // 26)}" for n in range(9)
        )
        assert memo.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert len(memo._ids) <= 100 + module._MAX_NEW
        assert max(map(len, memo._ids)) <= module._MAX_WORD_CHARS


def changed(**parts: object) -> Tokenizer:
    described = json.loads(trained(*KINDS["gpt2"]).to_str())
    for name, value in parts.items():
        described[name] = described[name] | value if isinstance(value, dict) else value
    return Tokenizer.from_str(json.dumps(described))


def stripping() -> Tokenizer:
    tokenizer = trained(*KINDS["gpt2"])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def of_two_kinds() -> Tokenizer:
    tokenizer = trained(*KINDS["gpt2"])
    tokenizer.add_tokens([AddedToken("<other box>", normalized=True)])
    return tokenizer


def as_text() -> Tokenizer:
    tokenizer = trained(*KINDS["gpt2"])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(model={"dropout": 0.1}),
        changed(model={"unk_token": "<|endoftext|>"}),
        trained(byte_level(), normalizers.Lowercase()),
        trained(pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        trained(split_by(CL100K_LIKE), None),
        trained(pre_tokenizers.Metaspace(), None),
        stripping(),
        of_two_kinds(),
        as_text(),
        Tokenizer(BPE()),
    ],
)
def test_other_tokenizers_get_none(tokenizer: Tokenizer) -> None:
    assert word_memo(tokenizer) is None


def test_a_model_directory_with_a_token_in_front(tmp_path: Path) -> None:
    """The memo knows nothing of it: such texts are encoded whole."""
    tokenizer = trained(*KINDS["gpt2"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer(tmp_path)
    assert isinstance(loaded._memo, WordMemo)
    assert loaded.encode("the turbine") == tokenizer.encode("the turbine").ids
    assert loaded.encode("the turbine")[0] == 1
    assert (
        loaded.encode("the turbine", False) == tokenizer.encode("the turbine", add_special_tokens=False).ids
    )

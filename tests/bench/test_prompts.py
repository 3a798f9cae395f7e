"""Prompts have exactly the tokens that were asked for, in the server's own tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.prompts import Book, library_text
from router.chat.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Byte-level BPE, as most models have, trained on a little of the text: its merges cross any careless cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([library_text()[:20_000]], trainer)
    directory: Path = tmp_path_factory.mktemp("model")
    backend.save(str(directory / "tokenizer.json"))
    return TextTokenizer(directory)


@pytest.fixture(scope="module")
def book(tokenizer: TextTokenizer) -> Book:
    return Book(tokenizer, library_text()[:60_000] + "Grüße, 你好, 🙂. " * 200)


@pytest.mark.parametrize("num_tokens", [1, 2, 128, 777, 2048])
def test_a_passage_has_the_tokens_asked_for(tokenizer: TextTokenizer, book: Book, num_tokens: int) -> None:
    for seed in range(5):
        assert len(tokenizer.encode(book.passage(num_tokens, random.Random(seed)))) == num_tokens


def test_prompts_share_their_first_tokens_and_no_more(tokenizer: TextTokenizer, book: Book) -> None:
    own = [128, 200, 512]
    encoded = [tokenizer.encode(text) for text in book.sharing(256, own, random.Random(1))]
    assert [len(ids) for ids in encoded] == [256 + count for count in own]
    assert len({tuple(ids[:256]) for ids in encoded}) == 1
    assert len({tuple(ids[256:384]) for ids in encoded}) == len(own)


def test_the_same_seed_gives_the_same_text(book: Book) -> None:
    assert book.sharing(64, [32] * 4, random.Random(7)) == book.sharing(64, [32] * 4, random.Random(7))


def test_a_book_that_is_too_short_says_so(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="1000 tokens wanted of a book of"):
        Book(tokenizer, "a few words").passage(1000, random.Random(0))

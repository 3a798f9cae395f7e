from __future__ import annotations

from pathlib import Path

import pytest

from router.chat.tokenizer import TextTokenizer
from tests.router.tiny_model import write_byte_level_model, write_sentencepiece_model


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_model(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(byte_level_path: Path) -> TextTokenizer:
    return TextTokenizer(byte_level_path)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_path: Path) -> TextTokenizer:
    return TextTokenizer(sentencepiece_path)

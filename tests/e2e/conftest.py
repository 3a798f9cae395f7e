from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.oracle import Oracle
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, fetched and converted on first use."""
    return prepare_model("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def oracle(smollm2: Path) -> Oracle:
    return Oracle(smollm2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers: fast, and its tokens are as sensitive to a wrong KV byte as any model's."""
    return write_random_model(tmp_path_factory.mktemp("tiny"), {"max_position_embeddings": 2048}, seed=3)

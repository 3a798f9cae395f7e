from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nursery import Nursery
from tests.workers.transfer.leaks import nothing_leaks, quick_collection

__all__ = ["nothing_leaks", "nursery", "quick_collection"]


@pytest.fixture(scope="session")
def _nursery() -> Iterator[Nursery]:
    nursery = Nursery("tests.faults.transfer_process:serve", OMP_NUM_THREADS="1")
    yield nursery
    nursery.close()


@pytest.fixture
def nursery(_nursery: Nursery) -> Iterator[Nursery]:
    """Where workers of the KV plane come from. An error that nobody expected, in any of them, fails the test."""
    before = len(_nursery.complaints())
    yield _nursery
    complaints = _nursery.complaints()[before:]
    assert "Traceback" not in complaints, complaints[-4000:]

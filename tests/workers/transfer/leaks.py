"""Fixtures that see whether a test has left anything behind; for the conftest of whoever hands blocks over."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.workers.transfer.pair import belongings, until


@pytest.fixture(scope="session")
def quick_collection() -> Iterator[None]:
    """What was imported is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_leaks(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, quick_collection: None
) -> Iterator[None]:
    """Threads, sockets and shared memory are after the test what they were before."""
    gc.collect()
    before = belongings()

    def more() -> object:
        for phase in ("call", "teardown"):
            for record in caplog.get_records(
                phase
            ):  # errors that were logged hold the frames they went through
                record.msg, record.args, record.exc_info = record.getMessage(), (), None
        gc.collect()
        return belongings() - before

    yield
    request.node.funcargs.clear()  # both sides, and with them their caches
    try:
        until(lambda: not more())
    except AssertionError:
        raise AssertionError(f"left behind: {more()}") from None

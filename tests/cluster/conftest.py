from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.logs import LOGGERS
from tests.cluster.api_server import ApiServer


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that clusters that run on this machine are neither seen nor touched."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADRACE_URL", raising=False)
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    monkeypatch.delenv("HEADRACE_CONFIG", raising=False)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`headrace serve` in this process sets up logging for good."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)

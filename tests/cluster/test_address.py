from __future__ import annotations

from typing import Any

import pytest

from cluster.address import Address, address_of, ask_ready
from router.config import RouterConfig
from tests.cluster.api_server import ApiServer


@pytest.mark.parametrize(
    ("http", "grpc", "url", "grpc_address"),
    [
        ({"port": 1}, {"port": 2}, "http://127.0.0.1:1", "127.0.0.1:2"),
        ({"host": "0.0.0.0", "port": 1}, {"host": "::", "port": 2}, "http://10.0.0.9:1", "10.0.0.9:2"),
        ({"host": "::1", "port": 1}, {"enabled": False}, "http://[::1]:1", ""),
        ({"host": "gpu7", "port": 1}, {"host": "gpu7", "port": 2}, "http://gpu7:1", "gpu7:2"),
    ],
)
def test_addresses(http: dict[str, Any], grpc: dict[str, Any], url: str, grpc_address: str) -> None:
    config = RouterConfig.model_validate({"http": http, "grpc": grpc})
    assert address_of(config, "m", anywhere="10.0.0.9") == Address(url, grpc_address, "m")


def test_ready_or_why_not(api: ApiServer) -> None:
    address = Address(api.url, "", "m")
    api.says("/ready", {"status": "no worker yet"}, status=503)
    assert ask_ready(address) == '503 {"status": "no worker yet"}'
    api.says("/ready", {"status": "ready"})
    assert ask_ready(address, ["key-1", "key-2"]) == "ready"
    assert api.requests[-1][2]["Authorization"] == "Bearer key-1"
    assert ask_ready(Address("http://127.0.0.1:9", "", "m")).startswith("no answer from http://127.0.0.1:9")

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from workers.protocol.messages import KvEndpoint
from workers.transfer import roads
from workers.transfer.roads import choices, usable
from workers.transfer.shm import host_id

HERE = host_id()
ENDPOINTS = [
    KvEndpoint("shm", "name", host_id=HERE),
    KvEndpoint("tcp", "10.0.0.1:7"),
    KvEndpoint("tcp", "10.0.0.2:7"),
]
MEMORY: Any = object()  # neither road looks at it


def names(ways: list[Any]) -> list[tuple[str, str]]:
    return [(road.name, endpoint.address) for road, endpoint in ways]


def test_the_senders_order_counts_and_every_endpoint_of_a_road_is_a_way() -> None:
    ways, passed_over = choices(["shm", "tcp"], MEMORY, ENDPOINTS, "d0")
    assert names(ways) == [("shm", "name"), ("tcp", "10.0.0.1:7"), ("tcp", "10.0.0.2:7")]
    assert passed_over == []
    ways, _ = choices(["tcp", "shm"], MEMORY, ENDPOINTS, "d0")
    assert names(ways)[-1] == ("shm", "name")


def test_what_is_not_offered_is_said() -> None:
    ways, passed_over = choices(["shm", "tcp"], MEMORY, ENDPOINTS[1:], "d0")
    assert {name for name, _ in names(ways)} == {"tcp"}
    assert passed_over == ["shm: d0 does not offer it"]
    assert choices(["shm"], MEMORY, [], "d0") == ([], ["shm: d0 does not offer it"])


def test_another_host_or_network_namespace_is_said() -> None:
    boot, _, network = HERE.partition(":")
    for other in ("", f"{boot}:net:[1]", f"another:{network}"):
        far = [msgspec.structs.replace(ENDPOINTS[0], host_id=other)]
        ways, (said,) = choices(["shm"], MEMORY, far, "d0")
        assert ways == []
        assert said.startswith("shm: ")
        assert "another host" in said


def test_a_road_that_is_not_built_or_that_this_worker_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(roads.ROADS, "tcp")
    assert usable(["shm", "tcp"], MEMORY) == {"shm": None, "tcp": "not in this build"}
    monkeypatch.delattr("os.memfd_create")
    ways, passed_over = choices(["shm", "tcp"], MEMORY, ENDPOINTS, "d0")
    assert ways == []
    assert passed_over == ["shm: this system has no memfd", "tcp: not in this build"]

"""A Ray cluster that runs already: what it refuses, and how long it may keep us waiting."""

from __future__ import annotations

import importlib
import time
from typing import Any

import pytest
import ray

from cluster import topology
from cluster.config import load_config
from cluster.launch import Stopped
from cluster.pools import RayPools
from cluster.ray_runtime import RayError, RayRuntime, machine
from cluster.topology import TopologyError


class NoRoom:
    """A placement group that never finds its places."""

    def wait(self, timeout_seconds: float) -> bool:
        time.sleep(0.01)
        return False


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> RayPools:
    # By name: ray.util has a function of the module's name.
    module = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(module, "placement_group", lambda *a, **k: NoRoom())
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    return RayPools(topology.plan(load_config(), machine()), log_level="info", num_spares=0)


def test_a_cluster_that_wants_a_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(RayRuntime, "_prepare_environment", lambda self: None)
    runtime = RayRuntime(load_config(None, {"ray.address": "head:6379"}))
    with pytest.raises(RayError, match="could not join the Ray cluster at head:6379: no token"):
        runtime.start(1, 0)


def test_no_place_in_time_is_told(pools: RayPools) -> None:
    with pytest.raises(TopologyError, match=r"found no place within 0\.05 s"):
        pools.place(0.05)


def test_who_asks_to_stop_need_not_wait_for_places(pools: RayPools) -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        pools.place(60.0, stop)

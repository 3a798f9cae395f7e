from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import load_config
from cluster.topology import (
    Host,
    Inventory,
    Plan,
    TopologyError,
    check_reachable,
    plan,
    threads_per_worker,
)


def machine(cpus: float = 2, gpus: float = 0) -> Inventory:
    return Inventory((Host("local", "127.0.0.1", cpus, gpus),), local=True)


def ray_cluster(*hosts: tuple[float, float]) -> Inventory:
    return Inventory(
        tuple(Host(f"n{i}", f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(hosts)), local=False
    )


def planned(inventory: Inventory, **overrides: Any) -> Plan:
    return plan(load_config(None, {name.replace("__", "."): v for name, v in overrides.items()}), inventory)


def test_a_laptop() -> None:
    made = planned(machine())
    assert [replica.worker_id for replica in made.replicas] == ["prefill-0", "decode-0"]
    assert {replica.engine.device for replica in made.replicas} == {"cpu"}
    assert all(replica.bundle == {"CPU": 1.0} for replica in made.replicas)


def test_more_workers_than_cores_are_fine_on_our_own_machine() -> None:
    assert len(planned(machine(cpus=2), pools__decode__replicas=9).replicas) == 10


def test_every_replica_gets_a_gpu_where_there_are_enough() -> None:
    made = planned(machine(8, 2))
    assert [replica.num_gpus for replica in made.replicas] == [1.0, 1.0]
    assert {replica.engine.device for replica in made.replicas} == {"cuda"}
    assert made.notes == ()


def test_replicas_share_when_there_are_too_few() -> None:
    made = planned(machine(8, 1))
    assert [replica.num_gpus for replica in made.replicas] == [0.5, 0.5]
    assert made.notes == ("2 workers share 1 GPU",)


def test_device_cpu_takes_no_gpu() -> None:
    made = planned(machine(8, 1), pools__prefill__engine__device="cpu")
    assert [(replica.engine.device, replica.num_gpus) for replica in made.replicas] == [
        ("cpu", 0),
        ("cuda", 1.0),
    ]


@pytest.mark.parametrize(
    ("inventory", "overrides", "message"),
    [
        (
            machine(8, 2),
            {"pools__decode__num_gpus": 4},
            "1 prefill, 1 decode replicas need 4 GPUs, this machine has 2",
        ),
        (machine(8, 0), {"engine__device": "cuda"}, "wants device cuda, but there is no GPU here"),
        (
            machine(8, 1),
            {"engine__device": "cpu", "pools__decode__num_gpus": 1},
            "num_gpus is 1, but its device is cpu",
        ),
        (
            machine(8, 1),
            {"pools__decode__engine__device": "cuda", "pools__decode__num_gpus": 0},
            "give it a share",
        ),
        (ray_cluster((1, 0)), {}, "need 2 CPUs, the Ray cluster has 1"),
        (
            ray_cluster((2, 0), (2, 0)),
            {"pools__decode__num_cpus": 3, "pools__prefill__num_cpus": 1},
            "no host of the Ray cluster has 0 GPUs and 3 CPUs left for decode-0",
        ),
        (
            ray_cluster((8, 1), (8, 1)),
            {"pools__decode__num_gpus": 2},
            "no host of the Ray cluster has 2 GPUs",
        ),
    ],
)
def test_the_impossible_is_refused_up_front(
    inventory: Inventory, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(TopologyError) as caught:
        planned(inventory, **overrides)
    assert message in str(caught.value)


@given(
    prefill=st.integers(0, 6),
    decode=st.integers(1, 6),
    gpus=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_shares_of_gpus_never_exceed_what_a_host_has(prefill: int, decode: int, gpus: list[int]) -> None:
    inventory = Inventory(tuple(Host(f"n{i}", "h", 64, n) for i, n in enumerate(gpus)), local=False)
    made = planned(inventory, pools__prefill__replicas=prefill, pools__decode__replicas=decode)
    assert sum(replica.num_gpus for replica in made.replicas) <= sum(gpus) + 1e-9
    assert all(replica.num_gpus > 0 for replica in made.replicas) == (sum(gpus) > 0)


def test_threads_are_an_equal_part_of_the_hosts_cores() -> None:
    made = planned(machine(), pools__decode__replicas=2, pools__prefill__engine__num_threads=5)
    host_of = {"prefill-0": "a", "decode-0": "a", "decode-1": "b"}
    assert threads_per_worker(made, host_of, {"a": 9.0, "b": 0.5}) == {
        "prefill-0": 5,
        "decode-0": 4,
        "decode-1": 1,
    }


def test_loopback_listeners_are_refused_across_hosts() -> None:
    config = load_config()
    check_reachable(config, {"prefill-0": "a", "decode-0": "a"}, "a")
    with pytest.raises(
        TopologyError, match=r"but worker[.]host, transfer[.]host, router[.]http[.]host, redis[.]host are"
    ):
        check_reachable(config, {"prefill-0": "a", "decode-0": "b"}, "a")
    open_config = load_config(
        None,
        {
            "worker.host": "node",
            "transfer.host": "node",
            "router.http.host": "0.0.0.0",
            "redis.url": "redis://elsewhere:6379",
        },
    )
    check_reachable(open_config, {"prefill-0": "a", "decode-0": "b"}, "a")


def test_workers_that_share_experts_are_placed_together() -> None:
    made = planned(machine(), pools__decode__replicas=4, pools__decode__expert_parallel=2)
    decode = made.of("decode")
    assert [replica.together for replica in decode] == ["decode-ep0"] * 2 + ["decode-ep1"] * 2
    assert [replica.expert_rank.rank for replica in decode if replica.expert_rank] == [0, 1, 0, 1]
    assert [replica.together for replica in made.of("prefill")] == ["prefill"]


def test_ranks_on_one_gpu_are_refused() -> None:
    shared = {"pools__decode__replicas": 2, "pools__decode__expert_parallel": 2}
    with pytest.raises(TopologyError, match="NCCL needs one for each"):
        planned(machine(8, 1), **shared)
    assert planned(machine(8, 1), experts__exchange="gloo", **shared).of("decode")


def test_tensor_parallel_ranks_are_on_one_host_with_a_gpu_each() -> None:
    (decode,) = planned(machine(8, 3), pools__decode__tensor_parallel=2).of("decode")
    assert (decode.num_gpus, decode.num_cpus, decode.bundle) == (2, 2, {"CPU": 1.0, "GPU": 1.0})
    assert decode.together == decode.worker_id
    (decode,) = planned(machine(8, 0), pools__decode__tensor_parallel=2).of("decode")
    assert (decode.num_gpus, decode.bundle, decode.engine.device) == (0, {"CPU": 1.0}, "cpu")
    spread = {"pools__prefill__replicas": 0, "pools__decode__num_gpus": 4}
    with pytest.raises(TopologyError, match=r"no host of the Ray cluster has 4 GPUs"):
        planned(ray_cluster((8, 2), (8, 2)), pools__decode__tensor_parallel=4, **spread)


def test_tensor_parallel_ranks_do_not_share_gpus() -> None:
    with pytest.raises(
        TopologyError, match=r"pools.decode.tensor_parallel is 4: .* 5 GPUs are claimed, 4 are there"
    ):
        planned(machine(8, 4), pools__decode__tensor_parallel=4)
    with pytest.raises(TopologyError, match=r"tensor_parallel is 2, num_gpus is 1: .*set num_gpus to 2"):
        planned(machine(8, 4), pools__decode__tensor_parallel=2, pools__decode__num_gpus=1)


def test_every_rank_has_its_part_of_the_cores() -> None:
    made = planned(machine(8), pools__decode__tensor_parallel=2, engine__num_threads=None)
    assert threads_per_worker(made, dict.fromkeys(("prefill-0", "decode-0"), "local"), {"local": 9}) == {
        "prefill-0": 3,
        "decode-0": 3,
    }

"""The roads that there are, best first where nothing else is said."""

from __future__ import annotations

from collections.abc import Sequence

from workers.protocol.messages import KvEndpoint
from workers.protocol.messages import Road as RoadName
from workers.transfer.block_memory import BlockMemory
from workers.transfer.cuda_ipc import CudaIpc
from workers.transfer.nccl import Nccl
from workers.transfer.road import RoadKind
from workers.transfer.shm import Shm
from workers.transfer.tcp import Tcp

ROADS: dict[RoadName, RoadKind] = {road.name: road for road in (Nccl(), CudaIpc(), Shm(), Tcp())}


def usable(allowed: Sequence[RoadName], memory: BlockMemory) -> dict[RoadName, str | None]:
    """Road -> why a worker with this cache can't use it, None when it can; in the order of `allowed`."""
    return {name: ROADS[name].lacks(memory) if name in ROADS else "not in this build" for name in allowed}


def choices(
    allowed: Sequence[RoadName], memory: BlockMemory, endpoints: Sequence[KvEndpoint], peer: str
) -> tuple[list[tuple[RoadKind, KvEndpoint]], list[str]]:
    """What a sender may try, in order, and why the others that were allowed are out."""
    open_ways, passed_over = [], []
    for name, lack in usable(allowed, memory).items():
        if lack is not None:
            passed_over.append(f"{name}: {lack}")
            continue
        offered = [endpoint for endpoint in endpoints if endpoint.kind == name]
        if not offered:
            passed_over.append(f"{name}: {peer} does not offer it")
        for endpoint in offered:
            bar = ROADS[name].bars(memory, endpoint)
            if bar is None:
                open_ways.append((ROADS[name], endpoint))
            else:
                passed_over.append(f"{name}: {bar}")
    return open_ways, passed_over

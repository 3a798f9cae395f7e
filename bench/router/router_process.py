"""The router that is measured: the real one, as a replica runs it (cluster/router_replica.py), without Ray around it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import uvloop

from bench.router.process import listen, ready, told
from bench.router.sampler import Sampler
from bench.router.simulated_worker import CLUSTER
from router.config import GrpcConfig, HttpConfig, RouterConfig
from router.dispatch import Dispatcher
from router.garbage import spare_requests
from router.server import RouterServer

_WORKERS_S = 20.0  # for all workers to be connected


async def main() -> None:
    order = told()
    config = RouterConfig(http=HttpConfig(port=0), grpc=GrpcConfig(port=0))
    dispatcher = Dispatcher(config, cluster=CLUSTER, secret=order["secret"], redis_url=order["redis_url"])
    server = RouterServer(dispatcher, Path(order["model_path"]), config)
    await dispatcher.start()
    await server.start()
    async with asyncio.timeout(_WORKERS_S):
        while sum(member.state == "up" for member in dispatcher.fleet.members()) < order["workers"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    spare_requests()
    over = asyncio.Event()
    listen(lambda order: None, over.set)
    sampler = Sampler() if order["profile"] else None
    ready(http_port=server.http_port, grpc_port=server.grpc_port)
    if sampler is not None:
        sampler.start()
    await over.wait()
    if sampler is not None:
        sampler.stop(Path(order["profile"]))
    await server.stop(drain_s=0.0)
    await dispatcher.stop()


if __name__ == "__main__":
    uvloop.run(main())

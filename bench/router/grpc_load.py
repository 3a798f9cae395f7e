"""The same streams over gRPC, by grpc.aio's own client: it costs more than the router, so it is never asked for all it can."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc

from bench.router.load import Counts
from router.grpc import headrace_pb2, headrace_pb2_grpc

pb: Any = headrace_pb2  # generated


class GrpcLoad:
    """Every stream begins again when it has ended."""

    def __init__(self, bodies: list[dict[str, Any]]) -> None:
        self.counts = Counts()
        self._requests = itertools.cycle([_request(body) for body in bodies])
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None

    async def open(self, port: int, connections: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        await self._channel.channel_ready()
        stub = headrace_pb2_grpc.InferenceStub(self._channel)
        self._tasks = [asyncio.create_task(self._stream(stub)) for _ in range(connections)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def _stream(self, stub: Any) -> None:
        while True:
            try:
                async for _ in stub.Generate(next(self._requests)):
                    self.counts.events += 1
            except grpc.aio.AioRpcError as error:
                self.counts.failures.append(str(error.details()).encode())
                return
            self.counts.answers += 1


def _request(body: dict[str, Any]) -> Any:
    messages = [pb.ChatMessage(**message) for message in body["messages"]]
    sampling = pb.Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"])
    return pb.GenerateRequest(model=body["model"], chat=pb.Chat(messages=messages), sampling=sampling)

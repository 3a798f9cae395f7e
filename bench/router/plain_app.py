"""What the router is compared with: uvicorn with uvloop and httptools, and an app that only sends.

It reads the request's body and sends the bytes that the router sent for such a request, as often as asked; nothing is
parsed, looked up or formatted. A stream is a write for each event, at the same pace as the workers' steps. Without a
pace each event still has a turn of the event loop to itself: what is written within one turn leaves in one system call,
and an app that has all its events at once would be measured writing files.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
import uvloop

from bench.router.clock_tokens import tick
from bench.router.process import listen, ready, told


class PlainApp:
    def __init__(self) -> None:
        self.whole = b"{}"
        self.head = b""  # of a stream: what comes before the first token's event
        self.events: list[bytes] = []  # of the token that stands for each tick
        self.tail = b""
        self.num_tokens = 0
        self.round = 0  # streams of an earlier one end: nobody reads them
        self.step_s = 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._ticking = False
        self._due = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/stream":
            await self._stream(send)
            return
        length = (b"content-length", b"%d" % len(self.whole))
        headers = [(b"content-type", b"application/json"), length]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.whole})

    async def _stream(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        own = self.round
        for number in range(self.num_tokens):
            await (self._step() if self.step_s else asyncio.sleep(0))
            if self.round != own:
                return
            event = self.events[tick()]
            body = event if number else self.head + event
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": self.tail})

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._ticking:
            self._ticking = True
            self._due = loop.time()
            loop.call_soon(self._tick)
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        waiting, self._waiting = self._waiting, []
        self._ticking = bool(waiting)
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
        if waiting:
            self._due = max(self._due + self.step_s, loop.time() - self.step_s)
            loop.call_at(self._due, self._tick)


async def main() -> None:
    told()
    logging.disable()  # of streams that are cut off when it ends
    app = PlainApp()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=2048,
    )
    server = uvicorn.Server(config)

    def do(order: dict[str, Any]) -> None:
        app.round += 1
        for name, value in order.items():
            if name == "events":
                value = [event.encode() for event in value]
            setattr(app, name, value.encode() if isinstance(value, str) else value)

    def over() -> None:
        server.should_exit = server.force_exit = True

    listen(do, over)
    ready(http_port=listener.getsockname()[1])
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    uvloop.run(main())

"""What disaggregation adds to the time to the first token.

The same requests, one at a time, to a cluster of one worker that does everything and to one of a prefill and a decode
worker with as many threads each. Both run side by side and take turns; a worker that has nothing to do takes no time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.load import Target, ask, client_for, text_tokens
from bench.main_job import Served
from bench.spread import Spread


@dataclass
class FirstToken:
    """Seconds to the first token."""

    prompt_tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each cluster

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def added(self, name: str, base: str) -> Spread:
        """Share by which `name` is later than `base`, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([one / other - 1 for one, other in pairs])


def measure(
    clusters: dict[str, list[str]], lengths: Sequence[int], rounds: int, seed: int = 0
) -> list[FirstToken]:
    """`clusters`: name -> arguments of `headrace serve`."""
    served = {}
    try:
        for name, extra in clusters.items():
            served[name] = Served(extra)
            served[name].first_token()
        return asyncio.run(_measure({n: s.url for n, s in served.items()}, lengths, rounds, seed))
    finally:
        for one in served.values():
            one.stop()


async def _measure(urls: dict[str, str], lengths: Sequence[int], rounds: int, seed: int) -> list[FirstToken]:
    rng = random.Random(seed)
    found = [FirstToken(length, {name: [] for name in urls}) for length in lengths]
    clients = {name: client_for(Target(url, ""), 1) for name, url in urls.items()}
    try:
        models = {n: (await c.get("/v1/models")).json()["data"][0]["id"] for n, c in clients.items()}
        first = next(iter(clients))
        text = await text_tokens(clients[first], models[first])
        for number in range(rounds + 1):
            for one in found:
                # Nobody has seen the prompt: its first token differs, and with it every block.
                prompt = [rng.randrange(1000, 40000), *_piece(text, one.prompt_tokens - 1, rng)]
                for name in list(clients) if number % 2 else reversed(clients):
                    timed = await ask(clients[name], Target(urls[name], models[name]), prompt, 2)
                    if timed.error:
                        raise RuntimeError(f"{name}: {timed.error}")
                    one.seconds[name].append(timed.ttft)
    finally:
        for client in clients.values():
            await client.aclose()
    for one in found:
        for seconds in one.seconds.values():
            del seconds[0]  # channels were opened, pages touched
    return found


def _piece(text: list[int], length: int, rng: random.Random) -> list[int]:
    start = rng.randrange(max(1, len(text) - length))
    piece = text[start : start + length]
    while len(piece) < length:
        piece += text[: length - len(piece)]
    return piece

"""`headrace serve` with the default model: 500 streams over HTTP while a random worker is killed every two seconds."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.valkey import free_port
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling

ROOT = Path(__file__).resolve().parents[2]
STREAMS = 500
KILL_EVERY_S = 2.0
SETTINGS = [
    "router.admission.queue_timeout_s=900",
    "router.admission.max_attempts=200",
    "router.policy.local_prefill_max=16",  # most prompts go through both pools
    "engine.num_threads=1",
    "engine.num_blocks=512",
    "engine.max_num_seqs=32",
    # A worker that dies again and again is otherwise started later and later: here none would be left.
    "supervisor.backoff_max_s=0.5",
]


@pytest.fixture
def url(smollm2: Path, tmp_path: Path) -> Iterator[str]:
    port, cluster = free_port(), f"storm-{os.getpid()}"
    environment = os.environ | {"HEADRACE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(smollm2), "--cluster", cluster]
    command += ["--prefill", "2", "--decode", "2", "--port", str(port), "--grpc-port", str(free_port())]
    for setting in SETTINGS:
        command += ["--set", setting]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 180
            while not _is_ready(url):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, "headrace serve did not become ready"
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            print((tmp_path / "log").read_text()[-8000:])  # pytest shows it when the test has failed


def _is_ready(url: str) -> bool:
    try:
        workers = httpx.get(f"{url}/cluster", timeout=5).json()["workers"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return [worker["state"] for worker in workers] == ["up"] * 4


class Kills:
    def __init__(self, rng: random.Random) -> None:
        self.count: Counter[str] = Counter()  # by role
        self._rng = rng

    async def every(self, seconds: float, client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(seconds)
            workers = (await client.get("/cluster")).json()["workers"]
            alive = [worker for worker in workers if worker["state"] == "up"]
            if not alive:
                continue
            victim = self._rng.choice(alive)
            try:
                os.kill(victim["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue  # it is dead already, the router has not seen it yet
            self.count[victim["role"]] += 1


async def stream(
    client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int, seed: int
) -> list[int]:
    """The tokens of one streamed answer, which must be whole and must be counted right."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
    body |= {"temperature": 0.8, "ignore_eos": True, "return_token_ids": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    tokens: list[int] = []
    ends: list[str] = []
    usage = None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                assert not ends, "a chunk after the last"
                tokens += choice.get("token_ids") or []
                ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert ends == ["length"]
    assert usage is not None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), max_tokens)
    assert usage["prompt_tokens_details"]["cached_tokens"] <= len(prompt)
    return tokens


def at_rest(workers: list[dict[str, Any]]) -> bool:
    return [worker["state"] for worker in workers] == ["up"] * 4 and not any(
        worker["running"]
        or worker["waiting"]
        or worker["reserved"]
        or worker["sending"]
        or worker["blocks"]["used"]
        or any(worker["booked"].values())
        for worker in workers
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_500_streams_of_the_real_model_survive_a_kill_every_two_seconds(
    url: str, smollm2: Path
) -> None:
    """Token for token what an engine alone writes that nobody disturbs."""
    rng = random.Random(11)
    shared = [rng.randrange(1000, 40_000) for _ in range(32)]
    prompts = [
        (shared if number % 3 == 0 else [])
        + [rng.randrange(1000, 40_000) for _ in range(rng.randrange(8, 48))]
        for number in range(STREAMS)
    ]
    lengths = [rng.randrange(16, 48) for _ in prompts]
    engine = Engine(EngineConfig(num_threads=2, num_blocks=2048), prepare_model(str(smollm2)))
    sampling = [
        Sampling(max_tokens=length, seed=number, temperature=0.8, ignore_eos=True)
        for number, length in enumerate(lengths)
    ]
    expected = [completion.tokens for completion in engine.generate(prompts, sampling)]
    engine.close()
    kills = Kills(rng)
    limits = httpx.Limits(max_connections=STREAMS + 8, max_keepalive_connections=8)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        killer = asyncio.create_task(kills.every(KILL_EVERY_S, client))
        while sum(kills.count.values()) < 5 or set(kills.count) != {
            "prefill",
            "decode",
        }:  # fast machines: again
            answers = await asyncio.gather(
                *(stream(client, model, prompts[n], lengths[n], seed=n) for n in range(STREAMS))
            )
            assert [n for n in range(STREAMS) if answers[n] != expected[n]] == []
        killer.cancel()
        end = time.monotonic() + 120
        while not at_rest(workers := (await client.get("/cluster")).json()["workers"]):
            assert time.monotonic() < end, workers
            await asyncio.sleep(0.2)
        status = (await client.get("/cluster")).json()
        assert (status["queue"], status["in_flight"]) == (0, 0)

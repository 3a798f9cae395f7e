"""The live planner: its two threads with stand-ins, then a real cluster that grows under load and shrinks after it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.autoscale import Autoscaler
from cluster.config import ConfigError, PlannerConfig, load_config
from cluster.planner.observe import Census, Look, WorkerLook
from cluster.status_view import render_status
from cluster.topology import Host, Inventory, plan, spare_cpus
from workers.protocol.messages import Planned, Role

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FakePools:
    sizes: dict[Role, int] = field(default_factory=lambda: {"prefill": 1, "decode": 1})
    free: int = 1
    asked: list[tuple[Role, int]] = field(default_factory=list)

    def census(self) -> Mapping[Role, Census]:
        return {role: Census(count) for role, count in self.sizes.items()}

    def room(self, role: Role) -> int:
        return self.free

    def resize(self, role: Role, size: int) -> int:
        self.asked.append((role, size))
        moved = min(size - self.sizes[role], self.free)
        self.sizes[role] += moved
        self.free -= moved
        return moved


class World:
    """A decode pool that is too slow at every look, and a clock."""

    def __init__(self, **settings: Any) -> None:
        self.now, self.step, self.pools, self.told = 0.0, 0, FakePools(), list[Planned]()
        asked = {"interval_s": 5, "window_s": 10, "up_after_s": 10, "tpot_s": 0.05} | settings
        self.autoscaler = Autoscaler(
            PlannerConfig(**asked), self.look, self.pools, self.told.append, clock=lambda: self.now
        )

    def look(self, at: float) -> Look:
        counted = {
            "headrace_step_seconds_sum": self.now * 1.0,
            "headrace_step_seconds_count": self.now * 10,
            "headrace_output_tokens_total": self.now * 80,
        }
        return Look(at, {"decode-0": WorkerLook("decode", 1, True, 0, 10, 100, counted)}, 0)

    def turn(self) -> None:
        self.now += 5
        self.autoscaler.tick()
        self.autoscaler.observe_once()
        self.autoscaler.tick()


def test_a_suggestion_is_told_and_nothing_is_done(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    with caplog.at_level(logging.INFO, logger="cluster.autoscale"):
        for _ in range(12):
            world.turn()
    assert (
        len([record for record in caplog.records if "planner suggests" in record.message]) == 1
    )  # not every time
    assert world.pools.asked == []
    assert world.told[-1].sizes["decode"] > 1
    assert not world.told[-1].apply
    assert "50 ms asked" in world.told[-1].text


def test_what_is_allowed_is_done_as_far_as_ray_has_room() -> None:
    world = World(apply=True)
    for _ in range(6):
        world.turn()
    assert world.pools.asked == [("decode", 2)]
    assert world.pools.sizes == {"prefill": 1, "decode": 2}
    assert world.told[-1].present == {"prefill": 1, "decode": 2}


def test_settings_bound_it_too() -> None:
    world = World(apply=True, decode={"max": 1})
    for _ in range(6):
        world.turn()
    assert world.pools.asked == []


def test_a_router_that_does_not_answer_changes_nothing() -> None:
    world = World(apply=True)
    world.turn()
    world.autoscaler._look = lambda at: (_ for _ in ()).throw(OSError("gone"))
    with pytest.raises(OSError):
        world.turn()
    assert world.pools.asked == []


def test_status_shows_one_line() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    planner = {"text": "decode 1 → 2: slow", "apply": False, "sizes": {"decode": 2}, "present": {"decode": 1}}
    console.print(render_status({"planner": planner}, "http://x"))
    text = console.export_text()
    assert "planner suggests: decode 1 → 2: slow" in text


def test_mistakes_in_its_settings_are_told() -> None:
    for settings, told in (
        ({"planner.window_s": 1}, "at least interval_s"),
        ({"planner.decode.min": 3, "planner.decode.max": 2}, "below min"),
        ({"planner.apply": True, "pools.decode.replicas": 3, "planner.decode.max": 2}, "1 … 2"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            load_config(None, settings)


def test_a_ray_of_our_own_gets_slots_for_what_may_come() -> None:
    config = load_config(None, {"planner.apply": True, "planner.decode.max": 4})
    found = plan(config, Inventory((Host("local", "", 2),)))
    assert spare_cpus(config, found) == 3
    assert spare_cpus(load_config(None, {"planner.decode.max": 4}), found) == 0


# --- the real thing ---------------------------------------------------------------------------------------------------


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/cluster").json()
        return found

    def decodes(self) -> set[str]:
        return {
            w["worker_id"] for w in self.status()["workers"] if w["role"] == "decode" and w["state"] == "up"
        }


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    from cluster.valkey import free_port
    from workers.models.random_model import write_random_model

    model = write_random_model(tmp_path / "tiny", {"max_position_embeddings": 2048}, seed=3)
    port = free_port()
    settings = {
        "engine.dtype": "float32",
        "engine.num_blocks": 512,
        "engine.num_threads": 1,
        "engine.max_num_seqs": 4,
        "planner.apply": "true",
        "planner.decode.max": 2,
        "planner.interval_s": 1,
        "planner.window_s": 3,
        "planner.up_after_s": 2,
        "planner.down_after_s": 8,
        "planner.pause_s": 1,
        "planner.tpot_s": 5,
        "planner.ttft_s": 30,
    }
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(model)]
    command += ["--cluster", f"planner-{os.getpid()}", "--port", str(port), "--grpc-port", "0"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    log = tmp_path / "log"
    environment = os.environ | {"HEADRACE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    serving = Serving(process, f"http://127.0.0.1:{port}", log)
    try:
        until(serving, lambda: httpx.get(f"{serving.url}/ready", timeout=2).status_code == 200, 180)
        yield serving
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()[-3000:]


def until(serving: Serving, condition: Any, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        assert serving.process.poll() is None, serving.log.read_text()[-3000:]
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, serving.log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_second_decode_worker_comes_under_load_and_drains_after_it(serving: Serving) -> None:
    """More requests than one worker has seats for; none fails, whatever comes and goes."""
    model = serving.get("/v1/models").json()["data"][0]["id"]
    failed: list[str] = []
    done = 0
    over = asyncio.Event()

    async def user(client: httpx.AsyncClient, number: int, output: int, pause_s: float) -> None:
        nonlocal done
        turn = 0
        while not over.is_set():
            turn += 1
            prompt = [(7 * number + 11 * turn + i) % 200 + 3 for i in range(40)]
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": output,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                failed.append(answer.text)
            elif answer.json()["usage"]["completion_tokens"] != output:
                failed.append(f"only {answer.json()['usage']['completion_tokens']} tokens")
            done += 1
            await asyncio.sleep(pause_s)

    async def changed(wanted: int, timeout_s: float) -> set[str]:
        end = time.monotonic() + timeout_s
        while len(found := await asyncio.to_thread(serving.decodes)) != wanted:
            assert time.monotonic() < end, serving.log.read_text()[-4000:]
            await asyncio.sleep(0.5)
        return found

    async with httpx.AsyncClient(base_url=serving.url, timeout=120) as client:
        crowd = [asyncio.create_task(user(client, number, 400, 0.0)) for number in range(16)]
        grown = await changed(2, 120)
        await asyncio.sleep(5)
        over.set()
        await asyncio.gather(*crowd)
        assert not failed, failed[:3]

        # A quiet time, but not an empty one: nothing that runs on the worker that leaves is cut.
        over.clear()
        few = [asyncio.create_task(user(client, 100 + number, 200, 1.0)) for number in range(4)]
        left = await changed(1, 120)
        await asyncio.sleep(3)
        over.set()
        await asyncio.gather(*few)
    assert left < grown
    assert not failed, failed[:3]
    assert done > 16
    log = serving.log.read_text()
    gone = next(iter(grown - left))
    assert f"{gone} has left after" in log
    assert f"{gone} (epoch" not in log  # it did not die, and was not started again
    status = serving.status()
    assert status["planner"]["present"] == {"prefill": 1, "decode": 1}
    metrics = serving.get("/metrics").text
    assert 'headrace_planner_replicas{kind="present",pool="decode"} 1.0' in metrics
    assert all(worker["blocks"]["used"] == 0 for worker in status["workers"])

"""Whole engines and workers whose device cache is far too small: with tiers the tokens are the same, and prefixes hit."""

# ruff: noqa: F811  (fixtures of test_worker)

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.workers.test_worker import (  # noqa: F401
    Client,
    Start,
    alone,
    at_rest,
    local,
    model,
    remote,
    start,
    until,
    work,
)
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.protocol.hashes import block_hashes
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Failed,
    Prefill,
    PrefillDone,
    Sampling,
    Ticketed,
    Tokens,
)
from workers.protocol.tiers import DEVICE, DISK, HOST
from workers.tiers.tiers import open_tiers
from workers.transfer.block_memory import block_memory
from workers.worker import Worker

GREEDY = Sampling(max_tokens=6, seed=0, temperature=0.0, ignore_eos=True)


def conversations(seed: int, count: int = 6, turns: int = 4) -> list[list[int]]:
    """Prompts in which each goes on from an earlier one, the conversations taking turns."""
    rng = random.Random(seed)
    system = [rng.randrange(3, 250) for _ in range(20)]
    heads = [system + [rng.randrange(3, 250) for _ in range(30)] for _ in range(count)]
    prompts = []
    for _ in range(turns):
        for number, head in enumerate(heads):
            heads[number] = head + [rng.randrange(3, 250) for _ in range(rng.randrange(5, 25))]
            prompts.append(heads[number])
    return prompts


def make_engine(model: Path, **settings: Any) -> Engine:
    config = EngineConfig(**({"dtype": "float32", "num_blocks": 12, "num_threads": 1} | settings))
    engine = Engine(config, prepare_model(str(model)))
    memories = [block_memory(engine.runner.kv_cache, engine.layout)]
    engine.attach(open_tiers(config, engine.layout, engine.hash_root, memories, "offline", pinned=False))
    return engine


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("tiers", ["host", "host and disk"])
def test_tokens_are_the_same_and_prefixes_hit(
    model: Path,
    alone: Engine,
    tmp_path: Path,
    kernels: str,
    tiers: str,
) -> None:
    prompts = conversations(1)
    expected = [completion.tokens for completion in alone.generate(prompts, GREEDY)]
    small = make_engine(model, kernels=kernels)
    assert [c.tokens for c in small.generate(prompts, GREEDY)] == expected
    size = small.layout.block_bytes
    disk = {"disk_cache_memory": 200 * (size + 100), "disk_cache_dir": tmp_path}
    settings = (
        {"host_cache_memory": 100 * size} if tiers == "host" else {"host_cache_memory": 20 * size} | disk
    )
    engine = make_engine(model, kernels=kernels, **settings)
    assert [c.tokens for c in engine.generate(prompts, GREEDY)] == expected
    assert engine.tiers is not None
    assert engine.scheduler.hit_tokens > small.scheduler.hit_tokens
    if tiers == "host":
        share = engine.scheduler.hit_tokens / engine.scheduler.query_tokens
        assert share > 0.5, "all but the newest turn of each conversation comes back"
    else:  # how much depends on how fast the disk is
        assert engine.tiers.stats()[DISK].stored_blocks > 0
    engine.tiers.host.check()
    engine.scheduler.check()
    assert engine.pool.num_referenced == 0
    engine.close()
    engine.close()


def test_without_tiers_the_pool_tells_nobody(model: Path) -> None:
    engine = make_engine(model)
    assert engine.tiers is None
    assert engine.pool.on_evict is None


def ask(client: Client, prompt: list[int], max_tokens: int = 6) -> tuple[list[int], int]:
    """(tokens, prompt tokens that were cached)."""
    w = work(prompt, max_tokens)
    client.send(local(w))
    cached = client.next(Accepted).cached_tokens
    return client.tokens(w.request_id), cached


def tier_settings(size: int, directory: Path | None = None, host: int = 40) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_blocks": 12, "host_cache_memory": host * size}
    if directory is not None:
        settings |= {"disk_cache_memory": 300 * (size + 100), "disk_cache_dir": directory}
    return settings


def told(worker: Worker) -> dict[str, set[bytes]]:
    with worker.engine.lock:
        cached = worker.engine.cached()
    return {tier: {h for h, _, t in cached if t == tier} for tier in (DEVICE, HOST, DISK)}


def test_what_a_worker_can_load_it_need_not_compute(start: Start, alone: Engine) -> None:
    worker = start(**tier_settings(alone.layout.block_bytes))
    client = Client(worker.info.address)
    first, other = list(range(3, 100)), list(range(100, 230))
    tokens, cached = ask(client, first)
    assert cached == 0
    ask(client, other)
    with worker.engine.lock:
        assert worker.engine.pool.num_cached < 12
    chain = block_hashes(first, 16, worker.engine.hash_root)
    assert [block_hash in told(worker)[DEVICE] for block_hash in chain] == [True] * 3 + [False] * 3
    assert set(chain[3:]) <= told(worker)[HOST]
    # A request that would need a prefill worker needs none once its prefix is loaded.
    again = msgspec.structs.replace(work(first, 6))
    client.send(msgspec.structs.replace(local(again), local_prefill_max=20))
    assert client.next(Accepted, Ticketed, Failed).cached_tokens == 96
    assert client.tokens(again.request_id) == tokens
    until(lambda: at_rest(worker))
    status = client.status(want_hashes=True, want_metrics=True)
    assert set(status.hashes) == set().union(*told(worker).values())
    families = {f.name: f for f in text_string_to_metric_families(status.metrics.decode())}
    loaded = {
        s.labels["source"]: s.value
        for s in families["headrace_prefix_load_tokens"].samples
        if s.name.endswith("_total")
    }
    assert loaded == {HOST: 48}
    held = {s.labels["tier"]: s.value for s in families["headrace_tier_blocks"].samples}
    assert held == {HOST: len(told(worker)[HOST])}


def test_the_disk_is_found_again_by_the_next_life(start: Start, alone: Engine, tmp_path: Path) -> None:
    settings = tier_settings(alone.layout.block_bytes, tmp_path, host=8)
    prompts = conversations(2, count=4)
    expected = [c.tokens for c in alone.generate(prompts, GREEDY)]
    worker = start(**settings)
    client = Client(worker.info.address)
    assert [ask(client, prompt)[0] for prompt in prompts] == expected
    until(lambda: not worker.engine.tiers.disk._queue)
    on_disk = told(worker)[DISK]
    assert on_disk
    client.close()
    worker.stop()
    again = Worker(worker.config.model_copy(update={"epoch": worker.config.epoch + 1}))
    again.start()
    try:
        until(lambda: told(again)[DISK] >= on_disk)
        client = Client(again.info.address)
        tokens, cached = ask(client, prompts[-1])
        assert tokens == expected[-1]
        assert cached >= len(prompts[-1]) - 32, "beginnings were saved when the first life ended"
        until(lambda: at_rest(again))
    finally:
        again.stop()


def test_a_prefill_worker_loads_too(start: Start, alone: Engine) -> None:
    d = start("decode")
    p = start("prefill", **tier_settings(alone.layout.block_bytes))
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    prompts = [list(range(3, 100)), list(range(100, 230)), list(range(3, 100))]
    cached = []
    for number, prompt in enumerate(prompts):
        w = msgspec.structs.replace(work(prompt), cache_salt="d has seen none of it")
        to_d.send(remote(w))
        ticket = to_d.next(Ticketed).ticket
        to_p.send(Prefill(w, ticket))
        cached.append(to_p.next(PrefillDone).cached_tokens)
        assert to_d.tokens(w.request_id) == alone.generate([prompt], w.sampling)[0].tokens, number
    assert cached[2] >= 80
    until(lambda: at_rest(d) and at_rest(p))


class Stuck:
    """A source that has everything and never gets done by itself."""

    name = "stuck"

    def __init__(self) -> None:
        self.began = threading.Event()
        self.left = threading.Event()

    def count(self, hashes: Any) -> int:
        return len(hashes)

    def read(self, hashes: Any, blocks: Any, go_on: Any) -> int:
        self.began.set()
        while go_on():
            time.sleep(0.005)
        self.left.set()
        return 0


@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize("how", ["cancel", "owner", "stop", "deadline"])
def test_the_end_of_a_request_while_its_prefix_is_loaded(start: Start, role: str, how: str) -> None:
    worker = start(role)
    d = worker if role == "decode" else start("decode")
    source = Stuck()
    worker.serving.loader.sources.append(source)
    worker.serving.loader._deadline_s = 0.2 if how == "deadline" else 30
    client, to_d = Client(worker.info.address), Client(d.info.address)
    w = work(list(range(3, 100)))
    if role == "decode":
        client.send(local(w))
    else:
        to_d.send(remote(w))
        client.send(Prefill(w, to_d.next(Ticketed).ticket))
    assert source.began.wait(10)
    worker.serving.check()
    assert worker.serving.num_requests() == 1
    assert worker.engine.pool.num_referenced == 6
    if how == "cancel":
        client.send(Cancel(w.request_id))
        to_d.send(Cancel(w.request_id))
    elif how == "owner":
        client.close()
        to_d.send(Cancel(w.request_id))
    elif how == "stop":
        worker.stop()
        to_d.send(Cancel(w.request_id))
    else:
        if role == "decode":
            client.next(Accepted)
        assert len((client if role == "decode" else to_d).tokens(w.request_id)) == 8
    assert source.left.wait(10)
    if how == "stop":
        assert not any(thread.is_alive() for thread in worker.serving.loader._threads)
        assert worker.engine.scheduler.fills == []
    else:
        until(lambda: at_rest(worker))


def test_storm_with_tiers(start: Start, alone: Engine, tmp_path: Path) -> None:
    """Random requests, a third cancelled at random moments, over a cache of 14 blocks, 10 in memory, 60 on disk."""
    rng = random.Random(7)
    size = alone.layout.block_bytes
    settings = {"num_blocks": 14, "max_num_batched_tokens": 64, "host_cache_memory": 10 * size}
    settings |= {"disk_cache_memory": 60 * (size + 100), "disk_cache_dir": tmp_path}
    worker = start(timeout_s=30, **settings)
    prompts = conversations(3, count=5, turns=5)
    expected = {tuple(p): c.tokens for p, c in zip(prompts, alone.generate(prompts, GREEDY), strict=True)}
    wrong: list[str] = []
    whole = [0]

    def client_thread(seed: int) -> None:
        mine = random.Random(seed)
        client = Client(worker.info.address)
        for _ in range(60):
            prompt = mine.choice(prompts)
            w = msgspec.structs.replace(work(prompt, 6), request_id=f"s{seed}-{mine.random()}")
            client.send(local(w))
            if mine.random() < 1 / 3:
                time.sleep(mine.expovariate(1 / 0.01))
                client.send(Cancel(w.request_id))
                continue
            got: list[int] = []
            while len(got) < 6:
                message = client.next(Accepted, Tokens, Failed)
                if isinstance(message, Failed):
                    if message.request_id == w.request_id:
                        assert message.code == "busy", message
                        break
                elif isinstance(message, Tokens):
                    for delta in message.deltas:
                        if delta.request_id == w.request_id:
                            got += delta.tokens
            else:
                whole[0] += 1
                if got != expected[tuple(prompt)]:
                    wrong.append(w.request_id)
        client.close()

    before = threading.active_count()
    threads = [threading.Thread(target=client_thread, args=(rng.randrange(10**6),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    until(lambda: at_rest(worker))
    assert not wrong
    assert whole[0] > 60
    tiers = worker.engine.tiers
    assert tiers is not None
    tiers.host.check()
    assert tiers.stats()[DISK].errors == 0
    assert worker.engine.scheduler.fills == []
    assert len(worker.serving.loader) == 0
    sources = set(worker._metrics._load_tokens._metrics)
    assert {labels[-1] for labels in sources} == {HOST, DISK}
    worker.stop()
    until(lambda: threading.active_count() <= before)

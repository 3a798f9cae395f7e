"""The loader with a real scheduler and sources that are slow, wrong, stuck or gone: each request goes on exactly once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from workers.engine.block_pool import BlockPool
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler
from workers.prefix_loader import Loaded, PrefixLoader
from workers.protocol.hashes import block_hashes
from workers.protocol.messages import Sampling, Work

BLOCK = 4
ROOT = b"r" * 16


class Store:
    """A source that has the given hashes. `written` is the device: block -> hash."""

    def __init__(self, name: str, hashes: Sequence[bytes], written: dict[int, bytes]) -> None:
        self.name = name
        self.hashes = set(hashes)
        self.written = written
        self.reads: list[int] = []
        self.before: Callable[[], None] = lambda: None
        self.gives = 10**6

    def count(self, hashes: Sequence[bytes]) -> int:
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self.hashes), len(hashes))

    def read(self, hashes: Sequence[bytes], blocks: Sequence[int], go_on: Callable[[], bool]) -> int:
        self.reads.append(len(hashes))
        self.before()
        good = 0
        for block_hash, block in zip(hashes, blocks, strict=True):
            if not go_on() or good == self.gives:
                break
            self.written[block] = block_hash
            good += 1
        return good


class Bench:
    def __init__(self, num_blocks: int = 64, **settings: object) -> None:
        self.lock = threading.RLock()
        self.scheduler = Scheduler(
            BlockPool(num_blocks), block_size=BLOCK, hash_root=ROOT, max_num_seqs=8, max_num_batched_tokens=64
        )
        self.written: dict[int, bytes] = {}
        self.loaded: list[Loaded] = []
        self.gone_on: list[str] = []
        self.loader = PrefixLoader(self.lock, self.scheduler, on_loaded=self.loaded.append, **settings)  # type: ignore[arg-type]

    def source(self, name: str, prompt: list[int], first: int = 0, last: int | None = None) -> Store:
        store = Store(name, block_hashes(prompt, BLOCK, ROOT)[first:last], self.written)
        self.loader.sources.append(store)
        return store

    def ask(self, name: str, prompt: list[int], **options: object) -> tuple[Request, bool]:
        request = Request(Work(name, prompt, Sampling(max_tokens=2, seed=0)))
        with self.lock:
            waits = self.loader.load(request, lambda: self._then(request), **options)  # type: ignore[arg-type]
        return request, waits

    def _then(self, request: Request) -> None:
        assert self.lock._is_owned()  # type: ignore[attr-defined]
        for block, block_hash in zip(self.scheduler._match(request), request.block_hashes, strict=False):
            assert self.written[block] == block_hash, "a block is found that does not hold what it says"
        self.gone_on.append(request.request_id)

    def cached(self, request: Request) -> int:
        with self.lock:
            return request.num_tokens - self.scheduler.uncached_tokens(request)

    def at_rest(self) -> bool:
        with self.lock:
            self.scheduler.check()
            pool = self.scheduler.pool
            return not (
                self.scheduler.fills or pool.num_referenced or self.loader._filling or len(self.loader)
            )


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def make():
    made: list[Bench] = []

    def new(**settings: object) -> Bench:
        made.append(Bench(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for bench in made:
        bench.loader.stop()
        assert not any(thread.is_alive() for thread in bench.loader._threads)


PROMPT = list(range(100, 141))  # 10 full blocks, and a token to compute


def test_nothing_to_load_means_go_on_at_once(make):
    bench = make()
    assert bench.ask("no sources", PROMPT)[1] is False
    bench.source("host", [1] * 40)
    assert bench.ask("not this prefix", PROMPT)[1] is False
    assert bench.loader._threads == [], "and no thread is started"


def test_a_prefix_is_put_together_from_several_sources(make):
    bench = make()
    bench.source("host", PROMPT, 0, 4)
    bench.source("disk", PROMPT, 2, 7)
    own = Store("worker-7", block_hashes(PROMPT, BLOCK, ROOT)[6:9], bench.written)
    request, waits = bench.ask("a", PROMPT, more=[own])
    assert waits
    until(lambda: bench.gone_on == ["a"])
    assert bench.cached(request) == 9 * BLOCK
    assert [(loaded.source, loaded.num_blocks) for loaded in bench.loaded] == [
        ("host", 4),
        ("disk", 3),
        ("worker-7", 2),
    ]
    assert bench.at_rest()
    assert bench.ask("b", PROMPT)[1] is False, "all that there is lies on the device now"


def test_the_last_token_is_left_to_compute(make):
    bench = make()
    bench.source("host", PROMPT[:40])
    request, _ = bench.ask("a", PROMPT[:40])
    until(lambda: bench.gone_on == ["a"])
    assert bench.cached(request) == 9 * BLOCK


@pytest.mark.parametrize("trouble", ["raises", "gives less"])
def test_what_cannot_be_loaded_is_computed(make, trouble: str, caplog):
    bench = make()
    bench.source("host", PROMPT, 0, 3)
    disk = bench.source("disk", PROMPT, 3)
    if trouble == "raises":

        def broken() -> None:
            raise OSError("the cable is out")

        disk.before = broken
    else:
        disk.gives = 2
    request, _ = bench.ask("a", PROMPT)
    until(lambda: bench.gone_on == ["a"])
    assert bench.cached(request) == (3 if trouble == "raises" else 5) * BLOCK
    assert ("the cable is out" in caplog.text) == (trouble == "raises")
    assert bench.loaded[-1].failed == (trouble == "raises")
    assert bench.at_rest()


def test_requests_with_one_prefix_load_it_once(make):
    bench = make(num_threads=3)
    host = bench.source("host", PROMPT)
    go = threading.Event()
    host.before = lambda: (go.wait(60), None)[1]
    for name in "abcde":
        assert bench.ask(name, PROMPT)[1]
    until(lambda: host.reads == [10])
    time.sleep(0.05)
    with bench.lock:
        assert len(bench.scheduler.fills) == 1, "those that wait hold nothing"
    go.set()
    until(lambda: sorted(bench.gone_on) == list("abcde"))
    assert host.reads == [10]
    assert bench.at_rest()


def test_cancel_while_it_waits_and_while_it_is_read(make):
    bench = make(num_threads=1)
    host = bench.source("host", PROMPT)
    bench.source("other", [7] * 41)
    go = threading.Event()
    host.before = lambda: (go.wait(60), None)[1]
    bench.ask("read", PROMPT)
    bench.ask("waits", [7] * 41)
    until(lambda: len(host.reads) == 1)
    bench.loader.cancel("waits")
    bench.loader.cancel("read")
    bench.loader.cancel("read")
    assert len(bench.loader) == 0
    with bench.lock:
        assert len(bench.scheduler.fills) == 1, "its writer has not let go yet"
    go.set()
    until(bench.at_rest)
    assert bench.gone_on == []
    request, waits = bench.ask("read", PROMPT)
    assert waits, "the same request may come again"
    until(lambda: bench.gone_on == ["read"])
    assert bench.cached(request) == 10 * BLOCK


def test_the_deadline(make):
    bench = make(num_threads=1, deadline_s=0.1)
    host = bench.source("host", PROMPT)
    bench.source("other", [7] * 41)
    go = threading.Event()
    host.before = lambda: (go.wait(60), None)[1]
    began = time.monotonic()
    bench.ask("read", PROMPT)
    bench.ask("waits", [7] * 41)
    until(lambda: sorted(bench.gone_on) == ["read", "waits"])
    assert 0.1 <= time.monotonic() - began < 30
    go.set()
    until(bench.at_rest)
    assert len(bench.gone_on) == 2


def test_stop_cancels_and_ends_the_threads(make):
    bench = make(num_threads=1)
    host = bench.source("host", PROMPT)
    host.before = lambda: time.sleep(0.1)
    bench.ask("a", PROMPT)
    bench.ask("b", PROMPT)
    until(lambda: len(host.reads) == 1)
    bench.loader.stop()
    assert bench.gone_on == []
    assert bench.at_rest()
    assert bench.ask("c", PROMPT)[1] is False


def test_no_room_for_the_request_means_no_load(make):
    bench = make(num_blocks=8)
    host = bench.source("host", PROMPT)
    assert bench.ask("a", PROMPT)[1]
    until(lambda: bench.gone_on == ["a"])
    assert host.reads == []


def test_more_loads_than_may_wait_go_on_at_once(make):
    bench = make(num_threads=1, max_loads=2)
    host = bench.source("host", PROMPT)
    go = threading.Event()
    host.before = lambda: (go.wait(60), None)[1]
    assert [bench.ask(name, PROMPT)[1] for name in "abc"] == [True, True, False]
    go.set()
    until(lambda: sorted(bench.gone_on) == ["a", "b"])


def test_a_source_slower_than_computing_is_left_alone_for_a_while(make):
    bench = make(compute_token_s=lambda: 0.001 / BLOCK)
    slow = bench.source("disk", PROMPT)
    slow.before = lambda: time.sleep(0.012)
    assert bench.ask("first", PROMPT)[1], "nobody knows yet"
    until(lambda: bench.gone_on == ["first"])
    with bench.lock:
        bench.scheduler.pool.clear_cache()
    answers = [bench.ask(f"later{n}", PROMPT)[1] for n in range(20)]
    assert answers[0] is False
    assert True in answers, "it is given another chance"


def test_load_now_in_the_callers_thread(make):
    bench = make()
    bench.source("host", PROMPT)
    request = Request(Work("a", PROMPT, Sampling(max_tokens=2, seed=0)))
    bench.loader.load_now(request)
    assert bench.cached(request) == 10 * BLOCK
    assert bench.loader._threads == []
    assert bench.at_rest()


def test_storm(make):
    """Random prefixes, sources, failures, cancels and other use of the blocks: nothing is lost, doubled or left."""
    rng = random.Random(4)
    bench = make(num_blocks=40, num_threads=3, deadline_s=0.02, max_loads=16)
    stems = [[rng.randrange(2) for _ in range(60)] for _ in range(5)]
    for name, share in (("host", 0.5), ("disk", 0.8), ("far", 0.3)):
        store = bench.source(name, [])
        store.hashes = {x for stem in stems for x in block_hashes(stem, BLOCK, ROOT) if rng.random() < share}

        def trouble(name: str = name) -> None:
            time.sleep(rng.choice([0, 0, 0.001, 0.005, 0.03 if name == "far" else 0]))
            if rng.random() < 0.1:
                raise OSError("now and then")

        store.before = trouble
    waiting: set[str] = set()
    cancelled: set[str] = set()
    for number in range(600):
        stem = rng.choice(stems)
        _, waits = bench.ask(f"r{number}", stem[: rng.randrange(1, 60)])
        if waits:
            waiting.add(f"r{number}")
        if waiting and rng.random() < 0.3:
            victim = rng.choice(sorted(waiting))
            with bench.lock:
                if victim not in bench.gone_on:
                    bench.loader.cancel(victim)
                    cancelled.add(victim)
        with bench.lock:
            blocks = bench.scheduler.pool.allocate(rng.randrange(0, 20))
            if blocks is not None:
                for block in blocks:
                    bench.written.pop(block, None)
                bench.scheduler.pool.release(blocks)
            bench.scheduler.check()
        time.sleep(rng.choice([0, 0.001]))
    until(lambda: len(bench.gone_on) == len(waiting - cancelled))
    until(bench.at_rest)
    assert sorted(bench.gone_on) == sorted(waiting - cancelled), "each once"
    assert sum(loaded.num_blocks for loaded in bench.loaded) > 100
    assert any(loaded.failed for loaded in bench.loaded)

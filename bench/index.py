"""The prefix index by itself: bytes for each block held, microseconds for a look-up, blocks taken in per second.

python -m bench.index                          the table of docs/index.md (minutes; takes about 3 GB)
python -m bench.index --blocks 2000000         the same with a smaller index

Look-ups are of 64 hashes: `all` workers hold all of them, an `eighth` of the workers does, a `staircase` where each
worker holds a little more than the one before, and `none` holds the first. Each figure of memory is measured in a process
of its own, as what its resident set grew by. Steps are measured in CPU time of the thread: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.machine import describe, sentence
from router.prefix_index import PrefixIndex
from workers.protocol.messages import IndexBatch
from workers.protocol.tiers import DEVICE, Removed

CHAIN = 64
PIECE = 512  # blocks taken in before the event loop gets its turn, as router/index/feed.py does


# --- look-ups and batches -----------------------------------------------------------------------------------------------


def lookups(num_workers: int, rng: random.Random) -> dict[str, float]:
    """Microseconds by who holds the chain."""
    chain = [rng.randbytes(16) for _ in range(CHAIN)]
    depths: dict[str, Callable[[int], int]] = {
        "all": lambda worker: CHAIN,
        "eighth": lambda worker: CHAIN if worker % 8 == 0 else 0,
        "staircase": lambda worker: 1 + worker * CHAIN // num_workers,
        "none": lambda worker: 0,
    }
    found = {}
    for name, depth in depths.items():
        index = PrefixIndex()
        for worker in range(num_workers):
            own = [rng.randbytes(16) for _ in range(500)]
            held: list[Removed] = [(block_hash, DEVICE) for block_hash in chain[: depth(worker)] + own]
            index.load_snapshot(f"w{worker}", 1, 0, held)
        found[name] = _best(lambda index=index: index.match(chain)) * 1e6  # type: ignore[misc]
    return found


def applied(num_workers: int, rng: random.Random, batches: int = 400, size: int = 512) -> float:
    """Blocks per second, stored and removed, of batches that replace what the same worker got before."""
    index = PrefixIndex()
    before: dict[str, list[bytes]] = {}
    script = []
    for number in range(num_workers):
        index.load_snapshot(f"w{number}", 1, 0, [])
    seqs = dict.fromkeys(index.workers(), 0)
    for _ in range(batches):
        name = f"w{rng.randrange(min(num_workers, 64))}"
        new = [rng.randbytes(16) for _ in range(size)]
        removed = [(block_hash, DEVICE) for block_hash in before.get(name, [])]
        seqs[name] += 1
        script.append(IndexBatch(name, 1, seqs[name], [(x, b"", DEVICE) for x in new], removed))
        before[name] = new
    began = time.perf_counter()
    for batch in script:
        assert not index.apply(batch)
    seconds = time.perf_counter() - began
    return sum(len(batch.stored) + len(batch.removed) for batch in script) / seconds


def _best(call: Callable[[], object], repeats: int = 15) -> float:
    began = time.perf_counter()
    call()
    count = max(1, int(0.01 / (time.perf_counter() - began)))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - began) / count)
    return best


# --- memory and the longest step ----------------------------------------------------------------------------------------


def distinct(entries: int, num_workers: int, rng: random.Random) -> Iterator[list[bytes]]:
    """What each worker holds: nothing that another one has."""
    for _ in range(num_workers):
        yield _hashes(entries // num_workers, rng)


def shared(entries: int, num_workers: int, rng: random.Random) -> Iterator[list[bytes]]:
    """A fifth of each worker's blocks are of 2,000 prefixes of 64 blocks, cut off at any depth, the popular ones on more workers."""
    prefixes = [_hashes(CHAIN, rng) for _ in range(2000)]
    each = entries // num_workers
    for _ in range(num_workers):
        mine: dict[bytes, None] = {}
        while len(mine) < each // 5:
            prefix = prefixes[int(len(prefixes) * rng.random() ** 2)]
            mine |= dict.fromkeys(prefix[: rng.randint(1, CHAIN)])
        yield [*mine, *_hashes(each - len(mine), rng)]


KINDS = {"distinct": distinct, "shared": shared}


def memory(kind: str, entries: int, num_workers: int) -> dict[str, float]:
    """In this process: load it, drop two workers in five, load others, all in pieces."""
    rng = random.Random(1)
    before = _resident()
    index = PrefixIndex()
    steps: list[float] = []

    def step(call: Callable[[], object]) -> object:
        began = time.thread_time()
        answer = call()
        steps.append(time.thread_time() - began)
        return answer

    def load(name: str, hashes: list[bytes]) -> None:
        snapshot = index.begin_snapshot(name, 1)
        for start in range(0, len(hashes), PIECE):
            piece = [(block_hash, DEVICE) for block_hash in hashes[start : start + PIECE]]
            step(lambda piece=piece: snapshot.add(0, piece))  # type: ignore[misc]
        step(snapshot.finish)

    found: dict[str, float] = {}
    began = time.perf_counter()
    for number, hashes in enumerate(KINDS[kind](entries, num_workers, rng)):
        load(f"w{number}", hashes)
    del hashes
    found["load_per_s"] = entries / (time.perf_counter() - began)
    found["blocks"] = len(index)
    found["sets"] = index._table.num_sets
    found["bytes"] = (_resident() - before) / entries
    found["gigabytes"] = _resident() / 1e9
    found["load_step_ms"] = 1e3 * max(steps)
    steps.clear()

    others = KINDS[kind](entries * 2 // 5, num_workers * 2 // 5, rng)
    for number in range(num_workers * 2 // 5):
        step(lambda number=number: index.drop(f"w{number}"))  # type: ignore[misc]
    while step(index.tidy):
        pass
    found["drop_step_ms"] = 1e3 * max(steps)
    for number, hashes in enumerate(others):
        load(f"x{number}", hashes)
        step(index.tidy)
    del hashes
    found["churned_bytes"] = (_resident() - before) / entries
    steps.clear()
    for _ in range(256):
        step(index.tidy)
    found["shrink_step_ms"] = 1e3 * max(steps)
    found["tidied_bytes"] = (_resident() - before) / entries
    found["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return found


def _hashes(count: int, rng: random.Random) -> list[bytes]:
    blob = rng.randbytes(16 * count)
    return [blob[start : start + 16] for start in range(0, len(blob), 16)]


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


# --- the command --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.index", description="Memory and speed of the prefix index"
    )
    parser.add_argument(
        "--blocks", type=int, default=20_000_000, help="(worker, block) entries of the memory rows"
    )
    parser.add_argument("--workers", type=int, default=1000, help="workers that hold them")
    parser.add_argument("--memory", choices=sorted(KINDS), help=argparse.SUPPRESS)  # one measurement, as JSON
    asked = parser.parse_args()
    if asked.memory:
        print(json.dumps(memory(asked.memory, asked.blocks, asked.workers)))
        return
    print(sentence(describe()) + "\n")
    print("| workers | look-up of 64: all hold it, us | an eighth | staircase | none | batches, blocks/s |")
    print("|---|---|---|---|---|---|")
    for num_workers in (8, 64, 256, 1000):
        rng = random.Random(num_workers)
        us = lookups(num_workers, rng)
        rate = max(applied(num_workers, rng) for _ in range(3))
        print(f"| {num_workers} | " + " | ".join(f"{us[k]:.1f}" for k in us) + f" | {rate:,.0f} |")
    print(f"\n| {asked.blocks:,} entries, {asked.workers:,} workers | " + " | ".join(KINDS) + " |")
    print("|---|" + "---|" * len(KINDS))
    rows = [_in_a_process(kind, asked.blocks, asked.workers) for kind in KINDS]
    for title, name, form in (
        ("distinct hashes", "blocks", "{:,.0f}"),
        ("distinct sets of holders", "sets", "{:,.0f}"),
        ("bytes for each entry, loaded", "bytes", "{:.0f}"),
        ("resident set of the process, GB", "gigabytes", "{:.2f}"),
        ("bytes, two fifths of the workers replaced", "churned_bytes", "{:.0f}"),
        ("bytes, after one round of tidying", "tidied_bytes", "{:.0f}"),
        ("peak of the process, GB", "peak_gigabytes", "{:.2f}"),
        ("snapshots, blocks/s", "load_per_s", "{:,.0f}"),
        ("longest step of a snapshot, ms", "load_step_ms", "{:.1f}"),
        ("longest step of a drop, ms", "drop_step_ms", "{:.1f}"),
        ("longest step of making shards small, ms", "shrink_step_ms", "{:.1f}"),
    ):
        print(f"| {title} | " + " | ".join(form.format(row[name]) for row in rows) + " |")


def _in_a_process(kind: str, entries: int, num_workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.index", "--memory", kind]
    command += ["--blocks", str(entries), "--workers", str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()

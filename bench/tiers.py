"""What it takes to bring a prefix back from host memory and from disk, beside computing it again.

python -m bench.tiers                                     the default model, 64 blocks, median of 7
python -m bench.tiers --model DIR --blocks 256 --threads 4 --directory /mnt/nvme
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.machine import describe
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.models.catalog import prepare_model
from workers.prefix_loader import PrefixLoader, PrefixSource
from workers.protocol.messages import Sampling, Work
from workers.tiers.block_bytes import BlockBytes, copy_bytes
from workers.tiers.tiers import Tiers, open_tiers
from workers.transfer.block_memory import block_memory

ONE_TOKEN = Sampling(max_tokens=1, seed=0, temperature=0.0)


class Rig:
    """An engine whose cache holds one prompt, and tiers that hold it too."""

    def __init__(self, model: str, blocks: int, threads: int, directory: Path) -> None:
        prepared = prepare_model(model, say=print)
        self.config = EngineConfig(
            num_blocks=blocks + 1,
            num_threads=threads,
            host_cache_memory=2**40,  # replaced below, when the size of a block is known
            disk_cache_memory=2**40,
            disk_cache_dir=directory,
        )
        self.engine = Engine(self.config, prepared)
        memory = block_memory(self.engine.runner.kv_cache, self.engine.layout)
        size = self.engine.layout.block_bytes
        sizes = {"host_cache_memory": 4 * blocks * size, "disk_cache_memory": 4 * blocks * size}
        tiers = open_tiers(
            self.config.model_copy(update=sizes),
            self.engine.layout,
            self.engine.hash_root,
            [memory],
            "bench",
            pinned=self.engine.device.type == "cuda",
        )
        assert tiers is not None
        self.tiers: Tiers = tiers
        self.block_bytes = BlockBytes([memory], size)
        self.copies = np.ones((blocks, size), np.uint8)
        rng = random.Random(0)
        self.prompt = [rng.randrange(prepared.vocab_size) for _ in range(blocks * self.config.block_size + 1)]
        self.num_blocks = blocks
        self.token = self.compute()[1]
        for block, block_hash, parent in self.engine.pool.cached_blocks():
            assert self.tiers.disk is not None
            self.tiers.disk.write_now(block_hash, parent, self.block_bytes.outgoing([block])[0])
        self.evict()
        self.engine.attach(tiers)

    def compute(self) -> tuple[float, int]:
        """(seconds until the first token of the prompt as far as it is not cached, the token)"""
        tiers, self.engine.tiers = self.engine.tiers, None  # what is loaded here is loaded before, and timed
        began = time.perf_counter()
        [answer] = self.engine.generate([self.prompt], ONE_TOKEN)
        seconds = time.perf_counter() - began
        self.engine.tiers = tiers
        return seconds, answer.tokens[0]

    def evict(self) -> None:
        """Everything cached is forgotten, and copied to host memory where there is a tier that lacks it."""
        pool = self.engine.pool
        blocks = pool.allocate(pool.num_blocks)
        assert blocks is not None
        pool.release(blocks)

    def copy_out(self) -> float:
        """Seconds that evicting as many blocks as the prompt has takes beyond what it takes without tiers."""
        began = time.perf_counter()
        for row, parts in zip(self.copies, self.block_bytes.outgoing(range(self.num_blocks)), strict=True):
            copy_bytes(row, parts)
        return time.perf_counter() - began

    def load(self, source: PrefixSource) -> float:
        """Seconds until the prefix is back; the token behind it must be the one that was computed."""
        self.evict()
        loader = PrefixLoader(self.engine.lock, self.engine.scheduler, [source])
        request = Request(Work("bench", self.prompt, ONE_TOKEN))
        began = time.perf_counter()
        loader.load_now(request)
        seconds = time.perf_counter() - began
        missing = self.engine.scheduler.uncached_tokens(request)
        if missing != 1 or self.compute()[1] != self.token:
            raise RuntimeError(
                f"{missing} tokens were missing after a load from {source.name}, or they were wrong"
            )
        return seconds

    def forget_pages(self) -> None:
        """Make the next reads come from the disk, where the system lets us."""
        assert self.tiers.disk is not None
        for path in self.tiers.disk.directory.glob("*.kv"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(rig: Rig, runs: int) -> dict[str, list[float]]:
    disk = rig.tiers.disk
    assert disk is not None

    def compute() -> float:
        rig.engine.pool.clear_cache()
        return rig.compute()[0]

    def from_disk() -> float:
        rig.forget_pages()
        return rig.load(disk)

    cases: dict[str, Callable[[], float]] = {
        "computed": compute,
        "evicted to host memory": rig.copy_out,
        "loaded from host memory": lambda: rig.load(rig.tiers.host),
        "loaded from disk, pages cached by the system": lambda: rig.load(disk),
        "loaded from disk": from_disk,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            seconds[name].append(case())
    return seconds


def table(seconds: dict[str, list[float]], num_bytes: int) -> str:
    computed = statistics.median(seconds["computed"])
    lines = ["| | ms, median (least to most) | GB/s | of computing |", "|---|---|---|---|"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{1000 * middle:.1f} ({1000 * min(values):.1f}–{1000 * max(values):.1f})"
        rate = "" if name == "computed" else f"{num_bytes / middle / 1e9:.1f}"
        lines.append(f"| {name} | {spread} | {rate} | 1/{computed / middle:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.tiers"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--blocks", type=int, default=64, help="of the prefix, 16 tokens each")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: a temporary one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=given.directory) as directory:
        rig = Rig(given.model, given.blocks, given.threads, Path(directory))
        seconds = measure(rig, given.runs)
        size = given.blocks * rig.engine.layout.block_bytes
        machine = describe()
        print(
            f"{machine['processor']}, {given.threads} threads, load average {machine['load_average'][0]:.1f}"
        )
        print(f"{given.blocks} blocks, {given.blocks * rig.config.block_size} tokens, {size / 1e6:.1f} MB\n")
        print(table(seconds, size))
        assert rig.tiers.disk is not None
        rig.tiers.disk.close()


if __name__ == "__main__":
    main()

"""Blocks in files: over restarts, crashes, spoilt bytes, full disks and a second owner."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nursery import Nursery
from tests.workers.tiers.byte_cache import BLOCK_BYTES, ROOT, Cache, content, h
from workers.tiers import disk as disk_module
from workers.tiers.block_file import HEADER_BYTES, Corrupt, Header, file_name, read_header, write_block
from workers.tiers.disk import DirectoryInUse, DiskTier

REPOSITORY = Path(__file__).resolve().parents[3]
PLENTY = 1 << 20


def always() -> bool:
    return True


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Opened:
    def __init__(self, directory: Path, capacity: int = PLENTY, root: bytes = ROOT, ranks: int = 1) -> None:
        self.cache = Cache(ranks=ranks)
        self.tier = DiskTier(directory, capacity, self.cache.block_bytes, root)
        self.done = 0

    def offer(self, number: int) -> bool:
        row = np.frombuffer(content(h(number)), np.uint8)
        return self.tier.offer(h(number), h(number - 1), row, self._done)

    def _done(self) -> None:
        self.done += 1

    def write(self, *numbers: int) -> None:
        before = self.done
        for count, number in enumerate(numbers, 1):
            assert self.offer(number)
            until(lambda count=count: self.done == before + count)

    def held(self) -> set[bytes]:
        return {block_hash for block_hash, _ in self.tier.held()}

    def read(self, *numbers: int) -> list[bytes]:
        blocks = list(range(10, 10 + len(numbers)))
        good = self.tier.read([h(n) for n in numbers], blocks, always)
        return [self.cache.get(block) for block in blocks[:good]]


@pytest.fixture
def opened(tmp_path: Path):
    tiers: list[Opened] = []

    def open_(*args, **kwargs) -> Opened:
        tiers.append(Opened(tmp_path / "w", *args, **kwargs))
        return tiers[-1]

    yield open_
    for each in tiers:
        each.tier.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_outlive_the_worker(opened, ranks: int):
    first = opened(ranks=ranks)
    first.write(1, 2, 3)
    assert first.read(1, 2, 3) == [content(h(n)) for n in (1, 2, 3)]
    first.tier.close()
    second = opened(ranks=ranks)
    until(lambda: second.tier.count([h(1), h(2), h(3), h(4)]) == 3)
    assert second.read(1, 2, 3) == [content(h(n)) for n in (1, 2, 3)]
    stored, removed = second.tier.drain()
    assert (dict(stored), removed) == ({h(n): h(n - 1) for n in (1, 2, 3)}, [])


def test_the_bound_holds_and_survives_a_restart_with_the_order_of_use(opened, tmp_path):
    size = HEADER_BYTES + BLOCK_BYTES
    first = opened(capacity=4 * size)
    for number in (10, 20, 30, 40, 50):
        first.write(number)
    assert first.held() == {h(n) for n in (20, 30, 40, 50)}
    os.utime(tmp_path / "w" / file_name(h(30)), (1, 1))
    first.read(20)
    first.tier.close()
    second = opened(capacity=3 * size)
    until(lambda: len(second.held()) == 3)
    assert second.held() == {h(n) for n in (20, 40, 50)}
    assert sum(f.stat().st_size for f in (tmp_path / "w").glob("*.kv")) <= 3 * size


def test_files_of_another_model_or_format_are_removed_and_others_left_alone(opened, tmp_path):
    first = opened()
    first.write(1, 2)
    first.tier.close()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    (tmp_path / "w" / (h(5).hex() + ".tmp")).write_bytes(b"half")
    os.rename(tmp_path / "w" / file_name(h(2)), tmp_path / "w" / file_name(h(7)))
    second = opened(root=b"q" * 16)
    second.write(9)
    assert {f.name for f in (tmp_path / "w").iterdir()} == {"lock", "notes.txt", file_name(h(9))}


@pytest.mark.parametrize("place", ["payload", "header", "length", "longer", "empty"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_spoilt_file_is_found_removed_and_counted(opened, tmp_path, place: str, restart: bool):
    first = opened()
    first.write(1, 2, 3)
    path = tmp_path / "w" / file_name(h(2))
    if restart:
        first.tier.close()
    raw = bytearray(path.read_bytes())
    if place == "payload":
        raw[-5] ^= 1
    elif place == "header":
        raw[30] ^= 1
    elif place == "longer":
        raw += b"x"
    path.write_bytes({"length": raw[:-7], "empty": b""}.get(place, raw))
    tier = first
    if restart:
        tier = opened()
        until(lambda: h(3) in tier.held())
    assert tier.read(1, 2, 3) == [content(h(1))]
    assert tier.tier.stats().errors == 1
    assert not path.exists()
    assert tier.held() == {h(1), h(3)}
    assert tier.tier.stats().active, "one bad file is no reason to stop"
    tier.write(2)
    assert tier.read(1, 2, 3) == [content(h(n)) for n in (1, 2, 3)]


def test_a_file_that_somebody_removed_is_no_error(opened, tmp_path):
    tier = opened()
    tier.write(1)
    (tmp_path / "w" / file_name(h(1))).unlink()
    assert tier.read(1) == []
    assert tier.held() == set()
    assert tier.tier.stats().active


def test_a_full_disk_switches_the_tier_off_and_is_said_once(opened, monkeypatch, caplog):
    tier = opened()
    tier.write(1)
    real = disk_module.write_block
    quota = [2]

    def full(directory, header, payload):
        if quota[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        quota[0] -= 1
        real(directory, header, payload)

    monkeypatch.setattr(disk_module, "write_block", full)
    accepted = sum(tier.offer(number) for number in range(2, 12))
    until(lambda: not tier.tier.active)
    until(lambda: tier.done == 1 + accepted)
    assert not tier.offer(20)
    assert (tier.held(), tier.read(1), tier.tier.count([h(1)])) == (set(), [content(h(1))], 0)
    stored, removed = tier.tier.drain()
    assert (stored, removed) == ([], []), "nobody was told of them yet"
    assert len([r for r in caplog.records if "is off from here on" in r.message]) == 1
    assert "No space left on device" in caplog.text


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    header = Header(ROOT, h(1), h(0), 1, 4096)
    payload = [memoryview(bytes(4096))]

    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="quota"):
        write_block(tmp_path, header, payload)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_switches_the_tier_off(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tier = Opened(tmp_path / "file" / "w")
    assert not tier.tier.active
    assert not tier.offer(1)
    assert tier.tier.count([h(1)]) == 0
    assert "is off from here on" in caplog.text
    tier.tier.close()


def test_a_second_owner_is_refused_with_the_reason(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_module, "_LOCK_WAIT_S", 0.1)
    first = opened()
    with pytest.raises(
        DirectoryInUse, match=rf"disk_cache_dir: .*w is in use by another worker \(process {os.getpid()}\)"
    ):
        Opened(tmp_path / "w")
    first.write(1)
    first.tier.close()
    second = opened()
    until(lambda: second.held() == {h(1)})


def test_less_than_one_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="disk_cache_memory is 100 bytes, one KV block of this model takes"):
        Opened(tmp_path / "w", capacity=100)


def test_the_name_must_be_that_of_the_content(opened, tmp_path):
    tier = opened()
    tier.write(1, 2)
    (tmp_path / "w" / file_name(h(1))).write_bytes((tmp_path / "w" / file_name(h(2))).read_bytes())
    assert tier.read(1) == []
    assert tier.tier.stats().errors == 1


def write_for_ever(config: dict[str, Any], fd: int) -> None:
    """A child of the nursery. Says the number of each block that was written."""
    opened = Opened(Path(config["directory"]), capacity=40_000)
    rng = random.Random(config["seed"])
    told = 0
    while True:
        if not opened.offer(rng.randrange(1, 1000)):
            until(lambda: not opened.tier._queue)
        while told < opened.done:
            os.write(fd, b".")
            told += 1


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery("tests.workers.tiers.test_disk:write_for_ever")
    yield made
    made.close()


def test_kill_in_the_middle_of_writes(tmp_path, nursery):
    """Whatever moment a worker is killed at: what is found afterwards is right, and nothing is left over."""
    rng = random.Random(1)
    directory = tmp_path / "w"
    for life in range(4):
        told, telling = os.pipe()
        writer = nursery.fork({"directory": str(directory), "seed": life}, telling)
        os.close(telling)
        with open(told, "rb", buffering=0) as dots:
            for _ in range(rng.randrange(10, 500)):  # that many were written before, however long it takes
                assert dots.read(1) == b"."
            writer.signal(signal.SIGKILL)
            assert writer.ended(10)
        again = Opened(directory, capacity=40_000)
        until(lambda again=again: len(again.held()) == len(list(directory.glob("*.kv"))) > 0)
        assert list(directory.glob("*.tmp")) == []
        for block_hash in again.held():
            number = int.from_bytes(block_hash, "little")
            assert again.read(number) == [content(block_hash)]
        assert again.tier.stats().errors == 0, "a kill leaves no half file under a final name"
        assert sum(f.stat().st_size for f in directory.glob("*.kv")) <= 40_000
        again.tier.close()


def test_headers_say_what_is_wrong(tmp_path):
    path = tmp_path / file_name(h(1))
    write_block(tmp_path, Header(ROOT, h(1), h(0), 1, 3), [memoryview(b"abc")])
    assert read_header(path).parent == h(0)
    raw = path.read_bytes()
    for spoilt, says in (
        (b"", "no whole header"),
        (raw[:-1], "not as long"),
        (raw[:8] + b"\7" + raw[9:], "header that was not written"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(Corrupt, match=says):
            read_header(path)

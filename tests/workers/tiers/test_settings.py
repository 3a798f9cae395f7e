"""Settings of the tiers that cannot be meant, and where a worker's files are."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from tests.workers.tiers.byte_cache import BLOCK_BYTES, ROOT, ByteCache
from workers.config import EngineConfig
from workers.protocol.messages import KvLayout
from workers.tiers.tiers import open_tiers

LAYOUT = KvLayout(1, 1, 6, 2, "float32", "f")  # 96 bytes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host_cache_memory": "1MB", "disk_cache_memory": "1MB"}, "disk_cache_dir is not: name a directory"),
        ({"disk_cache_memory": "1MB", "disk_cache_dir": "/d"}, "blocks reach the disk through host memory"),
        ({"host_cache_memory": "1MB", "prefix_caching": False}, "prefix_caching is off"),
        ({"disk_cache_dir": "cache"}, "disk_cache_dir is cache: it must be an absolute path"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig(**settings)


def test_a_pool_may_do_without():
    below = {"host_cache_memory": "1GiB", "disk_cache_memory": "9GiB", "disk_cache_dir": "/d"}
    pools = {"decode": {"engine": {"disk_cache_memory": 0}}}
    config = ClusterConfig.model_validate({"engine": below, "pools": pools})
    assert config.pool_engine("prefill").disk_cache_memory == 9 * 2**30
    assert config.pool_engine("decode").disk_cache_memory == 0
    assert config.pool_engine("decode").host_cache_memory == 2**30


def open_with(worker_id: str, **settings):
    assert LAYOUT.block_bytes == BLOCK_BYTES
    return open_tiers(EngineConfig(**settings), LAYOUT, ROOT, [ByteCache(4)], worker_id, pinned=False)


def test_off_is_off():
    assert open_with("decode-0") is None


@pytest.mark.parametrize("worker_id", ["decode-0", "../decode", ".."])
def test_each_worker_has_a_directory_inside(tmp_path: Path, worker_id: str):
    inside = tmp_path / "cache"
    below = {"host_cache_memory": 1000, "disk_cache_memory": 1000, "disk_cache_dir": inside}
    tiers = open_with(worker_id, **below)
    tiers.close()
    assert len(list(inside.iterdir())) == 1
    assert list(tmp_path.iterdir()) == [inside]
    assert inside.iterdir().__next__().stat().st_mode & 0o77 == 0, "nobody else may look"


def test_less_memory_than_a_block_leaves_no_lock(tmp_path: Path):
    below = {"disk_cache_memory": 1000, "disk_cache_dir": tmp_path}
    with pytest.raises(ValueError, match="host_cache_memory is 10 bytes"):
        open_with("w", host_cache_memory=10, **below)
    tiers = open_with("w", host_cache_memory=1000, **below)
    tiers.close()

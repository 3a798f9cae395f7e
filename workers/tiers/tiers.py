"""The tiers below the device: what it evicts goes to host memory, from there to disk; a prefix hit brings it back."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from workers.config import EngineConfig
from workers.engine.block_pool import Evicted
from workers.protocol.messages import KvLayout
from workers.protocol.tiers import Removed, Stored
from workers.tiers.block_bytes import BlockBytes
from workers.tiers.disk import DiskTier
from workers.tiers.host import HostTier
from workers.tiers.stats import TierStats
from workers.transfer.block_memory import BlockMemory

logger = logging.getLogger(__name__)

_SAVE_S = 2.0


class Tiers:
    def __init__(self, block_bytes: BlockBytes, host: HostTier, disk: DiskTier | None) -> None:
        self._bytes = block_bytes
        self.host = host
        self.disk = disk
        self.sources: list[HostTier | DiskTier] = [host] if disk is None else [host, disk]  # quickest first

    def cached(self) -> list[Stored]:
        return [(h, parent, tier.name) for tier in self.sources for h, parent in tier.held()]

    def drain_events(self) -> tuple[list[Stored], list[Removed]]:
        """What changed in `cached` since the last call; nothing is in both."""
        stored: list[Stored] = []
        removed: list[Removed] = []
        for tier in self.sources:
            came, went = tier.drain()
            stored += [(block_hash, parent, tier.name) for block_hash, parent in came]
            removed += [(block_hash, tier.name) for block_hash in went]
        return stored, removed

    def stats(self) -> dict[str, TierStats]:
        """By the tier's name."""
        return {tier.name: tier.stats() for tier in self.sources}

    def close(self, on_device: Sequence[Evicted] = ()) -> None:
        """Write what only device and host memory hold to the disk, for as long as `_SAVE_S`, then let go of it.

        On the disk lie the ends of prefixes, because leaves are evicted first. Without their beginnings they are of no
        use to the next life; so beginnings are written first.
        """
        disk = self.disk
        if disk is None:
            return
        deadline = time.monotonic() + _SAVE_S
        disk.finish_queue(deadline)
        parent_of = {block_hash: parent for _, block_hash, parent in on_device} | dict(self.host.held())
        block_of = {block_hash: block for block, block_hash, _ in on_device}
        saved = 0
        for block_hash in _beginnings_first(parent_of):
            if time.monotonic() > deadline or not disk.active:
                break
            if block_hash in block_of:
                parts = self._bytes.outgoing([block_of[block_hash]])[0]
            else:
                parts = self.host.row(block_hash)
            saved += disk.write_now(block_hash, parent_of[block_hash], parts)
        logger.info("%d of %d cached blocks were saved to %s", saved, len(parent_of), disk.directory)
        disk.close()


def open_tiers(
    config: EngineConfig,
    layout: KvLayout,
    hash_root: bytes,
    memories: Sequence[BlockMemory],
    worker_id: str,
    *,
    pinned: bool,
) -> Tiers | None:
    """None: they are off. `memories`: the cache of each rank. `pinned`: it is on a GPU. Raises ValueError."""
    if not config.host_cache_memory:
        return None
    block_bytes = BlockBytes(memories, layout.block_bytes)
    disk = None
    if config.disk_cache_memory:
        assert config.disk_cache_dir is not None, "the configuration was checked"
        directory = config.disk_cache_dir.expanduser() / quote(worker_id, safe="").replace(".", "%2E")
        disk = DiskTier(directory, int(config.disk_cache_memory), block_bytes, hash_root)
    try:
        host = HostTier(int(config.host_cache_memory), block_bytes, pinned=pinned, lower=disk)
    except ValueError:
        if disk is not None:
            disk.close()
        raise
    return Tiers(block_bytes, host, disk)


def _beginnings_first(parent_of: Mapping[bytes, bytes]) -> list[bytes]:
    """The hashes, each after its parent, by their distance from the first that is known."""
    depth_of: dict[bytes, int] = {}
    for block_hash in parent_of:
        chain = []
        while block_hash in parent_of and block_hash not in depth_of:
            chain.append(block_hash)
            block_hash = parent_of[block_hash]
        depth = depth_of.get(block_hash, -1)
        for distance, each in enumerate(reversed(chain), 1):
            depth_of[each] = depth + distance
    return sorted(parent_of, key=depth_of.__getitem__)

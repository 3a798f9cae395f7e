"""Another rank's KV cache in the hands of rank 0, in shared memory and on a (pretended) GPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.workers.transfer.fake_cuda import FakeCuda, World
from workers.device_memory import DevicePages
from workers.models.sharding import rank_layout
from workers.parallel.messages import Ready
from workers.parallel.rank_memory import lend, lent_memory
from workers.parallel.shard import Shard
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages

LAYOUT = KvLayout(2, 4, 8, 4, "float32", "00")  # of the model: four KV heads
SHARD = Shard(1, 2)
SHAPE = (6, 2, 2, 2, 4, 8)  # of a rank: two of them
NUM_BYTES = 6 * rank_layout(LAYOUT, SHARD).block_bytes
CPU = torch.device("cpu")


def pages(kind: str, cuda: FakeCuda) -> SharedPages | DevicePages:
    return SharedPages(NUM_BYTES) if kind == "shared" else DevicePages(NUM_BYTES, CPU, cuda)


@pytest.mark.parametrize("kind", ["shared", "device"])
def test_both_see_what_either_writes(kind: str) -> None:
    cuda = FakeCuda(World())
    held = pages(kind, cuda)
    theirs = held.tensor.view(torch.float32).view(SHAPE)
    memory = lent_memory(*lend(held), LAYOUT, SHARD, torch.empty(SHAPE), cuda)

    theirs[3] = torch.arange(theirs[3].numel()).view(theirs[3].shape)
    (sent,) = memory.outgoing([3], heads=range(1, 2))
    assert torch.equal(torch.frombuffer(bytearray(sent), dtype=torch.float32), theirs[3][:, :, 1].flatten())

    with memory.incoming([5, 0]) as views:
        for view in views:
            view.cast("B")[:] = b"\x01" * view.nbytes
    assert bool((theirs[[5, 0]].view(torch.uint8) == 1).all())
    assert not bool(theirs[[1, 2, 4]].any())


def test_what_is_not_lent_as_announced_is_refused() -> None:
    held = SharedPages(NUM_BYTES)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=f"of {NUM_BYTES} bytes, rank 0 one of {NUM_BYTES // 2}"):
        lent_memory(*lend(held), LAYOUT, SHARD, torch.empty((3, *SHAPE[1:])))
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="neither a descriptor nor a handle"):
        lent_memory(Ready(NUM_BYTES), None, LAYOUT, SHARD, torch.empty(SHAPE))
    with pytest.raises(ValueError, match="tensor_parallel needs cupy"):
        lend(None)


def test_memory_that_torch_would_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would be read and written in its place, and nobody would see it."""
    cuda = FakeCuda(World())
    held = DevicePages(NUM_BYTES, CPU, cuda)
    as_it_is = cuda.bytes_at
    monkeypatch.setattr(cuda, "bytes_at", lambda *given: as_it_is(*given).clone())
    with pytest.raises(RuntimeError, match="lent can't be used"):
        lent_memory(*lend(held), LAYOUT, SHARD, torch.empty(SHAPE), cuda)

"""Blocks of int8 and fp8 caches, values with their scales, by every road and between different numbers of ranks."""

from __future__ import annotations

import msgspec
import pytest
import torch

from kernels.paged_kv import PagedKv
from tests.workers.transfer.fake_cuda import FakeCuda, World
from tests.workers.transfer.gpu_pair import on_gpu
from tests.workers.transfer.pair import LAYOUT, DecodeSide, PatternEngine, PrefillSide, at_rest, work
from workers.protocol.messages import KvLayout
from workers.tiers.block_bytes import BlockBytes, copy_bytes
from workers.transfer import roads
from workers.transfer.block_memory import DeviceBlocks, HostBlocks, canonical_view
from workers.transfer.cuda_ipc import CudaIpc
from workers.transfer.nccl import Nccl

LAYOUTS = {name: msgspec.structs.replace(LAYOUT, dtype=name) for name in ("int8", "fp8")}


@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("staged", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("road", ["shm", "tcp"])
@pytest.mark.usefixtures("nothing_leaks")
def test_right_bytes_through_the_host(road: str, staged: tuple[bool, bool], ranks: tuple[int, int]) -> None:
    d = DecodeSide(PatternEngine(64, ranks[1], layout=LAYOUTS["fp8"]), [road], staged=staged[1])
    p = PrefillSide(PatternEngine(64, ranks[0], layout=LAYOUTS["fp8"]), [road], staged=staged[0])
    hand_over(d, p)


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize("road", ["nccl", "cuda_ipc"])
@pytest.mark.usefixtures("nothing_leaks")
def test_right_bytes_between_gpus(road: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sender is told to compress with is not applied: a block is small already."""
    world = World()
    cudas = {"p": FakeCuda(world, "GPU P"), "d": FakeCuda(world, "GPU D")}
    kinds = {name: (Nccl(cuda), CudaIpc(cuda)) for name, cuda in cudas.items()}

    def use(side: str) -> None:
        for kind in kinds[side]:
            monkeypatch.setitem(roads.ROADS, kind.name, kind)

    use("d")
    engine = PatternEngine(64, 2, layout=LAYOUTS[dtype])
    d = DecodeSide(engine, [road], memories=on_gpu(engine, cudas["d"]))
    use("p")
    engine = PatternEngine(64, 1, layout=LAYOUTS[dtype])
    p = PrefillSide(engine, [road], memories=on_gpu(engine, cudas["p"]), compression="fp8")
    try:
        hand_over(d, p)
    finally:
        world.released.set()
    assert world.wrong == []


def hand_over(d: DecodeSide, p: PrefillSide) -> None:
    names = []
    for length in (1, 8, 33, 90):
        w = work(f"w{length}", [token * length % 1000 for token in range(length)])
        p.accept(w, d.reserve(w))
        names.append(w.request_id)
        p.run()
    d.wait(*names)
    assert [d.committed.get(name) for name in names] == [True] * len(names), (d.lost_reasons, p.reasons)
    at_rest(d, p)
    p.stop()
    d.stop()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_a_cache_on_a_device_is_described_and_sent_as_one_on_the_host(dtype: str, planes: int) -> None:
    layout = KvLayout(3, 4 if planes == 2 else 1, 8, 4, dtype, "f", planes)
    torch.manual_seed(0)
    cache = torch.randint(0, 256, (10, 3, planes, layout.num_kv_heads, 4 * 12), dtype=torch.uint8)
    assert PagedKv.held_in(cache, 8, "int8" if dtype == "int8" else "fp8").block_size == 4
    assert layout.block_bytes == cache[0].nbytes
    device, copy = DeviceBlocks(cache, layout), cache.clone()
    host = HostBlocks(copy.view(-1).numpy(), layout)
    own, expected = (canonical_view(layout, 0, 10, layout.num_kv_heads), device.view)
    assert {name: getattr(own, name) for name in own.__slots__ if name != "address"} == {
        name: getattr(expected, name) for name in own.__slots__ if name != "address"
    }
    heads = range(layout.num_kv_heads - 1, layout.num_kv_heads)
    for layers, some in ((None, None), (range(1, 3), None), (range(2, 3), heads)):
        sent = [b"".join(map(bytes, memory.outgoing([7, 0], layers, some))) for memory in (device, host)]
        assert sent[0] == sent[1]
        for memory in (device, host):
            with memory.incoming([2, 9], layers, some) as views:
                begin = 0
                for view in views:
                    view[:] = sent[0][begin : begin + len(view)]
                    begin += len(view)
        assert torch.equal(cache, copy)
    tiers = BlockBytes([device], layout.block_bytes)
    kept = torch.empty(layout.block_bytes, dtype=torch.uint8).numpy()
    copy_bytes(kept, tiers.outgoing([7])[0])
    assert kept.tobytes() == cache[7].numpy().tobytes()

"""What the fleet says of its workers."""

from __future__ import annotations

import msgspec
import pytest

from router.fleet import Fleet
from router.load import LoadBook
from workers.protocol.messages import KvLayout, WorkerInfo

D0 = WorkerInfo(
    worker_id="d0",
    epoch=1,
    role="decode",
    address="127.0.0.1:1",
    model="m",
    layout=KvLayout(1, 1, 16, 16, "bfloat16", "aa"),
    hash_root=b"native",
    num_blocks=8,
    max_model_len=128,
    max_num_seqs=4,
    vocab_size=100,
    device="cpu (avx2)",
    pid=0,
)


async def test_workers_that_cannot_work_together_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """One of them has fallen back to torch, which reads a quantized model's weights as floats."""
    fleet = Fleet(secret=b"s" * 16, router_id="r", heartbeat_s=1.0, timeout_s=5.0, book=LoadBook())
    try:
        fleet.sync({"d0": D0, "d1": msgspec.structs.replace(D0, worker_id="d1")})
        assert not [r for r in caplog.records if r.levelname == "WARNING"]
        odd = msgspec.structs.replace(D0, worker_id="p0", role="prefill", hash_root=b"", device="cpu (torch)")
        fleet.sync({"d0": D0, "p0": odd})
        [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert warning.startswith("worker p0 (cpu (torch)) and d0 (cpu (avx2)) differ")
    finally:
        await fleet.close()

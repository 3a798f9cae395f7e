"""The prefill side of a test as a process of its own: CUDA opens no memory in the process that exports it.

    python -m tests.workers.transfer.gpu_sender DEVICE ROADS COMPRESSION DTYPE < ticket, work

DEVICE is as torch has it, or `fake`; DTYPE is that of the cache. Reads frames of msgpack until the end of its input, hands each over, and prints a
line of JSON for it: how it ended, the road, why others were passed over.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import msgspec

from tests.workers.transfer.fake_cuda import FakeCuda, World
from tests.workers.transfer.gpu_pair import on_gpu
from tests.workers.transfer.pair import LAYOUT, PatternEngine, PrefillSide, until
from workers.cuda import Cuda, CupyCuda
from workers.protocol.messages import Ticket, Work
from workers.transfer import roads
from workers.transfer.cuda_ipc import CudaIpc
from workers.transfer.nccl import Nccl


class Task(msgspec.Struct):
    work: Work
    ticket: Ticket


def main(device: str, allowed: str, compression: str, dtype: str) -> None:
    cuda: Cuda = CupyCuda()
    if device == "fake":
        cuda, device = FakeCuda(World(), "GPU P"), "cpu"
        roads.ROADS.update({"nccl": Nccl(cuda), "cuda_ipc": CudaIpc(cuda)})
    engine = PatternEngine(256, layout=msgspec.structs.replace(LAYOUT, dtype=dtype))
    side = PrefillSide(
        engine,
        allowed.split(","),
        memories=on_gpu(engine, cuda, device),
        io_timeout_s=20.0,
        compression=compression,
    )
    for line in sys.stdin:
        task = msgspec.json.decode(line, type=Task)
        side.accept(task.work, task.ticket)
        begun = time.monotonic()
        side.run()
        name = task.work.request_id
        until(lambda name=name: name in side.ended, 60.0)  # type: ignore[misc]
        found: dict[str, Any] = {
            "ended": side.ended[name],
            "reason": side.reasons[name],
            "road": side.roads[name],
            "seconds": time.monotonic() - begun,
            "passed_over": [why for status in side.handoffs.peers().values() for why in status.passed_over],
        }
        print(json.dumps(found), flush=True)
    side.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])

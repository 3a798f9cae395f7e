"""What a backend does for one rank. Two buffers, a send and a receive one, are all the memory there is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.nccl_tests.plan import Case

BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True, slots=True)
class Region:
    """A place in one of the two buffers."""

    buffer: Literal["send", "recv"]
    first_byte: int = 0


@dataclass(frozen=True, slots=True)
class About:
    """Where a rank runs."""

    host: str
    pid: int
    device: str
    device_key: str  # equal for two ranks of a host that share a device
    versions: dict[str, str] = field(default_factory=dict)


class Collectives(Protocol):
    """One rank. All methods but `abort` and `error` are called by one thread."""

    def about(self) -> About:
        """Raises BackendMissing."""

    def make_id(self) -> str:
        """What all ranks need to find each other. Asked of rank 0, before it joins."""

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        """Returns when all ranks have joined."""

    def allocate(self, send_bytes: int, recv_bytes: int) -> None: ...

    def fill(self, to: Region, pattern: NDArray[np.uint8], num_bytes: int) -> None:
        """Repeat a pattern over a region."""

    def read(self, region: Region, num_bytes: int) -> NDArray[np.uint8]: ...

    def start(self, case: Case, send: Region, recv: Region) -> None:
        """Enqueue one collective. It may return before the collective has ended."""

    def synchronize(self) -> None:
        """Wait for all that was started."""

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """Make what is running fail. Called by another thread."""

    def error(self) -> str | None:
        """What went wrong in the background. Called by another thread."""

    def close(self) -> None: ...

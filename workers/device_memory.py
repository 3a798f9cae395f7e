"""GPU memory that other processes of the host can open: what `workers/shared_memory.py` is for host memory."""

from __future__ import annotations

import logging
import weakref

import torch

from workers.cuda import Cuda, CupyCuda

logger = logging.getLogger(__name__)


class DevicePages:
    """Zeros. An allocation of its own, because a handle names a whole one: torch's allocator gives parts of large ones,
    and a peer would be shown whatever else lies there. It is freed with the last tensor that views it."""

    def __init__(self, num_bytes: int, device: torch.device, cuda: Cuda | None = None) -> None:
        """Raises RuntimeError."""
        self.num_bytes = num_bytes
        self._cuda, self._device = cuda or CupyCuda(), device
        self.address = self._cuda.allocate(device, num_bytes)
        weakref.finalize(self, self._cuda.free, device, self.address).atexit = False

    @property
    def handle(self) -> bytes:
        """For peers. Raises RuntimeError."""
        return self._cuda.export(self._device, self.address)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes]"""
        return self._cuda.bytes_at(self._device, self.address, self.num_bytes, self)


class LentDevicePages:
    """Those of another process of this worker, opened here. Peers open them by the same handle."""

    def __init__(self, handle: bytes, num_bytes: int, device: torch.device, cuda: Cuda | None = None) -> None:
        """`device`: by which this process reads and writes them. Raises RuntimeError."""
        self.handle, self.num_bytes = handle, num_bytes
        self._cuda, self._device = cuda or CupyCuda(), device
        self.address = self._cuda.open(device, handle)
        weakref.finalize(self, self._cuda.close, device, self.address).atexit = False

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes]. Raises RuntimeError where torch can't use them in place."""
        tensor = self._cuda.bytes_at(self._device, self.address, self.num_bytes, self)
        if tensor.data_ptr() != self.address:  # torch copies what it takes to lie on another device
            raise RuntimeError(
                f"memory that another process has lent can't be used as that of {self._device}"
            )
        return tensor


def exportable_pages(num_bytes: int, device: torch.device) -> DevicePages | None:
    """None where cupy or the driver can't: the cache is one that only its own process sees, then."""
    cuda = CupyCuda()
    lack = cuda.lacks(nccl=False)
    if lack is None:
        try:
            return DevicePages(num_bytes, device, cuda)
        except RuntimeError as error:
            lack = str(error)
    logger.warning("the KV cache can't be shown to other processes (cuda_ipc): %s", lack)
    return None

"""How fast bytes get across, measured while any are on their way. Pure: the caller tells the time."""

from __future__ import annotations

_LEAST_BYTES = 1 << 20  # of a sample: less says more about latency than about bandwidth
_WEIGHT = 0.3  # of the newest sample


class Throughput:
    def __init__(self) -> None:
        self.num_bytes = 0  # since the start
        self.bytes_per_s = 0.0  # moving average; 0: not measured yet
        self._busy_since: float | None = None
        self._sample_s = 0.0
        self._sample_bytes = 0

    def begin(self, now: float) -> None:
        """Something is on its way."""
        if self._busy_since is None:
            self._busy_since = now

    def took(self, num_bytes: int, now: float, idle: bool) -> None:
        """So much has got across. `idle`: nothing else is on its way."""
        self.num_bytes += num_bytes
        self._sample_bytes += num_bytes
        if self._busy_since is not None:
            self._sample_s += now - self._busy_since
        self._busy_since = None if idle else now
        if self._sample_bytes >= _LEAST_BYTES and self._sample_s > 0:
            rate = self._sample_bytes / self._sample_s
            old = self.bytes_per_s
            self.bytes_per_s = rate if old == 0 else old + _WEIGHT * (rate - old)
            self._sample_bytes, self._sample_s = 0, 0.0

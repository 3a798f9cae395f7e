"""How long kernels take on a GPU, and what that GPU could do at most, found out in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Launch = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work in several forms that give the same result. `needed_bytes`: read or written once at least."""

    name: str
    shape: Mapping[str, int | str]
    forms: Mapping[str, Launch]
    needed_bytes: int
    flops: int = 0
    ceiling: str = "copy"  # what it is held against: `copy` or `matmul`


@dataclass(frozen=True)
class Ceilings:
    """Of this GPU; None in a rehearsal."""

    copy: float | None  # bytes per second, read and written ones together
    matmul: float | None  # bf16 operations per second


@dataclass
class Timer:
    """Times launches by CUDA events. In a rehearsal, and without a GPU, it runs each once and gives no time."""

    device: torch.device
    runs: int = 20
    rehearse: bool = False
    _flush: torch.Tensor | None = field(default=None, repr=False)

    @property
    def _times(self) -> bool:
        return self.device.type == "cuda" and not self.rehearse

    def seconds(self, launch: Launch) -> float | None:
        """The median of `runs`, each after the L2 cache was overwritten."""
        if not self._times:
            launch()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return None
        if self._flush is None:
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(max(size, 1 << 30), dtype=torch.uint8, device=self.device)
        for _ in range(3):
            launch()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self.runs)
        ]
        for begin, end in events:
            self._flush.zero_()  # so long that the launch is queued before the GPU comes to it
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    def ceilings(self) -> Ceilings:
        """A copy of 2 GiB and a product of 8192 x 8192 x 8192."""
        if not self._times:
            return Ceilings(None, None)
        source = torch.empty(1 << 31, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = self.seconds(lambda: target.copy_(source))
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        product = self.seconds(lambda: a @ b)
        assert copy is not None
        assert product is not None
        return Ceilings(2 * source.nbytes / copy, 2 * 8192**3 / product)


def measure(case: Case, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """The case with the time of each form, what it moved or computed a second, and its share of the ceiling."""
    forms = {}
    for name, launch in case.forms.items():
        try:
            seconds = timer.seconds(launch)
        except Exception as error:  # noqa: BLE001  # one form that fails must not take the others with it
            forms[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            continue
        found: dict[str, Any] = {"seconds": seconds}
        if seconds is not None:
            found["bytes_per_s"] = case.needed_bytes / seconds
            if case.flops:
                found["flops_per_s"] = case.flops / seconds
            if case.ceiling == "copy" and ceilings.copy:
                found["share"] = case.needed_bytes / seconds / ceilings.copy
            elif case.ceiling == "matmul" and ceilings.matmul:
                found["share"] = case.flops / seconds / ceilings.matmul
        forms[name] = found
    return {"name": case.name, "shape": dict(case.shape), "ceiling": case.ceiling, "forms": forms}

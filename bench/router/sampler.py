"""Where a process spends its CPU time: its stack, looked at every millisecond of it. Costs next to nothing."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from types import FrameType

_EVERY_S = 0.001


class Sampler:
    """On the main thread. C functions count for the line of Python that called them."""

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()
        self._under: Counter[str] = Counter()
        self._samples = 0

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)

    def stop(self, out: Path) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write_text(self.report())

    def _look(self, number: int, frame: FrameType | None) -> None:
        self._samples += 1
        seen = set()
        leaf = True
        while frame is not None:
            name = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            if leaf:
                self._own[name] += 1
                leaf = False
            function = f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"
            if function not in seen:
                seen.add(function)
                self._under[function] += 1
            frame = frame.f_back

    def report(self, lines: int = 60) -> str:
        parts = [f"{self._samples} samples of {_EVERY_S * 1e3:g} ms of CPU time"]
        for title, counts in (("in the line itself", self._own), ("in the function and below", self._under)):
            parts.append(f"\n{title}")
            parts += [
                f"{100 * count / max(self._samples, 1):5.1f} %  {name}"
                for name, count in counts.most_common(lines)
            ]
        return "\n".join(parts) + "\n"

"""What a step costs outside the model: scheduling, building the input, sampling, bookkeeping.

The parts of a live engine are wrapped and their time taken; what is left of the step after them is named too. CPU time
is that of the stepping thread alone, so that other processes on the machine do not count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workers.engine.engine import Engine


@dataclass
class Profile:
    wall_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.wall_s[part] += time.perf_counter() - wall
                self.cpu_s[part] += time.thread_time() - cpu

        return wrapped

    def wrap(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Put a timed call in place of a method; the answer takes it away again."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))
        return lambda: delattr(owner, name)


def profile_host(engine: Engine, drive: Callable[[], Any], steps: int, batch: int) -> dict[str, Any]:
    """Run `drive`, which takes `steps` steps of `batch` sequences. Microseconds a step and a token, share of a step."""
    profile = Profile()
    runner: Any = engine.runner
    restore = [
        profile.wrap(engine, "step", "step"),
        profile.wrap(engine.scheduler, "schedule", "schedule"),
        profile.wrap(engine.scheduler, "update", "update"),
        profile.wrap(runner, "run", "run"),
    ]
    for owner, name in _model_calls(runner):
        restore.append(profile.wrap(owner, name, "model"))
    sampler = runner._sampler
    runner._sampler = profile.timed("sample", sampler)
    try:
        drive()
    finally:
        runner._sampler = sampler
        for undo in restore:
            undo()
    return _summary(profile, steps, batch)


def _model_calls(runner: Any) -> list[tuple[Any, str]]:
    """The calls that are the model's: of the native runner one, of torch's the layers and the head."""
    if hasattr(runner, "model"):
        return [(runner.model, "forward"), (runner.model, "logits")]
    return [(runner, "logits")]


def _summary(profile: Profile, steps: int, batch: int) -> dict[str, Any]:
    wall, cpu = profile.wall_s, profile.cpu_s

    def rest(of: dict[str, float]) -> dict[str, float]:
        return {
            "schedule": of["schedule"],
            "step input": of["step"] - of["schedule"] - of["run"] - of["update"],
            "arrays": of["run"] - of["model"] - of["sample"],
            "sample": of["sample"],
            "update": of["update"],
        }

    host_wall, host_cpu = rest(wall), rest(cpu)
    total = sum(host_cpu.values())
    return {
        "steps": steps,
        "batch": batch,
        "step_us": wall["step"] / steps * 1e6,
        "model_us": wall["model"] / steps * 1e6,
        "host_cpu_us": total / steps * 1e6,
        "host_cpu_us_per_token": total / steps / batch * 1e6,
        "host_share": sum(host_wall.values()) / wall["step"],
        "parts_cpu_us": {part: seconds / steps * 1e6 for part, seconds in host_cpu.items()},
    }

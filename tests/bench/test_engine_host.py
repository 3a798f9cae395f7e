"""The engine's own part of a step, without a device."""

from __future__ import annotations

import pytest

from bench.engine.host import measure


@pytest.mark.parametrize("overlap", [False, True])
def test_every_part_of_a_step_is_counted_once(overlap: bool) -> None:
    parts = measure(2, 20, 30, overlap=overlap)
    assert set(parts) == {"schedule", "input", "update", "step"}
    assert all(microseconds > 0 for microseconds in parts.values())
    assert parts["schedule"] + parts["input"] + parts["update"] == pytest.approx(parts["step"])

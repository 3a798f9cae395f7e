"""The comparison of layers with experts, on a small one."""

from __future__ import annotations

import pytest
import torch

from bench.experts import block


def test_a_row_for_each_number_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        block.main(
            ["--shapes", "small", "--batches", "1,5", "--rounds", "3", "--threads", "1", "--clock", "cpu"]
        )
    finally:
        torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| small")]
    assert [row[1] for row in rows] == ["1", "5"]
    for row in rows:
        ours, floor, kind, theirs, ratio = row[2:7]
        assert kind in ("eager", "grouped_mm", "batched_mm")
        assert float(floor) > 0
        assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.05)


def test_layers_that_differ_are_not_compared() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match="eager differs from headrace"):
        block._check({"headrace": lambda x: x, "eager": lambda x: 1.1 * x}, x)


def test_the_processor_s_time_is_counted_for_one_thread_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        block.main(["--clock", "cpu", "--threads", "2"])
    assert "--threads 1" in capsys.readouterr().err

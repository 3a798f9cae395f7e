"""`headrace bench` hands everything after the benchmark's name to the benchmark."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from cluster import cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda path, command: commands.append(command))
    return commands


@pytest.mark.parametrize("arguments", [["--help"], ["--runs", "1", "--", "--set", "engine.dtype=float32"]])
def test_options_reach_the_benchmark(started: list[list[str]], arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, ["bench", "compare", *arguments]).exit_code == 0
    assert started == [[sys.executable, "-m", "bench.compare", *arguments]]


def test_an_unknown_benchmark_is_refused(started: list[list[str]]) -> None:
    answer = CliRunner().invoke(cli.app, ["bench", "speed"])
    assert answer.exit_code == 1
    assert "there are main, engine, compare" in answer.output
    assert not started

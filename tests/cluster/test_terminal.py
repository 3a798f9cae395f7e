from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from cluster.logs import set_up_logging
from cluster.progress import Steps
from cluster.terminal import taken_over


def test_lines_of_our_processes_lose_rays_prefix() -> None:
    shown = io.StringIO()
    with taken_over(Console(file=shown, width=200)):
        sys.stderr.write(
            "\x1b[36m(WorkerActor pid=17)\x1b[0m 09:00:00 INFO    decode-0 is up\n(ServeReplica:x:r"
        )
        sys.stderr.write("outer pid=3, ip=10.0.0.1) 09:00:00 INFO    router is up\nplain [text]\n")
    assert (
        shown.getvalue() == "09:00:00 INFO    decode-0 is up\n09:00:00 INFO    router is up\nplain [text]\n"
    )


def test_rays_remarks_are_shown_when_debugging(caplog: pytest.LogCaptureFixture) -> None:
    shown = io.StringIO()
    with caplog.at_level(logging.DEBUG, "cluster.chatter"), taken_over(Console(file=shown)):
        sys.stdout.write("\x1b[33m(raylet)\x1b[0m A worker died\n\n")
    assert [record.message for record in caplog.records] == ["(raylet) A worker died"]
    assert shown.getvalue() == ""


def test_the_log_has_time_level_and_who(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("info", "decode-0")
    logging.getLogger("workers.x").info("loaded")
    logging.getLogger("workers.x").debug("not shown")
    logging.getLogger("httpx").info("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert line[2] == line[5] == ":"
    assert line[8:] == " INFO    decode-0 loaded"


def test_steps_without_a_terminal_are_plain_lines() -> None:
    shown = io.StringIO()
    with Steps(Console(file=shown, width=100)) as steps:
        with steps.begin("ray") as step:
            step.note = "local"
        with pytest.raises(ValueError, match="no"), steps.begin("redis"):
            raise ValueError("no")
        steps.begin("left open")
    lines = shown.getvalue().splitlines()
    assert [line[0] for line in lines] == ["✓", "✗", "✗"]
    assert "· local" in lines[0]
    assert set(steps.seconds) == {"ray", "redis", "left open"}

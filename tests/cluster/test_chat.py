from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.chat import Chat, ChatError
from cluster.cli import app
from tests.cluster.api_server import ApiServer

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture
def served(api: ApiServer, cache: Path) -> ApiServer:
    api.says("/v1/models", {"data": [{"id": "smol"}]})
    api.streams(COMPLETIONS, "Hel", "lo", " there")
    return api


def sent(api: ApiServer) -> list[Any]:
    return [body for path, body, _ in api.requests if path == COMPLETIONS]


def chat(api: ApiServer, *arguments: str, stdin: str) -> Any:
    return CliRunner().invoke(app, ["chat", "--url", api.url, *arguments], input=stdin)


def test_piped_lines_are_answered_one_by_one(served: ApiServer) -> None:
    result = chat(
        served, "--temperature", "0", "--max-tokens", "9", "--system", "Be kind.", stdin="Hi\n\nMore\n"
    )
    assert result.exit_code == 0
    assert result.stdout == "Hello there\nHello there\n"
    first, second = sent(served)
    assert first["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == (
        "smol",
        0,
        9,
        True,
    )
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Hello there"


def test_reset_and_quit(served: ApiServer) -> None:
    assert chat(served, stdin="One\n/reset\nTwo\n/quit\nThree\n").exit_code == 0
    assert [len(body["messages"]) for body in sent(served)] == [1, 1]


def test_an_error_ends_a_pipe(served: ApiServer) -> None:
    served.says(COMPLETIONS, {"error": {"message": "too long by 3 tokens"}}, status=400)
    result = chat(served, stdin="Hi\nMore\n")
    assert result.exit_code == 1
    assert "400: too long by 3 tokens" in result.stderr
    assert len(sent(served)) == 1


def test_an_error_in_the_stream_is_told(served: ApiServer) -> None:
    served.streams(COMPLETIONS, "Hel", error="the worker died, try again")
    result = chat(served, stdin="Hi\n")
    assert result.exit_code == 1
    assert "the worker died, try again" in result.stderr


def test_a_model_that_is_not_served(served: ApiServer) -> None:
    result = chat(served, "--model", "gpt", stdin="Hi\n")
    assert result.exit_code == 1
    assert "does not serve 'gpt', but smol" in result.stderr


def test_nobody_there(cache: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "--url", "127.0.0.1:9"], input="Hi\n")
    assert result.exit_code == 1
    assert "no cluster answers at http://127.0.0.1:9" in result.stderr


def test_a_question_without_an_answer_leaves_the_history(served: ApiServer) -> None:
    conversation = Chat(served.url, "smol")
    served.says(COMPLETIONS, {"error": {"message": "busy"}}, status=503)
    with pytest.raises(ChatError, match="503: busy"):
        list(conversation.say("Hi"))
    assert conversation.messages == []
    conversation.close()


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(served: ApiServer) -> None:
    conversation = Chat(served.url, "smol")
    stream = conversation.say("Hi")
    assert next(stream) == "Hel"
    stream.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": "Hel"}
    conversation.close()


class Terminal:
    """`headrace chat` on a terminal of its own."""

    def __init__(self, url: str) -> None:
        ours, theirs = pty.openpty()
        self._ours = ours
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "chat", "--url", url],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Who was started in the background of a shell ignores the signal, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        os.set_blocking(ours, False)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def sees(self, condition: Callable[[str], bool], timeout_s: float = 15.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition(self.shown):
            if time.monotonic() > deadline:
                return False
            try:
                self.shown += os.read(self._ours, 4096).decode()
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                return condition(self.shown)
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_on_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(served: ApiServer) -> None:
    def slow(body: Any) -> tuple[int, list[str]]:
        if body["messages"][-1]["content"] == "slow":
            time.sleep(20)
        return 200, ['data: {"choices": [{"delta": {"content": "quick"}}]}', "data: [DONE]"]

    served.answers[COMPLETIONS] = slow
    terminal = Terminal(served.url)
    try:
        assert terminal.sees(lambda text: "smol at" in text and "> " in text), terminal.shown
        terminal.type("slow\n")
        deadline = time.monotonic() + 10
        while not sent(served) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.sees(lambda text: "(stopped)" in text), terminal.shown
        terminal.type("hello\n")
        assert terminal.sees(lambda text: "quick" in text), terminal.shown
        terminal.type("/nonsense\n")
        assert terminal.sees(lambda text: "no such command" in text), terminal.shown
        terminal.type("/quit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()

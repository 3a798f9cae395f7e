"""`headrace chat`: a conversation in the terminal over the public HTTP API, streamed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


class ChatError(Exception):
    """The server refused or went away; the conversation may go on."""


@dataclass
class Chat:
    """The history and how it is continued. `model` is asked of the server when it is not given.

    Raises ChatError when `url` is no address.
    """

    url: str
    model: str | None = None
    system: str | None = None
    api_key: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # temperature, max_tokens, ...
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(10.0, read=300.0), trust_env=False
            )
        except httpx.InvalidURL as error:
            raise ChatError(f"{self.url} is no address: {error}") from error
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def connect(self) -> str:
        """The model that will answer. Raises ChatError when nobody is there."""
        try:
            answer = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise ChatError(f"no cluster answers at {self.url}: {error}") from error
        if answer.status_code != 200:
            raise ChatError(_refusal(answer))
        try:
            names = [entry["id"] for entry in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{self.url} is not a Headrace router") from error
        if not names:
            raise ChatError(f"{self.url} serves no model yet")
        if self.model is not None and self.model not in names:
            raise ChatError(f"{self.url} does not serve {self.model!r}, but {', '.join(names)}")
        self.model = self.model or names[0]
        return self.model

    def say(self, text: str) -> Iterator[str]:
        """Stream the answer. What was received is kept in the history, also when the caller stops early."""
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            for part in self._stream():
                parts.append(part)
                yield part
        finally:
            if parts:
                self.messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ChatError(_refusal(answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or not data:
                        continue
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if error := event.get("error"):
                        raise ChatError(str(error.get("message", error)))
                    for choice in event.get("choices", []):
                        if content := choice.get("delta", {}).get("content"):
                            yield content
        except httpx.HTTPError as error:
            raise ChatError(f"the connection broke: {error or type(error).__name__}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ChatError(f"{self.url} sent something that is no answer: {error}") from error

    def close(self) -> None:
        self._client.close()


def _refusal(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    return f"{answer.status_code}: {message}"


def converse(chat: Chat, console: Console) -> int:
    """Read lines until the end of input. Answers the exit code: 1 when a piped line could not be answered."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
        console.print(f"[dim]{chat.model} at {chat.url}. {_HELP}.[/dim]", highlight=False)
    while True:
        line = _read_line(interactive)
        if line is None or line in ("/quit", "/exit"):
            return 0
        if not line:
            continue
        if line == "/reset":
            chat.reset()
            if interactive:
                console.print("[dim]The conversation is forgotten.[/dim]")
        elif line in ("/help", "/?"):
            console.print(f"[dim]{_HELP}.[/dim]")
        elif line.startswith("/") and interactive and " " not in line:
            console.print(f"[yellow]{line}: no such command.[/yellow] [dim]{_HELP}.[/dim]")
        elif not _answer(chat, line, console) and not interactive:
            return 1


def _read_line(interactive: bool) -> str | None:
    try:
        return input("> ").strip() if interactive else _next_piped()
    except EOFError:
        if interactive:
            print()  # noqa: T201 - leave the prompt's line
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print()  # noqa: T201
        return ""


def _next_piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _answer(chat: Chat, line: str, console: Console) -> bool:
    """Print the answer as it comes. False when the server refused. Ctrl-C ends the answer, not the program."""
    stream = chat.say(line)
    try:
        for part in stream:
            sys.stdout.write(part)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        console.print("[dim] (stopped)[/dim]", end="")
    except ChatError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return False
    finally:
        stream.close()  # type: ignore[attr-defined]
    sys.stdout.write("\n")
    sys.stdout.flush()
    return True

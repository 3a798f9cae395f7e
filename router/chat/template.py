"""The model's chat template: messages in, prompt text out.

The template comes from the model directory and from nowhere else; a client cannot send one. It still runs in jinja's
sandbox, because model directories are downloaded, and its output and its time are bounded.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.chat.tokenizer import TokenizerError, read_json
from router.refusal import Refusal

RENDER_TIMEOUT_S = 5.0

# What a template raises when the messages are not what it expects, besides jinja's own errors.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate:
    """Compiled once. Renders as transformers' apply_chat_template does. Thread-safe."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template does not compile: {error}") from error
        self._special_tokens = special_tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        max_chars: int = 4 * 1024**2,
        timeout_s: float = RENDER_TIMEOUT_S,
    ) -> str:
        """Raises `Refusal` when the template refuses the messages, or renders too much or for too long."""
        deadline = time.monotonic() + timeout_s
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise Refusal(f"the rendered messages have more than {max_chars} characters", "messages")
                if time.monotonic() > deadline:
                    raise Refusal(f"rendering the messages takes more than {timeout_s:g} s", "messages")
        except _RENDER_ERRORS as error:
            raise Refusal(f"the model's chat template refuses these messages: {error}", "messages") from error
        return "".join(pieces)


def load_template(model_path: Path, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json. None: the model has none."""
    path = model_path / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
    declared = read_json(model_path / "tokenizer_config.json").get("chat_template")
    if isinstance(declared, list):  # several, by name
        declared = {entry["name"]: entry["template"] for entry in declared}.get("default")
    if declared is None:
        return None
    if not isinstance(declared, str):
        raise TokenizerError(
            f"chat_template in {model_path / 'tokenizer_config.json'} must be a string or a list"
        )
    return ChatTemplate(declared, special_tokens)


class _GenerationBlocks(Extension):
    """{% generation %} marks what an assistant says, for training. Here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads it from the class)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)

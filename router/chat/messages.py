"""Chat messages as clients send them, and as templates read them.

Keys that a message has beside these are ignored, as OpenAI-compatible servers do: clients send back what they got.
What would change the answer and cannot be honoured (tools, images, audio) is refused by name.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from router.refusal import Refusal, not_supported_yet, shown

ROLES = ("system", "developer", "user", "assistant")


class Part(Struct):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the name under which vLLM answers it
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    prefix: Any = None


def template_messages(messages: list[Message], max_messages: int) -> list[dict[str, Any]]:
    """What the template sees. Raises `Refusal`."""
    if not messages:
        raise Refusal("messages must hold at least one message", "messages")
    if len(messages) > max_messages:
        raise Refusal(f"{len(messages)} messages cannot fit a context of {max_messages} tokens", "messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
    if message.role in ("tool", "function"):
        raise not_supported_yet(f"{where}.role {message.role!r}")
    if message.role not in ROLES:
        raise Refusal(
            f"{where}.role must be one of {', '.join(ROLES)}, got {shown(message.role)}", f"{where}.role"
        )
    for field in ("tool_calls", "tool_call_id", "function_call", "audio", "prefix"):
        if getattr(message, field):
            raise not_supported_yet(f"{where}.{field}")
    rendered: dict[str, Any] = {"role": message.role, "content": _text(message.content, f"{where}.content")}
    if message.name is not None:
        rendered["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        rendered["reasoning_content"] = reasoning
    return rendered


def _text(content: str | list[Part] | None, where: str) -> str:
    """Text parts stand on lines of their own, as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not content:
        raise Refusal(f"{where} is required: a string or a list of text parts", where)
    texts: list[str] = []
    for index, part in enumerate(content):
        if part.type != "text":
            raise Refusal(
                f"{where}[{index}].type {shown(part.type)} is not supported yet, only 'text' is",
                f"{where}[{index}].type",
                code="unsupported_parameter",
            )
        if part.text is None:
            raise Refusal(f"{where}[{index}].text is required", f"{where}[{index}].text")
        texts.append(part.text)
    return "\n".join(texts)

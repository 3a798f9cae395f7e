"""The bodies of requests for generation, as clients send them.

Every documented field is here. What Headrace cannot do yet is refused by name; what has no effect on the answer is
accepted and ignored; a field that is not here is unknown and refused, so that a misspelt one is not lost in silence.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from router.chat.messages import Message
from router.refusal import Refusal, not_supported_yet
from router.sampling import MAX_LOGPROBS, AskedSampling, integer


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded here
    continuous_usage_stats: bool | None = None


class AskedAnswer(AskedSampling, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None

    # Accepted and ignored.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    session_id: Any = None

    # Not supported yet.
    allowed_token_ids: Any = None
    bad_words: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    truncate_prompt_tokens: Any = None
    return_tokens_as_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    lora: Any = None


class ChatBody(AskedAnswer, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None

    # Has no effect without tools.
    parallel_tool_calls: Any = None

    # Not supported yet.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    documents: Any = None
    mm_processor_kwargs: Any = None
    best_of: Any = None
    echo: Any = None


class CompletionBody(AskedAnswer, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions"""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None


chat_decoder = msgspec.json.Decoder(ChatBody)
completion_decoder = msgspec.json.Decoder(CompletionBody)

# Values under which a field asks for nothing special. None always is one; so is false, and so is an empty value.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none",),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
}
_REFUSED_IN_BOTH = (
    *("allowed_token_ids", "bad_words", "prompt_logprobs", "response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "use_beam_search", "length_penalty"),
    *("truncate_prompt_tokens", "return_tokens_as_token_ids", "spaces_between_special_tokens"),
    *("logits_processors", "kv_transfer_params", "lora"),
)
_REFUSED_IN_CHAT = (
    *("tools", "tool_choice", "functions", "function_call", "modalities", "audio", "prediction"),
    *(
        "reasoning_effort",
        "verbosity",
        "web_search_options",
        "chat_template_kwargs",
        "continue_final_message",
    ),
    *("documents", "mm_processor_kwargs", "best_of", "echo"),
)


def check_chat(body: ChatBody) -> None:
    """Raises `Refusal` for what is not supported, and for fields that contradict each other."""
    if body.chat_template is not None:  # CVE-2025-61620: a client's template is a client's program
        raise Refusal("chat_template cannot be sent: the model's own is used", "chat_template")
    _refuse(body, _REFUSED_IN_BOTH + _REFUSED_IN_CHAT)
    _check_stream(body)
    if body.top_logprobs and not body.logprobs:
        raise Refusal("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise Refusal("max_tokens and max_completion_tokens contradict each other", "max_tokens")
        body.max_tokens = body.max_completion_tokens


def chat_logprobs(body: ChatBody) -> int | None:
    """As the engine counts them: None for none, 0 for the chosen token's alone."""
    return integer("top_logprobs", body.top_logprobs, 0, 0, MAX_LOGPROBS) if body.logprobs else None


def check_completion(body: CompletionBody) -> None:
    """Raises `Refusal`."""
    _refuse(body, _REFUSED_IN_BOTH)
    _check_stream(body)
    if body.suffix:
        raise not_supported_yet("suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(
            "best_of is not supported yet, other than equal to n", "best_of", code="unsupported_parameter"
        )
    if body.logprobs is not None:
        integer("logprobs", body.logprobs, 0, 0, MAX_LOGPROBS)
        if body.echo:
            raise Refusal("echo with logprobs is not supported yet", "echo", code="unsupported_parameter")


def _refuse(body: AskedAnswer, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(body, name)
        if value is not None and value is not False and value not in ("", [], {}, *_HARMLESS.get(name, ())):
            raise not_supported_yet(name)


def _check_stream(body: AskedAnswer) -> None:
    options = body.stream_options
    if options is None:
        return
    if not body.stream:
        raise Refusal("stream_options needs stream to be true", "stream_options")
    if options.continuous_usage_stats:
        raise not_supported_yet("stream_options.continuous_usage_stats")

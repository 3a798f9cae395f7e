"""What a gRPC message asks, in the terms in which HTTP bodies are checked."""

from __future__ import annotations

from typing import Any

from router.chat.messages import Message
from router.chat.prompt import Prompts
from router.generation import ModelInfo
from router.grpc import headrace_pb2 as pb
from router.refusal import Refusal
from router.sampling import MAX_LOGPROBS, AskedSampling, integer

_OPTIONAL = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed"),
)


def asked_sampling(request: pb.GenerateRequest) -> AskedSampling:
    sampling = request.sampling
    given: dict[str, Any] = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    return AskedSampling(
        **given,
        logit_bias={str(token): bias for token, bias in sampling.logit_bias.items()},
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        stop=list(request.stop),
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=_optional(request, "skip_special_tokens"),
        cache_salt=request.cache_salt or None,
        priority=request.priority or None,  # 0 on the wire is absent: the tenant's own
    )


def asked_logprobs(request: pb.GenerateRequest) -> int | None:
    """Raises `Refusal`."""
    asked = _optional(request, "logprobs")
    return None if asked is None else integer("logprobs", asked, 0, 0, MAX_LOGPROBS)


async def asked_prompt(request: pb.GenerateRequest, prompts: Prompts, model: ModelInfo) -> list[int]:
    """Raises `Refusal`."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return prompts.of_ids(list(request.token_ids.ids), model, "token_ids")
    if kind == "text":
        return await prompts.of_text(
            request.text,
            model,
            "text",
            add_special_tokens=_optional(request, "add_special_tokens") is not False,
        )
    if kind == "chat":
        return await prompts.of_chat(
            [_message(message) for message in request.chat.messages],
            model,
            add_generation_prompt=_optional(request.chat, "add_generation_prompt") is not False,
            add_special_tokens=bool(_optional(request, "add_special_tokens")),
        )
    raise Refusal("one of text, token_ids and chat must be set", "prompt")


def _message(message: pb.ChatMessage) -> Message:
    return Message(role=message.role, content=message.content, name=_optional(message, "name"))


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None

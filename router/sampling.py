"""The one place that checks sampling parameters: what HTTP bodies and gRPC messages ask becomes a `Sampling`.

Bounds are those of OpenAI's API; fields that only vLLM has take vLLM's. Every refusal names the field.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass

from msgspec import Struct

from router.generation import ModelInfo
from router.refusal import Refusal, shown
from workers.protocol.messages import Sampling

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512  # of one stop string
MAX_STOP_TOKEN_IDS = 128
MAX_CACHE_SALT_CHARS = 256
MAX_SEQUENCES = 1024  # choices of one request, over all its prompts
MAX_CHOICES = 128  # of one prompt
MAX_TIMEOUT_S = 86_400.0

_SEED_MASK = 2**63 - 1
_INT32 = 2**31


class AskedSampling(Struct, kw_only=True, forbid_unknown_fields=True):
    """As a client may ask, None for what it left out. A request's body extends it with its own fields."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become the text of one answer: what the router does with them, not the engine."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings count only in the text of later tokens


def number(
    param: str,
    value: float | None,
    default: float,
    low: float,
    high: float,
    *,
    above: bool = False,
) -> float:
    """`value` if it is finite and low <= value <= high (low < value with `above`), `default` if it is None."""
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise Refusal(f"{param} must be {bounds}, got {shown(value)}", param)
    return float(value)


def integer(param: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise Refusal(f"{param} must be between {low} and {high}, got {shown(value)}", param)
    return value


def num_choices(asked: AskedSampling, num_prompts: int = 1) -> int:
    """How many answers to each prompt."""
    n = integer("n", asked.n, 1, 1, MAX_CHOICES)
    if n * num_prompts > MAX_SEQUENCES:
        raise Refusal(f"{num_prompts} prompts with n = {n} are more than {MAX_SEQUENCES} answers", "n")
    return n


def to_sampling(
    asked: AskedSampling,
    model: ModelInfo,
    prompt_tokens: int,
    logprobs: int | None,
    *,
    prompt_param: str = "prompt",
    max_tokens_param: str = "max_tokens",
) -> Sampling:
    """The sampling of the first choice. The params are the names under which the client set prompt and max_tokens."""
    max_tokens = _max_tokens(asked.max_tokens, model, prompt_tokens, prompt_param, max_tokens_param)
    top_k = integer("top_k", asked.top_k, 0, -1, _INT32)
    return Sampling(
        max_tokens=max_tokens,
        seed=_seed(asked.seed),
        temperature=number("temperature", asked.temperature, 1.0, 0.0, 2.0),
        top_k=top_k if 0 < top_k < model.vocab_size else 0,
        top_p=number("top_p", asked.top_p, 1.0, 0.0, 1.0, above=True),
        min_p=number("min_p", asked.min_p, 0.0, 0.0, 1.0),
        # Bounded on both sides: a vanishing penalty would overflow the logits.
        repetition_penalty=number("repetition_penalty", asked.repetition_penalty, 1.0, 0.01, 100.0),
        presence_penalty=number("presence_penalty", asked.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", asked.frequency_penalty, 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(asked.logit_bias, model.vocab_size),
        logprobs=logprobs,
        stop_token_ids=_stop_token_ids(asked.stop_token_ids, model.vocab_size),
        min_tokens=integer("min_tokens", asked.min_tokens, 0, 0, max_tokens),
        ignore_eos=bool(asked.ignore_eos),
    )


def to_text_options(asked: AskedSampling) -> TextOptions:
    return TextOptions(
        stop=_stop_strings(asked.stop),
        include_stop=bool(asked.include_stop_str_in_output),
        skip_special_tokens=asked.skip_special_tokens is not False,
        min_tokens=asked.min_tokens or 0,
    )


def checked_cache_salt(asked: AskedSampling) -> str:
    salt = asked.cache_salt
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_CACHE_SALT_CHARS:
        raise Refusal(
            f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters, got {len(salt)}", "cache_salt"
        )
    return salt


def checked_priority(asked: AskedSampling) -> int | None:
    """None: the tenant's own."""
    if asked.priority is None:
        return None
    return integer("priority", asked.priority, 0, -_INT32, _INT32 - 1)


def checked_timeout(asked: AskedSampling) -> float | None:
    """Seconds."""
    if asked.timeout is None:
        return None
    return number("timeout", asked.timeout, 0.0, 0.0, MAX_TIMEOUT_S, above=True)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the i-th choice: the client's own for the first, and one that follows from it for the others."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(b"%d/%d" % (seed, choice)).digest()
    return int.from_bytes(digest[:8], "little") & _SEED_MASK


def check_token_ids(param: str, token_ids: list[int], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise Refusal(
            f"{param} holds token id {shown(wrong)}, the vocabulary has {vocab_size} tokens (0 to {vocab_size - 1})",
            param,
        )


def _max_tokens(
    asked: int | None, model: ModelInfo, prompt_tokens: int, prompt_param: str, param: str
) -> int:
    room = model.max_model_len - prompt_tokens
    if room < 1:
        raise Refusal(
            f"the prompt has {prompt_tokens} tokens, the model's context is {model.max_model_len} tokens "
            "of prompt and answer together",
            prompt_param,
            code="context_length_exceeded",
        )
    if asked is None:
        return room
    if asked < 1:
        raise Refusal(f"{param} must be at least 1, got {shown(asked)}", param)
    if asked > room:
        raise Refusal(
            f"the prompt has {prompt_tokens} tokens and {param} is {shown(asked)}, together more than the model's "
            f"context of {model.max_model_len} tokens; {param} may be at most {room}",
            param,
            code="context_length_exceeded",
        )
    return asked


def _seed(asked: int | None) -> int:
    if asked is None:
        return secrets.randbits(63)
    if not -(2**63) <= asked < 2**63:
        raise Refusal(f"seed must be a signed 64-bit integer, got {shown(asked)}", "seed")
    return asked & _SEED_MASK


def _logit_bias(asked: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    if not asked:
        return {}
    if len(asked) > MAX_LOGIT_BIAS:
        raise Refusal(
            f"logit_bias has {len(asked)} entries, at most {MAX_LOGIT_BIAS} are allowed", "logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in asked.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise Refusal(
                f"logit_bias has the key {shown(key)}, keys are token ids from 0 to {vocab_size - 1}",
                "logit_bias",
            )
        biases[int(key)] = number("logit_bias", bias, 0.0, -100.0, 100.0)
    return biases


def _stop_strings(asked: str | list[str] | None) -> tuple[str, ...]:
    if asked is None:
        return ()
    stops = (asked,) if isinstance(asked, str) else tuple(asked)
    if len(stops) > MAX_STOP_STRINGS:
        raise Refusal(f"stop has {len(stops)} strings, at most {MAX_STOP_STRINGS} are allowed", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise Refusal(
                f"stop strings have 1 to {MAX_STOP_CHARS} characters, got one of {len(stop)}", "stop"
            )
    return stops


def _stop_token_ids(asked: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if not asked:
        return ()
    if len(asked) > MAX_STOP_TOKEN_IDS:
        raise Refusal(
            f"stop_token_ids has {len(asked)} ids, at most {MAX_STOP_TOKEN_IDS} are allowed", "stop_token_ids"
        )
    check_token_ids("stop_token_ids", asked, vocab_size)
    return tuple(asked)

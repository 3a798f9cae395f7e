"""From what a client sends to the token ids that a worker gets, and never longer on the event loop than is short."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from router.chat.messages import Message, template_messages
from router.chat.template import ChatTemplate, load_template
from router.chat.tokenizer import TextTokenizer
from router.generation import ModelInfo
from router.refusal import Refusal
from router.sampling import check_token_ids

# A text of this length takes 0.2 ms where its words are remembered, else 0.8 ms. Longer ones go to a thread, where the
# library releases the GIL, so that streams need not wait.
INLINE_CHARS = 4096


class Prompts:
    """The tokenizer and the chat template of the served model."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self._template = template

    async def of_chat(
        self,
        messages: list[Message],
        model: ModelInfo,
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,  # the template writes them
    ) -> list[int]:
        """Raises `Refusal`."""
        if self._template is None:
            raise Refusal("this model has no chat template: use /v1/completions", "messages")
        rendered = template_messages(messages, model.max_model_len)
        num_chars = sum(len(message["content"]) for message in rendered)
        self._check_chars(num_chars, model, "messages")
        if num_chars + 64 * len(rendered) <= INLINE_CHARS:
            return self._encode_chat(rendered, add_generation_prompt, add_special_tokens)
        return await asyncio.to_thread(self._encode_chat, rendered, add_generation_prompt, add_special_tokens)

    async def of_text(
        self, text: str, model: ModelInfo, param: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Raises `Refusal`, also for a text that is empty or has no tokens."""
        if not text:
            raise Refusal(f"{param} must not be empty", param)
        self._check_chars(len(text), model, param)
        return self.of_ids(await self.encode(text, add_special_tokens), model, param)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def of_ids(self, token_ids: list[int], model: ModelInfo, param: str) -> list[int]:
        if not token_ids:
            raise Refusal(f"{param} must hold at least one token", param)
        check_token_ids(param, token_ids, model.vocab_size)
        return token_ids

    def _encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, add_special_tokens: bool
    ) -> list[int]:
        assert self._template is not None
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        token_ids = self.tokenizer.encode(text, add_special_tokens)
        if not token_ids:
            raise Refusal("the chat template renders these messages to nothing", "messages")
        return token_ids

    def _check_chars(self, num_chars: int, model: ModelInfo, param: str) -> None:
        """Refuses what cannot fit however it is split, before time is spent on splitting it."""
        if self.tokenizer.byte_pieces is None:
            return  # an unknown word may be one token, however long
        fewest = -(-num_chars // self.tokenizer.max_token_chars)
        if fewest > model.max_model_len:
            raise Refusal(
                f"{param} has {num_chars} characters, at least {fewest} tokens; the model's context is "
                f"{model.max_model_len} tokens",
                param,
                code="context_length_exceeded",
            )


def load_prompts(model_path: Path) -> Prompts:
    """Raises `TokenizerError` when the model directory cannot be used."""
    tokenizer = TextTokenizer(model_path)
    return Prompts(tokenizer, load_template(model_path, tokenizer.special_tokens))

"""/v1/completions through the real openai client."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fastapi import FastAPI

from router.chat.tokenizer import TextTokenizer
from router.generation import Generation, TokenChunk
from router.http.front import Front
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher
from workers.protocol.messages import TokenLogprobs


async def test_prompt_in_every_form(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("A turbine")
    for prompt in ("A turbine", ["A turbine"], ids, [ids]):
        answer = await client.completions.create(model="tiny", prompt=prompt)
        assert answer.object == "text_completion"
        assert answer.id.startswith("cmpl-")
        assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
            (0, ANSWER, "stop")
        ]
        assert dispatcher.asked[-1].prompt == ids


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_with_several_choices(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer, stream: bool
) -> None:
    prompts = ["one", "two", "three"]
    texts = [""] * 6
    if stream:
        async for chunk in await client.completions.create(
            model="tiny", prompt=prompts, n=2, best_of=2, echo=True, stream=True, seed=9
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = await client.completions.create(
            model="tiny", prompt=prompts, n=2, best_of=2, echo=True, seed=9
        )
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
        assert answer.usage.completion_tokens == 6 * (len(dispatcher.answer) + 1)
    assert texts == [prompt + ANSWER for prompt in prompts for _ in range(2)]
    seeds = {(tuple(asked.prompt), asked.sampling.seed) for asked in dispatcher.asked}
    assert len(seeds) == 6
    assert sum(asked.sampling.seed == 9 for asked in dispatcher.asked) == 3


async def test_stream_has_finish_reason_usage_and_end(http: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}
    events = (await http.post("/v1/completions", json=body)).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4


async def test_echo_of_token_ids_shows_their_text(
    client: openai.AsyncOpenAI, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("<|im_start|>hi")
    answer = await client.completions.create(model="tiny", prompt=ids, echo=True)
    assert answer.choices[0].text == "<|im_start|>hi" + ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, stream: bool) -> None:
    tokens: list[str] = []
    offsets: list[int] = []
    top: list[dict[str, float]] = []
    if stream:
        given = [
            chunk.choices[0].logprobs
            async for chunk in await client.completions.create(
                model="tiny", prompt="x", logprobs=2, stream=True
            )
        ]
    else:
        answer = await client.completions.create(model="tiny", prompt="x", logprobs=2)
        given = [answer.choices[0].logprobs]
    for logprobs in given:
        assert logprobs is not None
        tokens += logprobs.tokens or []
        offsets += logprobs.text_offset or []
        top += logprobs.top_logprobs or []
    assert len(tokens) == len(offsets) == len(top) == len(dispatcher.answer) + 1
    whole = ANSWER + "<|im_end|>"
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or whole[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in tokens)  # parts of the smiley
    assert all(token in entry for token, entry in zip(tokens, top, strict=True))


async def test_the_chosen_token_is_always_among_the_top(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher
) -> None:
    async def unlikely(generation: Generation):
        yield TokenChunk([300], [TokenLogprobs(-float("inf"), [(301, -0.5)])], "length")

    dispatcher.script = unlikely
    answer = await client.completions.create(model="tiny", prompt="x", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-9999.0]
    assert logprobs.top_logprobs is not None
    assert sorted(logprobs.top_logprobs[0].values()) == [-9999.0, -0.5]


async def test_text_held_back_comes_with_the_end(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    dispatcher.answer = tokenizer.encode("wheels EN", False)
    answer = await client.completions.create(model="tiny", prompt="x", stop="END")
    assert answer.choices[0].text == "wheels EN"
    stream = await client.completions.create(model="tiny", prompt="x", stop="END", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "wheels EN"


async def test_token_ids(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    answer = await client.completions.create(
        model="tiny", prompt=[5, 6], max_tokens=2, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].model_extra == {
        "stop_reason": None,
        "prompt_token_ids": [5, 6],
        "token_ids": dispatcher.answer[:2],
    }
    body = {"prompt": [5, 6], "max_tokens": 2, "stream": True, "return_token_ids": True}
    response = await http.post("/v1/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == (
        dispatcher.answer[:2]
    )


async def test_many_prompts_leave_the_loop_to_streams(
    app: FastAPI, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    seen: list[int] = []
    encode = front.prompts.tokenizer.encode

    async def stream() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def noted(text: str, add_special_tokens: bool) -> list[int]:
        seen.append(turns)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(front.prompts.tokenizer, "encode", noted)
    running = asyncio.create_task(stream())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        answer = await http.post("/v1/completions", json={"prompt": ["one"] * 20, "max_tokens": 1})
    running.cancel()
    assert answer.status_code == 200
    assert seen == sorted(set(seen))
    assert len(seen) == 20

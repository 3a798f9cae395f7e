"""/v1/chat/completions through the real openai client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from router.chat.tokenizer import TextTokenizer
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher

HELLO = [{"role": "user", "content": "Hello"}]


async def test_answer(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, seed=-3, temperature=0.5)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    (asked,) = dispatcher.asked
    assert tokenizer.decode(asked.prompt, False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked.request_id == answer.id
    assert asked.sampling.temperature == 0.5
    assert asked.sampling.seed == -3 & (2**63 - 1)
    assert asked.sampling.max_tokens == 512 - len(asked.prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(asked.prompt)
    assert answer.usage.completion_tokens == len(dispatcher.answer) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(asked.prompt) // 2


async def test_max_tokens_by_both_names(client: openai.AsyncOpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, **{name: 2})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


async def test_stream_is_worded_as_openai_words_it(http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = (await response.aread()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    first, *deltas, finish, usage = chunks
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas) == ANSWER
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in deltas)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > len(deltas) / 2
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        (first["id"], "chat.completion.chunk", first["created"], "tiny")
    }


async def test_stream_without_usage_has_none(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_are_interleaved_with_seeds_of_their_own(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, stream: bool
) -> None:
    dispatcher.delay_s = 0.001
    texts = ["", "", ""]
    reasons: list[str | None] = [None] * 3
    if stream:
        order = []
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=HELLO, n=3, stream=True, seed=5
        ):
            (choice,) = chunk.choices
            order.append(choice.index)
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert set(order[:6]) == {0, 1, 2}  # nobody waits for another one's end
    else:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content or "" for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(dispatcher.asked[0].prompt)
        assert answer.usage.completion_tokens == 3 * (len(dispatcher.answer) + 1)
    assert texts == [ANSWER] * 3
    assert reasons == ["stop"] * 3
    seeds = [asked.sampling.seed for asked in sorted(dispatcher.asked, key=lambda asked: asked.request_id)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert len({asked.request_id for asked in dispatcher.asked}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, stream: bool) -> None:
    if stream:
        content = []
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, stream=True
        ):
            if chunk.choices[0].logprobs is not None:
                content += chunk.choices[0].logprobs.content or []
    else:
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, logprobs=True, top_logprobs=3
        )
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    assert len(content) == len(dispatcher.answer) + 1
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == ANSWER + "<|im_end|>"
    assert content[0].logprob == -0.25
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.25, -2.25]
    assert content[-1].token == "<|im_end|>"


async def test_logprobs_of_the_chosen_token_alone(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content or [])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_and_cancels(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, stream: bool
) -> None:
    if stream:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=HELLO, stop=["eels", "nothing"], stream=True
            )
        ]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        last = chunks[-1].choices[0]
    else:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, stop=["eels", "nothing"])
        last = answer.choices[0]
        text = last.message.content or ""
    assert text == ANSWER[: ANSWER.index("eels")]
    assert last.finish_reason == "stop"
    assert last.model_extra == {"stop_reason": "eels"}
    await dispatcher.until_idle()
    assert len(dispatcher.closed_early) == 1


async def test_vllm_fields(
    client: openai.AsyncOpenAI, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    stop_token = dispatcher.answer[5]
    answer = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        user="me",
        metadata={"a": "b"},
        store=False,
        logit_bias={"7": -100},
        presence_penalty=1.5,
        extra_body={
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [stop_token],
            "cache_salt": "tenant",
            "priority": -2,
            "return_token_ids": True,
        },
    )
    (asked,) = dispatcher.asked
    sampling = asked.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (40, 0.1, 1.1)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.logit_bias) == (2, True, {7: -100.0})
    assert (sampling.presence_penalty, sampling.stop_token_ids) == (1.5, (stop_token,))
    assert (asked.cache_salt, asked.priority) == ("tenant", -2)
    (choice,) = answer.choices
    assert choice.model_extra == {"stop_reason": stop_token, "token_ids": dispatcher.answer[:6]}
    assert choice.message.content == tokenizer.decode(dispatcher.answer[:5])
    assert answer.model_extra == {"prompt_token_ids": asked.prompt}


async def test_token_ids_in_a_stream(http: httpx.AsyncClient, dispatcher: FakeDispatcher) -> None:
    body = {"messages": HELLO, "stream": True, "return_token_ids": True}
    response = await http.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert chunks[0]["prompt_token_ids"] == dispatcher.asked[0].prompt
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == [*dispatcher.answer, dispatcher.eos]


async def test_skip_special_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        extra_body={"skip_special_tokens": False, "include_stop_str_in_output": True},
    )
    assert answer.choices[0].message.content == ANSWER + "<|im_end|>"

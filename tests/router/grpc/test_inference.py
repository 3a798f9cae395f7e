from __future__ import annotations

from typing import Any

import grpc
import pytest

from router.chat.tokenizer import TextTokenizer
from router.generation import GenerationError, InvalidRequest, Overloaded, Unavailable
from router.grpc import headrace_pb2 as pb
from router.grpc.headrace_pb2_grpc import InferenceStub
from router.metrics import RouterMetrics
from router.sessions import Sessions
from tests.router.fake_dispatcher import ANSWER, FakeDispatcher


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    return error.value


async def test_text_is_streamed_with_ids_and_usage(
    stub: InferenceStub, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    messages = [message async for message in stub.Generate(pb.GenerateRequest(text="A turbine"))]
    assert "".join(message.text for message in messages) == ANSWER
    ids = [token for message in messages for token in message.token_ids]
    assert ids == [*dispatcher.answer, dispatcher.eos]
    assert messages[0].request_id == dispatcher.asked[0].request_id
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.WhichOneof("stop_reason") is None
    prompt = tokenizer.encode("A turbine")
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(ids))
    assert last.usage.cached_tokens == len(prompt) // 2
    assert not any(message.HasField("usage") or message.finish_reason for message in messages[:-1])


async def test_the_prompt_in_each_form(
    stub: InferenceStub, dispatcher: FakeDispatcher, tokenizer: TextTokenizer
) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello")])
    for request, prompt in [
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])), [5, 6]),
        (pb.GenerateRequest(text="x y", model="tiny"), tokenizer.encode("x y")),
        (
            pb.GenerateRequest(chat=chat),
            tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        ),
    ]:
        async for _ in stub.Generate(request):
            pass
        assert dispatcher.asked[-1].prompt == prompt


async def test_sampling_and_stop_strings(stub: InferenceStub, dispatcher: FakeDispatcher) -> None:
    request = pb.GenerateRequest(
        text="x",
        sampling=pb.Sampling(
            max_tokens=50,
            min_tokens=1,
            temperature=0,
            top_p=0.5,
            top_k=7,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias={3: -100, 4: 1.5},
            seed=-1,
            stop_token_ids=[9],
            ignore_eos=True,
        ),
        stop=["eels", "zzz"],
        logprobs=2,
        cache_salt="s",
        priority=-4,
    )
    messages = [message async for message in stub.Generate(request)]
    assert "".join(message.text for message in messages) == ANSWER[: ANSWER.index("eels")]
    assert messages[-1].stop_string == "eels"
    (asked,) = dispatcher.asked
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (50, 1, 0.0)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 7, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1.0)
    assert (sampling.frequency_penalty, sampling.logit_bias) == (2.0, {3: -100.0, 4: 1.5})
    assert (sampling.seed, sampling.stop_token_ids, sampling.ignore_eos) == (2**63 - 1, (9,), True)
    assert (sampling.logprobs, asked.cache_salt, asked.priority) == (2, "s", -4)
    logprobs = [token for message in messages for token in message.logprobs]
    assert len(logprobs) == sum(len(message.token_ids) for message in messages)
    assert logprobs[0].logprob == -0.25
    assert [top.logprob for top in logprobs[0].top] == [-0.25, -1.25]
    await dispatcher.until_idle()
    assert len(dispatcher.closed_early) == 1


@pytest.mark.parametrize(
    ("request_fields", "code", "words"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "one of text, token_ids and chat"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "text must not be empty"),
        ({"text": "x", "model": "other"}, grpc.StatusCode.NOT_FOUND, "'other' does not exist"),
        (
            {"token_ids": pb.TokenIds(ids=[401])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "token_ids holds token id 401",
        ),
        ({"token_ids": pb.TokenIds(ids=[1] * 512)}, grpc.StatusCode.INVALID_ARGUMENT, "512 tokens"),
        ({"chat": pb.Chat()}, grpc.StatusCode.INVALID_ARGUMENT, "messages must hold"),
        (
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="king")])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages[0].role",
        ),
        (
            {"text": "x", "sampling": pb.Sampling(temperature=float("nan"))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature must be between 0 and 2, got nan",
        ),
        (
            {"text": "x", "sampling": pb.Sampling(top_p=float("inf"))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "top_p",
        ),
        (
            {"text": "x", "sampling": pb.Sampling(max_tokens=0)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "max_tokens",
        ),
        (
            {"text": "x", "sampling": pb.Sampling(logit_bias={500: 1})},
            grpc.StatusCode.INVALID_ARGUMENT,
            "logit_bias",
        ),
        (
            {"text": "x", "logprobs": 21},
            grpc.StatusCode.INVALID_ARGUMENT,
            "logprobs must be between 0 and 20",
        ),
        ({"text": "x", "stop": ["x"] * 17}, grpc.StatusCode.INVALID_ARGUMENT, "stop has 17 strings"),
        ({"text": "x" * 70_000}, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    ],
)
async def test_refusals_name_the_field(
    stub: InferenceStub, dispatcher: FakeDispatcher, request_fields: dict, code: grpc.StatusCode, words: str
) -> None:
    error = await refused(stub.Generate(pb.GenerateRequest(**request_fields)))
    assert error.code() is code
    assert words in error.details()
    assert not dispatcher.asked


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("none left"), grpc.StatusCode.UNAVAILABLE),
        (InvalidRequest("never"), grpc.StatusCode.INVALID_ARGUMENT),
        (GenerationError("broken"), grpc.StatusCode.INTERNAL),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
async def test_errors_have_their_code(
    stub: InferenceStub, dispatcher: FakeDispatcher, error: GenerationError, code: grpc.StatusCode, after: int
) -> None:
    dispatcher.error, dispatcher.error_after = error, after
    ended = await refused(stub.Generate(pb.GenerateRequest(text="x")))
    assert ended.code() is code
    assert ended.details() == error.message
    metadata = dict(ended.trailing_metadata() or ())
    assert metadata.get("retry-after") == ("3" if error.retry_after_s else None)
    await dispatcher.until_idle()


async def test_a_bug_tells_nothing(stub: InferenceStub, dispatcher: FakeDispatcher) -> None:
    dispatcher.error = RuntimeError("secret")
    ended = await refused(stub.Generate(pb.GenerateRequest(text="x")))
    assert (ended.code(), ended.details()) == (grpc.StatusCode.INTERNAL, "internal error")


@pytest.mark.parametrize("how", ["cancel", "deadline", "channel"])
async def test_a_caller_that_leaves_ends_its_sequence(
    stub: InferenceStub,
    channel: grpc.aio.Channel,
    sessions: Sessions,
    metrics: RouterMetrics,
    dispatcher: FakeDispatcher,
    how: str,
) -> None:
    dispatcher.answer = dispatcher.answer * 100
    dispatcher.delay_s = 0.02  # a minute in all
    call = stub.Generate(pb.GenerateRequest(text="x"), timeout=1.0 if how == "deadline" else None)
    await call.read()
    assert dispatcher.open == 1
    if how == "cancel":
        call.cancel()
    elif how == "channel":
        await channel.close()
    await dispatcher.until_idle()
    assert len(dispatcher.closed_early) == 1
    assert len(sessions) == 0
    outcome = metrics.registry.get_sample_value(
        "headrace_request_outcomes_total", {"model_name": "tiny", "api": "grpc", "outcome": "cancelled"}
    )
    assert outcome == 1.0


async def test_model(stub: InferenceStub, dispatcher: FakeDispatcher) -> None:
    model = await stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_model_len, model.vocab_size) == ("tiny", 512, 401)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetModel(pb.GetModelRequest(model="x"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    dispatcher.info = None
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetModel(pb.GetModelRequest())
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE

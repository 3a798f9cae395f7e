"""`headrace serve` as a user runs it: Ray, Serve, workers, HTTP, gRPC; a worker killed; and nothing left at the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.valkey import free_port
from router.grpc import headrace_pb2, headrace_pb2_grpc
from tests.cluster.process_tree import descendants
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(400)  # the first starts Ray and a cluster, on a crowded machine in minutes


@dataclass
class Serving:
    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    cluster: str
    model: Path
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> dict[str, dict[str, Any]]:
        status = httpx.get(f"{self.url}/cluster", timeout=10).json()
        return {worker["worker_id"]: worker for worker in status["workers"]}

    def headrace(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def wait_at_rest(self) -> None:
        def at_rest() -> bool:
            return all(
                w["state"] == "up"
                and not (w["running"] or w["waiting"] or w["reserved"] or w["sending"])
                and not w["blocks"]["used"]
                and not any(w["booked"].values())
                for w in self.workers().values()
            )

        until(at_rest)


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("serve")
    model = write_random_model(directory / "tiny", {"max_position_embeddings": 2048}, seed=3)
    port, grpc_port, cluster = free_port(), free_port(), f"test-{os.getpid()}"
    environment = os.environ | {"HEADRACE_CACHE": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(model), "--cluster", cluster]
    command += ["--port", str(port), "--grpc-port", str(grpc_port)]
    command += ["--set", "engine.dtype=float32", "--set", "engine.num_blocks=256"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    serving = Serving(process, port, grpc_port, cluster, model, environment)
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            try:
                if httpx.get(f"{serving.url}/ready", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end, "headrace serve did not become ready"
            time.sleep(0.1)
        until(lambda: len(serving.workers()) == 2)
        yield serving
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="module")
def client(serving: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(serving: Serving) -> Engine:
    config = EngineConfig(dtype="float32", num_blocks=256, num_threads=1)
    return Engine(config, prepare_model(str(serving.model)))


MESSAGES: Any = [{"role": "user", "content": "Where does the water go? " * 20}]


def test_chat_as_a_stream_and_whole_are_the_same(client: openai.OpenAI, serving: Serving) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=24, seed=5, temperature=0.9
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    pieces = []
    usage = None
    for chunk in client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=24,
        seed=5,
        temperature=0.9,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens, "the second request hits the prefix of the first"
    # The prompt was read by the one and answered by the other; heartbeats tell of it a moment later.
    until(lambda: all(serving.workers()[name]["output_tokens"] for name in ("prefill-0", "decode-0")), 5)


def test_tokens_and_logprobs_are_the_engines(client: openai.OpenAI, serving: Serving, alone: Engine) -> None:
    prompt = list(range(3, 180))
    answer = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=20,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    sampling = Sampling(max_tokens=20, seed=0, temperature=0.0, ignore_eos=True, logprobs=3)
    [expected] = alone.generate([prompt], sampling)
    choice = answer.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected.tokens
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-4
    )


def test_errors_reach_the_client_in_openais_shape(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=100_000)
    assert error.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt="")


def test_a_client_that_leaves_frees_everything(serving: Serving) -> None:
    body = {"model": httpx.get(f"{serving.url}/v1/models").json()["data"][0]["id"], "max_tokens": 1500}
    body |= {"messages": MESSAGES, "stream": True, "ignore_eos": True}
    for lines in (1, 5, 40):
        with httpx.stream("POST", f"{serving.url}/v1/chat/completions", json=body, timeout=30) as answer:
            assert answer.status_code == 200
            for count, _ in enumerate(answer.iter_lines()):
                if count == lines:
                    break
    serving.wait_at_rest()


def test_grpc_with_health_and_reflection(serving: Serving, alone: Engine) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{serving.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert "headrace.v1.Inference" in ProtoReflectionDescriptorDatabase(channel).get_services()
        descriptor = headrace_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name["Generate"]
        assert descriptor.server_streaming
        stub = headrace_pb2_grpc.InferenceStub(channel)
        prompt = list(range(3, 120))
        request = grpc_request(prompt)
        tokens = [token for reply in stub.Generate(request, timeout=30) for token in reply.token_ids]
        sampling = Sampling(max_tokens=16, seed=0, temperature=0.0, ignore_eos=True)
        assert tokens == alone.generate([prompt], sampling)[0].tokens


def grpc_request(prompt: list[int]) -> Any:
    return headrace_pb2.GenerateRequest(
        token_ids=headrace_pb2.TokenIds(ids=prompt),
        sampling=headrace_pb2.Sampling(max_tokens=16, temperature=0.0, ignore_eos=True),
    )


def test_metrics_of_every_process_in_one_page(serving: Serving) -> None:
    text = httpx.get(f"{serving.url}/metrics", timeout=10).text
    for name in (
        "headrace_request_ttft_seconds_count",
        "headrace_request_time_per_output_token_seconds_count",
        "headrace_queue_seconds_count",
        "headrace_prefill_seconds_count",
        "headrace_transfer_seconds_count",
        "headrace_decode_seconds_count",
        "headrace_transfer_sent_bytes_total",
        "headrace_kv_usage_ratio",
        "headrace_requests_running",
        "headrace_prefix_hit_tokens_total",
        "headrace_output_tokens_total",
    ):
        assert name in text, name
    assert 'worker="prefill-0"' in text
    assert 'worker="decode-0"' in text


def test_status_and_a_second_start_of_the_same_cluster(serving: Serving) -> None:
    shown = serving.headrace("status", "--json", "--url", serving.url)
    assert shown.returncode == 0, shown.stderr
    assert {w["worker_id"] for w in json.loads(shown.stdout)["workers"]} == {"prefill-0", "decode-0"}
    again = serving.headrace("serve", "--model", str(serving.model), "--cluster", serving.cluster)
    assert again.returncode != 0
    assert str(serving.process.pid) in again.stdout + again.stderr
    taken = serving.headrace(
        "serve", "--model", str(serving.model), "--cluster", "other", "--port", str(serving.port)
    )
    assert taken.returncode != 0
    assert str(serving.port) in taken.stdout + taken.stderr


async def test_kill_9_of_a_worker_is_mended_without_a_hand(serving: Serving) -> None:
    """Streams that run go on with the tokens they would have had; the next request succeeds; the epoch is new."""
    async with openai.AsyncOpenAI(
        base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=90
    ) as client:
        model = (await client.models.list()).data[0].id

        tokens: dict[int, list[int]] = {}  # of each seed, so far

        async def ask(seed: int) -> list[int]:
            tokens[seed] = []
            async for chunk in await client.completions.create(
                model=model,
                prompt=list(range(10 + seed, 150 + seed)),
                max_tokens=1500,
                seed=seed,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            ):
                for choice in chunk.choices:
                    tokens[seed] += (choice.model_extra or {}).get("token_ids") or []
            return tokens[seed]

        undisturbed = await asyncio.gather(*(ask(seed) for seed in range(4)))
        for victim in ("decode-0", "prefill-0"):
            before = serving.workers()[victim]
            tokens.clear()
            asking = [asyncio.create_task(ask(seed)) for seed in range(4)]
            while len(tokens) < 4 or min(map(len, tokens.values())) < 20:
                assert not any(task.done() for task in asking), "too late to disturb anything"
                await asyncio.sleep(0.002)
            os.kill(before["pid"], signal.SIGKILL)
            assert await asyncio.gather(*asking) == undisturbed
            assert await ask(0) == undisturbed[0]
            until(lambda: serving.workers().get(victim, before)["epoch"] > before["epoch"], 60)  # noqa: B023
    serving.wait_at_rest()


def test_stops_and_leaves_nothing(serving: Serving) -> None:
    """Last: `headrace down` ends the cluster this module has used."""
    pids = descendants(serving.process.pid)
    assert len(pids) > 5
    down = serving.headrace("down", "--cluster", serving.cluster)
    assert down.returncode == 0, down.stdout + down.stderr
    assert serving.process.wait(30) == 0
    until(lambda: not [pid for pid in pids if alive(pid)], 10)
    for port in (serving.port, serving.grpc_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    assert not list(Path("/tmp").glob(f"headrace-*/session_*_{serving.process.pid}"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

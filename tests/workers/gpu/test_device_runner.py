"""Steps in graphs, overlapped, and without memory give the tokens of plain ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest

from kernels.attention_step import AttentionStep
from tests.workers.gpu.runners import (
    BLOCK_SIZE,
    CAPTURED_ROWS,
    MAX_LENGTH,
    Sequence,
    StrictGraphs,
    runner_over,
    step_of,
)
from tests.workers.gpu.sampling_requests import EOS, random_sampling
from tests.workers.models.tiny_fallback import write_fallback_model
from workers.engine.pending import Pending
from workers.engine.request import Request
from workers.engine.sampler import SampleInput, Sampler
from workers.engine.step_input import StepInput
from workers.gpu.buckets import Buckets, decode_shapes, mixed_shapes
from workers.gpu.draw import TorchDraw
from workers.gpu.runner import DeviceRunner
from workers.metrics import WorkerMetrics
from workers.models.decoder import Decoder, load_decoder
from workers.models.fallback import load_fallback
from workers.models.fallback_spec import FallbackSpec, read_spec
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling, Work

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = Sampling(max_tokens=20, seed=0, temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "mixtral", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder, or a model of transformers in its place."""
    path, cpu = tmp_path_factory.mktemp("model"), torch.device("cpu")
    if request.param == "gemma2":
        spec = read_spec(write_fallback_model(path, request.param))
        assert isinstance(spec, FallbackSpec)
        return load_fallback(path, spec, torch.float32, cpu)
    return load_decoder(write_random_model(path, request.param, seed=1), torch.float32, cpu)


def requests(
    model: Decoder, count: int, seed: int, sampling: Callable[[random.Random], Sampling]
) -> list[Request]:
    rng = random.Random(seed)
    found = []
    for index in range(count):
        prompt = [rng.randrange(model.spec.vocab_size) for _ in range(rng.randrange(1, 20))]
        found.append(Request(Work(request_id=str(index), prompt=prompt, sampling=sampling(rng))))
    return found


def mixed(vocab: int) -> Callable[[random.Random], Sampling]:
    return lambda rng: random_sampling(rng, vocab)


def without_history(rng: random.Random) -> Sampling:
    """What hangs on tokens that the host does not have is not overlapped."""
    return Sampling(
        max_tokens=20, seed=rng.randrange(99), temperature=rng.choice((0.0, 1.0)), top_k=rng.choice((0, 5))
    )


def sequences(found: list[Request]) -> list[Sequence]:
    return [Sequence(one, index * MAX_LENGTH // BLOCK_SIZE) for index, one in enumerate(found)]


def run(runner: DeviceRunner, found: list[Request], steps: int, chunk: int = 7) -> list[list[int]]:
    """Prompts in chunks beside sequences that decode already, as a scheduler would mix them."""
    all_of_them = sequences(found)
    for number in range(steps):
        parts = []
        for sequence in all_of_them[: number + 1]:
            behind = sequence.request.num_tokens - sequence.computed
            parts.append((sequence, min(behind, chunk)))
        step = step_of(parts)
        for given, sampled in zip(step.samples, runner.run(step), strict=True):
            given.request.append(sampled.token, frozenset())
    return [one.output_token_ids for one in found]


@torch.inference_mode()
def expected(model: Decoder, found: list[Request]) -> list[list[int]]:
    """What the decoder and the oracle's sampler alone say behind every token but the last: one pass for each request."""
    results = []
    for one in found:
        count, output = one.num_tokens - 1, one.output_token_ids
        table = torch.arange(-(-count // BLOCK_SIZE))[None]
        attention = AttentionStep.of([0, count], [count], table, torch.arange(count))
        cache = model.new_kv_cache(table.shape[1], BLOCK_SIZE)
        token_ids = torch.tensor(one.token_ids[:count])
        rows = torch.arange(one.num_prompt_tokens - 1, count)
        logits = model.logits(model.forward(token_ids, torch.arange(count), cache, attention, rows))
        request = Request(one.work)
        inputs = [SampleInput(request, position, output[:position]) for position in range(len(output))]
        results.append([sampled.token for sampled in Sampler(EOS)(logits, inputs)])
    return results


def graphs_of(runner: DeviceRunner) -> StrictGraphs:
    graphs = StrictGraphs()
    runner.capture(graphs, Buckets(decode_shapes(CAPTURED_ROWS), mixed_shapes(32, CAPTURED_ROWS)))
    return graphs


@pytest.mark.parametrize("captured", [False, True])
def test_tokens_of_every_way_to_sample(model: Decoder, captured: bool) -> None:
    found = requests(model, 5, 3, mixed(model.spec.vocab_size))
    runner = runner_over(model)
    graphs = graphs_of(runner) if captured else None
    tokens = run(runner, found, 12)
    assert tokens == expected(model, found)
    assert min(map(len, tokens)) >= 6
    assert graphs is None or graphs.replays == 12


def test_the_next_step_takes_its_tokens_on_the_device(model: Decoder) -> None:
    """Prompts of some and decoding of others in turn, always one step ahead of what the host has seen."""
    runner, found = runner_over(model, overlaps=True), requests(model, 4, 5, without_history)
    graphs_of(runner)
    all_of_them = sequences(found)
    before: tuple[StepInput, Pending] | None = None
    for number in range(14):
        carried = {}
        if before is not None:
            carried = {
                s: i
                for s in all_of_them
                for i, given in enumerate(before[0].samples)
                if given.request is s.request
            }
        parts = [
            (sequence, 1 if sequence in carried else min(sequence.request.num_tokens - sequence.computed, 7))
            for sequence in all_of_them[: number // 2 + 1]
        ]
        step = step_of(parts, carried)
        pending = runner.submit(step)
        accept(before)
        before = step, pending
    accept(before)
    assert [one.output_token_ids for one in found] == expected(model, found)
    assert min(one.num_output_tokens for one in found) >= 5


def accept(flight: tuple[StepInput, Pending] | None) -> None:
    if flight is not None:
        for given, sampled in zip(flight[0].samples, flight[1].wait(), strict=True):
            given.request.append(sampled.token, frozenset())


class Greedy:
    """A model for which memory runs out where a step has more tokens than `most`."""

    def __init__(self, model: Decoder, most: int) -> None:
        self._model, self.most, self.steps = model, most, []
        self.spec, self.new_kv_cache, self.logits = model.spec, model.new_kv_cache, model.logits

    def forward(self, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(token_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.steps.append(len(token_ids))
        return self._model.forward(token_ids, *rest)


@pytest.mark.parametrize("most", [1, 5])
def test_a_step_without_memory_is_run_in_parts(
    model: Decoder, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    greedy = Greedy(model, most)
    runner = runner_over(greedy)  # type: ignore[arg-type]
    found = requests(model, 4, 7, mixed(model.spec.vocab_size))
    tokens = run(runner, found, 8)
    assert tokens == expected(model, found)
    assert min(map(len, tokens)) >= 3
    assert max(greedy.steps) <= most
    assert "engine.max_num_batched_tokens" in caplog.text
    assert len(caplog.records) <= 5, "it is found out once how large a step may be"


def test_a_step_without_memory_that_takes_tokens_of_the_last(model: Decoder) -> None:
    """And the one after it takes some of its tokens, in the order of the whole step's samples."""
    greedy = Greedy(model, 100)
    runner = runner_over(greedy, overlaps=True)  # type: ignore[arg-type]
    found = requests(model, 3, 9, without_history)
    all_of_them = sequences(found)
    before = None
    for most in (100, 1, 100):
        greedy.most = most
        places = {
            one: len(found) - 1 - i for i, one in enumerate(all_of_them)
        }  # the order turns with each step
        step = step_of([(one, 100) for one in all_of_them], None if before is None else places)
        pending = runner.submit(step)
        all_of_them.reverse()
        accept(before)
        before = step, pending
    accept(before)
    assert [one.output_token_ids for one in found] == expected(model, found)
    assert [one.num_output_tokens for one in found] == [3, 3, 3]


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_without_memory_to_sample_still_knows_the_tokens_it_took(
    model: Decoder, captured: bool
) -> None:
    """The places where the step before had left them hold the best tokens of this one by then."""
    failures = [False, True, False, False]

    class Draws(TorchDraw):
        def __call__(self, *given: Any) -> None:
            if failures.pop(0):
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__call__(*given)

    runner = runner_over(model, Draws(), overlaps=True)
    if captured:
        graphs_of(runner)
    found = requests(
        model, 2, 9, lambda rng: Sampling(max_tokens=20, seed=rng.randrange(99), temperature=1.0)
    )
    all_of_them = sequences(found)
    before = None
    for number in range(2):
        step = step_of(
            [(one, 100) for one in all_of_them],
            {one: i for i, one in enumerate(all_of_them)} if number else None,
        )
        pending = runner.submit(step)
        accept(before)
        before = step, pending
    accept(before)
    assert [one.output_token_ids for one in found] == expected(model, found)
    assert not failures, "the second step was drawn in two parts"


def test_one_token_without_memory_is_an_error(model: Decoder) -> None:
    runner = runner_over(Greedy(model, 0))  # type: ignore[arg-type]
    [request] = requests(model, 1, 1, lambda rng: GREEDY)
    with pytest.raises(torch.OutOfMemoryError):
        runner.run(step_of([(sequences([request])[0], 100)]))


def test_a_chunk_that_samples_nothing(model: Decoder) -> None:
    runner = runner_over(model)
    graphs = graphs_of(runner)
    request = Request(Work(request_id="a", prompt=list(range(9)), sampling=GREEDY))
    [sequence] = sequences([request])
    assert runner.run(step_of([(sequence, 1)])) == []
    assert runner.run(step_of([(sequence, 4)])) == []
    [sampled] = runner.run(step_of([(sequence, 4)]))
    request.append(sampled.token, frozenset())
    assert [request.output_token_ids] == expected(model, [request])
    assert graphs.replays == 3


def test_what_was_captured_is_known(model: Decoder) -> None:
    runner = runner_over(model)
    assert runner.captured is None
    shapes = Buckets(decode_shapes(4), [])

    class Graphs(StrictGraphs):
        def memory_used(self) -> int:
            return 1000 + 7 * len(self.bodies)

        def __init__(self) -> None:
            super().__init__()
            self.bodies: list[object] = []

        def capture(self, body: Callable[[], None]) -> Callable[[], None]:
            self.bodies.append(body)
            return super().capture(body)

    captured = runner.capture(Graphs(), shapes)
    assert (list(captured.graphs), captured.num_bytes) == (shapes.all, 21)
    metrics = WorkerMetrics("w0", "decode", "tiny")
    metrics.graphs(captured)
    labels = '{model_name="tiny",role="decode",worker="w0"}'
    for line in (f"headrace_cuda_graphs{labels} 3.0", f"headrace_cuda_graph_bytes{labels} 21.0"):
        assert line in generate_latest(metrics.registry).decode()

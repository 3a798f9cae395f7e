"""What test_triton_runner.py runs in a process of its own, under Triton's interpreter or on the GPU: sampling and engines."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kernels.triton import step_inputs
from tests.workers.gpu.runners import CAPTURED_ROWS, StrictGraphs, runner_over, step_of
from tests.workers.gpu.sampling_requests import (
    EOS,
    by_the_oracle,
    random_inputs,
    random_logits,
    random_sampling,
)
from tests.workers.gpu.test_device_runner import accept, requests, sequences, without_history
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.gpu.buckets import Buckets, decode_shapes, mixed_shapes
from workers.gpu.device import device_for
from workers.gpu.draw import TritonDraw
from workers.gpu.sampler import DeviceSampler, choose_best
from workers.models.catalog import prepare_model
from workers.models.choose_ops import choose_ops
from workers.models.decoder import load_decoder
from workers.models.random_model import write_random_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 97


@pytest.mark.parametrize("seed", [1, 3])
def test_tokens_are_the_oracles(seed: int) -> None:
    rng, queue = random.Random(seed), device_for(DEVICE)
    sampler = DeviceSampler(queue, TritonDraw(queue), EOS)
    with queue.use():
        for count in (1, 7):
            logits = random_logits(rng, count, VOCAB, rng.randrange(count) if seed == 3 else None)
            inputs = random_inputs(rng, count, VOCAB)
            expected = [one.token for one in by_the_oracle(logits, inputs)]
            given, tokens = logits.to(DEVICE), torch.empty(count, dtype=torch.int64, device=DEVICE)
            choose_best(given, tokens)
            results = sampler(given, tokens, inputs)
            queue.mark().wait()
            assert [one.token for one in results()] == expected == tokens.tolist()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for graphs is of the CPU")
def test_captured_steps_read_their_buffers_and_nothing_else(tmp_path: Path) -> None:
    """Overlapped, padded, through Triton's kernels: the tokens of plain steps through torch."""
    path = write_random_model(tmp_path, {"num_hidden_layers": 1}, seed=1)
    results = []
    for kernels in ("torch", "triton"):
        model = load_decoder(path, torch.float32, DEVICE, ops=choose_ops(kernels, DEVICE, torch.float32))
        graphs = None
        if kernels == "triton":
            draw = TritonDraw(device_for(DEVICE))
            runner = runner_over(model, draw, overlaps=True, place_inputs=step_inputs.place_inputs)
            graphs = StrictGraphs()
            runner.capture(graphs, Buckets(decode_shapes(2), mixed_shapes(8, CAPTURED_ROWS)))
        else:
            runner = runner_over(model)
        found = requests(model, 2, 5, without_history)
        all_of_them = sequences(found)
        before, draws = None, 0
        for number in range(6):
            parts = [(one, 4) for one in all_of_them[: number + 1]]
            carried = {}
            if graphs is not None and before is not None:
                samples = [given.request for given in before[0].samples]
                carried = {one: samples.index(one.request) for one in all_of_them if one.request in samples}
            elif before is not None:
                accept(before)
            step = step_of(parts, carried)
            draws += any(given.request.sampling.temperature for given in step.samples)
            pending = runner.submit(step)
            if graphs is not None:
                accept(before)
            before = step, pending
        accept(before)
        assert graphs is None or graphs.replays == 6 + draws
        results.append([one.output_token_ids for one in found])
    assert results[0] == results[1]
    assert max(map(len, results[0])) >= 2
    assert draws


def test_an_engine_over_triton_says_what_one_over_torch_says(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, {"model_type": "qwen3", "num_hidden_layers": 1}, seed=1)
    model, rng = prepare_model(str(path)), random.Random(2)
    prompts = [[rng.randrange(model.vocab_size) for _ in range(length)] for length in (3, 9, 14)]
    given = [random_sampling(rng, model.vocab_size, max_tokens=4) for _ in prompts]
    tokens = []
    for kernels in ("torch", "triton"):
        config = EngineConfig(
            device=DEVICE.type, kernels=kernels, dtype="float32", num_blocks=32, block_size=4, max_model_len=32,
            max_num_seqs=4, max_num_batched_tokens=12,
        )  # fmt: skip
        engine = Engine(config, model)
        assert engine.runner.kernels == kernels
        tokens.append([completion.tokens for completion in engine.generate(prompts, given)])
        engine.close()
    assert tokens[0] == tokens[1]
    assert [len(one) for one in tokens[0]] == [4, 4, 4]

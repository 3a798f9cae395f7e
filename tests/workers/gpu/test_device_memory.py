"""How many KV blocks there is room for, and what is said when there is none. The device's memory is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from workers.config import EngineConfig
from workers.engine.backend import kv_layout
from workers.gpu.backend import DeviceBackend
from workers.gpu.buckets import Buckets, decode_shapes
from workers.gpu.buffers import Outputs
from workers.gpu.memory import Budget, MemoryAtStart, memory_for
from workers.gpu.trial import largest_step, made_up_step, warm_steps
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.decoder import Decoder, load_decoder
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

GIB = 2**30


class Memory:
    """Of a device of 16 GiB, 15 of them free before the model came, 11 behind it. The largest step takes 2 GiB."""

    at_start = 15 * GIB
    total = 16 * GIB

    def __init__(self) -> None:
        self.tried = 0

    def free_and_total(self) -> tuple[int, int]:
        return 11 * GIB, self.total

    def peak_of(self, work: Callable[[], object]) -> int:
        work()
        self.tried += 1
        return 2 * GIB


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepare_model(str(write_random_model(tmp_path_factory.mktemp("model"), "llama", seed=1)))


@pytest.fixture(scope="module")
def decoder(prepared: PreparedModel) -> Decoder:
    return load_decoder(prepared.path, torch.float32, torch.device("cpu"))


def backend(
    prepared: PreparedModel,
    decoder: Decoder,
    memory: Memory,
    settings: dict[str, Any],
    tokens: int = 64,
    seqs: int = 8,
) -> DeviceBackend:
    config = EngineConfig(device="cpu", max_num_batched_tokens=tokens, max_num_seqs=seqs, **settings)
    layout = kv_layout(decoder.spec, config.block_size, "float32", prepared.fingerprint)
    start = MemoryAtStart(memory, memory.at_start, memory.total)
    return DeviceBackend(config, prepared, decoder, layout, weights="float32", start=start)


def test_the_cache_is_what_is_left(prepared: PreparedModel, decoder: Decoder) -> None:
    memory = Memory()
    made = backend(prepared, decoder, memory, {"gpu_memory_utilization": 0.75})
    # 12 GiB are this worker's: 4 are held, 2 are for the largest step, which was tried, with all its ways to sample.
    assert made.num_blocks() == 6 * GIB // made.layout.block_bytes
    assert memory.tried == 1


def test_what_is_configured_is_not_measured(prepared: PreparedModel, decoder: Decoder) -> None:
    memory = Memory()
    assert backend(prepared, decoder, memory, {"num_blocks": 7}).num_blocks() == 7
    made = backend(prepared, decoder, memory, {"kv_cache_memory": "1MiB"})
    assert made.num_blocks() == 2**20 // made.layout.block_bytes
    assert memory.tried == 0


def test_less_than_a_block_is_refused(prepared: PreparedModel, decoder: Decoder) -> None:
    made = backend(prepared, decoder, Memory(), {"kv_cache_memory": 100})
    with pytest.raises(
        ValueError, match=r"engine.kv_cache_memory is 100 bytes, one KV block of this model has \d+"
    ):
        made.num_blocks()


def test_no_room_is_said_with_the_sizes_and_what_to_change(prepared: PreparedModel, decoder: Decoder) -> None:
    made = backend(prepared, decoder, Memory(), {"gpu_memory_utilization": 0.375})
    with pytest.raises(ValueError, match="there is no memory for a KV cache") as raised:
        made.num_blocks()
    said = str(raised.value)
    for part in (
        "of 16.00 GiB this worker may have 6.00 GiB", "weights and buffers take 4.00 GiB", "largest step 2.00 GiB",
        "graphs 0.00 GiB", "engine.max_num_batched_tokens", "engine.gpu_memory_utilization", "engine.quantization",
        "tensor_parallel",
    ):  # fmt: skip
        assert part in said


def test_a_share_that_is_not_free_is_refused() -> None:
    budget = Budget(total=16 * GIB, free=12 * GIB, share=0.9, held=GIB, activations=0, graphs=0)
    with pytest.raises(ValueError, match=r"asks for 14.40 GiB .* only 12.00 GiB were free .* 0.75 or less"):
        budget.kv_bytes(1)


def test_graphs_have_their_part() -> None:
    budget = Budget(total=16 * GIB, free=16 * GIB, share=1.0, held=GIB, activations=2 * GIB, graphs=3 * GIB)
    assert budget.kv_bytes(1) == 10 * GIB


def let_capture(
    made: DeviceBackend, graphs: object, prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding steps of up to 8 sequences, as on a GPU."""
    monkeypatch.setattr(made, "_captures", True)
    monkeypatch.setattr(made, "_graphs", lambda: graphs if made._captures else None)
    monkeypatch.setattr(made, "_buckets", lambda: Buckets(decode_shapes(8), []))
    monkeypatch.setattr(made, "_outputs", Outputs.of(torch.device("cpu"), 64, 8, prepared.vocab_size))


class Uncapturable:
    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def memory_used(self) -> int:
        return 0


def test_what_cannot_be_captured_is_launched_unless_graphs_were_asked_for(
    prepared: PreparedModel,
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = backend(prepared, decoder, Memory(), {"gpu_memory_utilization": 0.75})
    let_capture(made, Uncapturable(), prepared, monkeypatch)
    assert made.num_blocks() == 6 * GIB // made.layout.block_bytes
    runner = made.runner(8)
    assert runner.captured is None
    assert len(runner.run(made_up_step([1, 1], 9, 16, Sampling(max_tokens=1, seed=0, temperature=0.0)))) == 2
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "without CUDA graphs" in said
    assert "operation not permitted" in said
    made = backend(prepared, decoder, Memory(), {"graphs": "decode"})
    let_capture(made, Uncapturable(), prepared, monkeypatch)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        made.runner(8)


def test_what_graphs_take_is_judged_by_some_of_them(
    prepared: PreparedModel, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes for the largest, 5 for each of the others."""
    made = backend(prepared, decoder, Memory(), {"gpu_memory_utilization": 0.75})

    class Graphs:
        captured = 0

        def capture(self, body: Callable[[], None]) -> Callable[[], None]:
            self.captured += 1
            body()
            return body

        def memory_used(self) -> int:
            return (100 + 5 * (self.captured - 1)) * bool(self.captured)

    graphs = Graphs()
    let_capture(made, graphs, prepared, monkeypatch)
    # Graphs of 8, 4, 2 and 1 sequences.
    assert made.num_blocks() == (6 * GIB - 100 - 3 * 5) // made.layout.block_bytes
    assert graphs.captured == 4


def test_out_of_memory_at_the_start_is_an_error_for_people() -> None:
    with (
        pytest.raises(ValueError, match=r"no memory for 12 KV blocks: lower this\. Tried to allocate 20 GiB"),
        memory_for("12 KV blocks", "lower this"),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")


@pytest.mark.parametrize(
    ("tokens", "seqs", "length"), [(64, 8, 2048), (600, 64, 40), (8, 8, 2048), (3, 1, 2), (1, 1, 1)]
)
def test_steps_that_are_made_up_are_ones_that_could_come(
    prepared: PreparedModel, decoder: Decoder, tokens: int, seqs: int, length: int
) -> None:
    """Tried by the runner of a cache of one block, of which nothing is written."""
    made = backend(prepared, decoder, Memory(), {"max_model_len": length}, tokens, seqs)
    runner = made.runner(1)
    runner.kv_cache.fill_(0.5)
    steps = [largest_step(*made._trial), *warm_steps(*made._trial)]
    assert len(steps[0].arrays.token_ids) == min(tokens, seqs * length), "the largest"
    sizes = set()
    for step in steps:
        assert len(step.arrays.token_ids) <= tokens
        assert len(step.arrays.lengths) <= seqs
        assert step.arrays.positions.max() < length
        assert len(runner.run_launched(step)) == len(step.samples) == len(step.arrays.lengths)
        sizes.add(len(step.arrays.lengths))
    assert sizes == {n for n in (1, 3, 16) if n <= seqs} | {seqs}
    assert bool((runner.kv_cache == 0.5).all())

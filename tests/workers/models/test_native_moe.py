"""The native step of models with experts: against transformers, against itself, and in every format of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.cpu.decoder import CpuDecoder, StepArrays
from kernels.cpu.expert_exchange import Addresses, Received, Routed, row_addresses
from kernels.cpu.library import load
from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, step
from tests.workers.models.test_decoder import Sequence as TorchSequence
from tests.workers.models.test_moe_decoder import MODELS
from tests.workers.models.test_native import Decoded, check_equals_transformers, run_mixed, two_sequences
from workers.models.checkpoint import read_json
from workers.models.decoder import Decoder
from workers.models.packed_file import open_packed
from workers.models.random_model import write_random_model
from workers.models.scheme import choose_scheme
from workers.models.spec import DecoderSpec
from workers.models.weights import load_weights

# Heads of 24 are for torch alone, and so are latent attention and sinks.
NATIVE = {
    name: config | ({"head_dim": 48} if config.get("head_dim") == 24 else {})
    for name, config in MODELS.items()
    if not name.startswith(("deepseek", "gpt_oss"))
}
WIDE = {  # for groups of 32
    "hidden_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()  # from the real cache, before it moves
    monkeypatch.setattr("workers.models.native.default_cache_dir", lambda: tmp_path / "cache")


@pytest.mark.parametrize("config", NATIVE.values(), ids=NATIVE)
def test_equals_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_random_model(tmp_path / "model", config, seed=5)
    check_equals_transformers(path, Decoded(path, threads=2))


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "bfloat16"), ("int8", "float32"), ("int4", "float32")]
)
def test_other_formats_stay_close_to_their_values_in_float32(
    tmp_path: Path, family: str, quantization: str, dtype: str
) -> None:
    path = write_random_model(tmp_path / "model", {"model_type": family} | WIDE, seed=6)
    decoded = Decoded(path, quantization=quantization, dtype=dtype)
    sequence = two_sequences()[0]
    got = torch.from_numpy(decoded.alone(sequence, [30, 11]))
    expected = _dequantized(path, quantization, sequence.token_ids)
    # Near a tie a router chooses otherwise, and that token's logits are others: the token in the middle counts. Dense
    # models with such random weights come out alike: 0.03 and 0.005.
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.06
    likely, mine = expected.log_softmax(-1), got.log_softmax(-1)
    assert (likely.exp() * (likely - mine)).sum(-1).median() < 0.01


def _dequantized(path: Path, quantization: str, token_ids: np.ndarray) -> torch.Tensor:
    """Of one prompt, by the torch decoder on the weights that the scheme stands for."""
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    decoder = Decoder(spec, load_weights(path, spec, torch.float32, CPU, choose_scheme(quantization, path)))
    blocks = torch.arange(-(-len(token_ids) // BLOCK_SIZE))
    sequence = TorchSequence(
        decoder, decoder.new_kv_cache(len(blocks), BLOCK_SIZE), torch.from_numpy(token_ids), blocks
    )
    step(decoder, sequence._kv_cache, [(sequence, len(token_ids))])
    return sequence.logits[0]


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_neither_batch_nor_chunks_nor_threads_change_a_bit(
    tmp_path: Path, family: str, quantization: str
) -> None:
    path = write_random_model(tmp_path / "model", {"model_type": family} | WIDE, seed=7)
    first, second = two_sequences()
    run_mixed(Decoded(path, threads=3, quantization=quantization, dtype="bfloat16"), first, second)
    for index, sequence in enumerate((first, second)):
        alone = two_sequences()[index]
        whole = Decoded(path, quantization=quantization, dtype="bfloat16")
        expected = whole.alone(alone, [len(alone.token_ids)])
        np.testing.assert_array_equal(np.concatenate(sequence.logits), expected)


class Alone:
    """A group of one rank: every expert is here, but the step does not know."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def send(self, routed: Routed) -> None:
        self.layers.append(routed.layer)
        self._routed = routed

    def receive(self) -> Received:
        tokens, k = self._routed.experts.shape
        self._results = np.empty((tokens * k, self._routed.rows.shape[1]), np.float32)
        slots = self._routed.experts.flatten()
        return Received(np.repeat(row_addresses(self._routed.rows), k), slots, row_addresses(self._results))

    def give_back(self) -> None: ...

    def collect(self) -> Addresses:
        return row_addresses(self._results)


def _span(decoder: CpuDecoder, tokens: int, exchange: Alone | None) -> np.ndarray:
    """Logits of the last of so many tokens, which are one request's first."""
    random = np.random.default_rng(1)
    arrays = StepArrays(
        token_ids=random.integers(0, 259, tokens).astype(np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        slots=np.arange(tokens, dtype=np.int64),
        query_start=np.array([0] + [tokens] * (tokens > 0), np.int32),
        lengths=np.array([tokens] * (tokens > 0), np.int32),
        blocks=np.arange(10 * (tokens > 0), dtype=np.int32),
        block_start=np.array([0] * (tokens > 0), np.int32),
        rows=np.array([tokens - 1] * (tokens > 0), np.int32),
    )
    logits = np.full((len(arrays.rows), 259), np.nan, np.float32)
    decoder.step(arrays, logits, exchange=exchange)
    return logits


@pytest.mark.parametrize("name", ["qwen2_moe_window", "qwen3_moe_every_second", "mixtral"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_with_an_exchange_the_bits_are_the_same(tmp_path: Path, name: str, quantization: str) -> None:
    path = write_random_model(tmp_path / "model", NATIVE[name] | WIDE, seed=8)
    decoded = Decoded(path, threads=2, quantization=quantization, dtype="bfloat16")
    decoder = decoded._decoder  # whose cache `decoded` keeps
    exchange = Alone()
    for tokens in (1, 30):
        assert np.array_equal(_span(decoder, tokens, exchange), _span(decoder, tokens, None))
    every = list(range(len(decoder.experts)))
    assert exchange.layers == every * 2
    assert len(every) == sum(layer.moe is not None for layer in decoder.model.layers) > 0
    _span(decoder, 0, exchange)  # a rank without tokens takes part in every layer
    assert exchange.layers == every * 3


def test_experts_have_a_file_of_their_own_that_need_not_be_read(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model", {"model_type": "mixtral"}, seed=9)
    expected = Decoded(path).alone(two_sequences()[0], [41])
    directory = next(entry for entry in (tmp_path / "cache" / "packed").iterdir() if entry.is_dir())
    weights, experts = (open_packed(directory / f"{file}.bin", "lazy") for file in ("weights", "experts"))
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    assert spec.moe is not None
    assert len(experts.matrices) == 2 * spec.num_layers * spec.moe.num_experts
    assert not weights.matrices.keys() & experts.matrices.keys()

    (directory / "experts.bin").unlink()  # is made again
    assert np.array_equal(Decoded(path).alone(two_sequences()[0], [41]), expected)

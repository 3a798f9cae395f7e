"""The native step against transformers on the same random weights: every architecture, every instruction set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.cpu.attention import PagedCache
from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.decoder import CpuDecoder, StepArrays, ThreadPool
from kernels.cpu.library import load
from kernels.cpu.structures import KvType
from tests.workers.models.test_decoder import BLOCK_SIZE, MODELS, mixed_steps
from workers.models.catalog import PreparedModel
from workers.models.checkpoint import fingerprint, read_json
from workers.models.native import open_packed_model
from workers.models.random_model import write_random_model
from workers.models.spec import DecoderSpec

NUM_BLOCKS = 40
# Heads of 24 are for torch alone.
NATIVE_MODELS = {
    name: config | ({"head_dim": 48} if config.get("head_dim") == 24 else {})
    for name, config in MODELS.items()
}


class Decoded:
    """A native decoder with a cache of its own, driven sequence by sequence."""

    def __init__(
        self,
        path: Path,
        *,
        variant: str = "auto",
        threads: int = 1,
        quantization: str = "none",
        dtype: str = "float32",
    ) -> None:
        library = load(variant)
        spec = DecoderSpec.from_config(read_json(path / "config.json"))
        prepared = PreparedModel(path, "test", fingerprint(path), spec.max_position, spec.vocab_size, ())
        model = open_packed_model(prepared, spec, quantization, dtype, library).model
        kind = KvType.F32 if dtype == "float32" else KvType.BF16
        self._cache = PagedCache.new(
            kind, NUM_BLOCKS, spec.num_layers, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim
        )
        self._decoder = CpuDecoder(
            library, ThreadPool(library, threads), model, self._cache.native, max_tokens=64
        )
        self._vocab = spec.vocab_size

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        """Give each sequence its next tokens; logits of all of them are kept."""
        ids, positions, slots, starts, lengths, blocks, block_start = [], [], [], [0], [], [], []
        for sequence, count in work:
            span = np.arange(sequence.done, sequence.done + count)
            ids.append(sequence.token_ids[span])
            positions.append(span)
            slots.append(sequence.blocks[span // BLOCK_SIZE] * BLOCK_SIZE + span % BLOCK_SIZE)
            starts.append(starts[-1] + count)
            sequence.done += count
            lengths.append(sequence.done)
            block_start.append(sum(map(len, blocks)))
            blocks.append(sequence.blocks)
        arrays = StepArrays(
            token_ids=np.concatenate(ids).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            slots=np.concatenate(slots).astype(np.int64),
            query_start=np.array(starts, np.int32),
            lengths=np.array(lengths, np.int32),
            blocks=np.concatenate(blocks).astype(np.int32),
            block_start=np.array(block_start, np.int32),
            rows=np.arange(starts[-1], dtype=np.int32),
        )
        logits = np.full((starts[-1], self._vocab), np.nan, np.float32)
        self._decoder.step(arrays, logits)
        for (sequence, _), begin, end in zip(work, starts, starts[1:], strict=False):
            sequence.logits.append(logits[begin:end])

    def alone(self, sequence: Sequence, chunks: list[int]) -> np.ndarray:
        for count in chunks:
            self.step([(sequence, count)])
        return np.concatenate(sequence.logits)


class Sequence:
    def __init__(self, token_ids: np.ndarray, blocks: np.ndarray) -> None:
        self.token_ids, self.blocks = token_ids, blocks
        self.done = 0
        self.logits: list[np.ndarray] = []


def two_sequences() -> tuple[Sequence, Sequence]:
    random = np.random.default_rng(3)
    blocks = random.permutation(NUM_BLOCKS)
    return (
        Sequence(random.integers(0, 259, 41), blocks[:11]),
        Sequence(random.integers(0, 259, 30), blocks[11:19]),
    )


def run_mixed(decoded: Decoded, first: Sequence, second: Sequence) -> None:
    for work in mixed_steps(first, second):
        decoded.step(work)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights of random models are nobody else's."""
    load()  # from the real cache, before it moves
    monkeypatch.setattr("workers.models.native.default_cache_dir", lambda: tmp_path / "cache")


@torch.no_grad()
def check_equals_transformers(path: Path, decoded: Decoded) -> None:
    """Of every token of two sequences, in mixed steps."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    first, second = two_sequences()
    run_mixed(decoded, first, second)
    for sequence in (first, second):
        expected = theirs(torch.from_numpy(sequence.token_ids)[None]).logits[0]
        got = torch.from_numpy(np.concatenate(sequence.logits))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("config", NATIVE_MODELS.values(), ids=NATIVE_MODELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_transformers(tmp_path: Path, config: dict[str, Any], threads: int) -> None:
    path = write_random_model(tmp_path / "model", config, seed=5)
    check_equals_transformers(path, Decoded(path, threads=threads))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "amx"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_every_instruction_set_agrees(tmp_path: Path, variant: str, quantization: str) -> None:
    if not runs_here(VARIANTS[variant]):
        pytest.skip(f"this processor cannot run {variant}")
    path = write_random_model(tmp_path / "model", {"hidden_size": 96, "intermediate_size": 160}, seed=6)
    got, expected = two_sequences()[0], two_sequences()[0]
    Decoded(path, variant=variant, quantization=quantization).alone(got, [30, 11])
    Decoded(path, variant="portable", quantization=quantization).alone(expected, [41])
    np.testing.assert_allclose(
        np.concatenate(got.logits), np.concatenate(expected.logits), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_batch_nor_chunks_nor_threads_change_a_bit(
    tmp_path: Path, quantization: str, dtype: str
) -> None:
    path = write_random_model(tmp_path / "model", {"hidden_size": 96, "intermediate_size": 160}, seed=7)
    first, second = two_sequences()
    run_mixed(Decoded(path, threads=3, quantization=quantization, dtype=dtype), first, second)
    for index, sequence in enumerate((first, second)):
        alone = two_sequences()[index]
        expected = Decoded(path, quantization=quantization, dtype=dtype).alone(alone, [len(alone.token_ids)])
        np.testing.assert_array_equal(np.concatenate(sequence.logits), expected)


def test_a_step_that_wants_no_logits_still_writes_the_cache(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model", {}, seed=8)
    whole, resumed = two_sequences()[0], two_sequences()[0]
    expected = Decoded(path).alone(whole, [41])
    decoded = Decoded(path)
    span = np.arange(20)
    decoded._decoder.step(
        StepArrays(
            token_ids=resumed.token_ids[span].astype(np.int32),
            positions=span.astype(np.int32),
            slots=(resumed.blocks[span // BLOCK_SIZE] * BLOCK_SIZE + span % BLOCK_SIZE).astype(np.int64),
            query_start=np.array([0, 20], np.int32),
            lengths=np.array([20], np.int32),
            blocks=resumed.blocks.astype(np.int32),
            block_start=np.array([0], np.int32),
            rows=np.array([], np.int32),
        ),
        np.empty((0, 259), np.float32),
    )
    resumed.done = 20
    np.testing.assert_array_equal(decoded.alone(resumed, [21]), expected[20:])


def test_a_step_too_large_is_refused(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model", {}, seed=9)
    with pytest.raises(ValueError, match="64 at most"):
        Decoded(path).alone(Sequence(np.arange(100), np.arange(NUM_BLOCKS)), [100])


END_WITHIN_A_STEP = """
import os, sys, threading
from pathlib import Path
import workers.models.native
from tests.workers.models.test_native import Decoded, two_sequences

for _ in range(3):  # each an interpreter that ends, without the seconds that loading torch takes
    if (child := os.fork()) == 0:
        break
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7:
        sys.exit(1)
else:
    sys.exit(0)
workers.models.native.default_cache_dir = lambda: Path(sys.argv[2])
decoded, stepping = Decoded(Path(sys.argv[1]), threads=2), threading.Event()

def decode():
    while True:
        decoded.alone(two_sequences()[0], [41])
        stepping.set()

threading.Thread(target=decode, daemon=True).start()
stepping.wait()
sys.exit(7)
"""


def test_the_interpreter_may_end_within_a_step(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model", {"num_hidden_layers": 16}, seed=10)
    command = [sys.executable, "-c", END_WITHIN_A_STEP, str(path), str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=120).returncode == 0

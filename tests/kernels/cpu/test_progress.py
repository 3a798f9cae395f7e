"""What a decoder says of its progress is so: a layer that is called done has its final keys and values."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.cpu.attention import PagedCache
from kernels.cpu.decoder import CpuDecoder, StepArrays, ThreadPool
from kernels.cpu.gemm import pack
from kernels.cpu.layout import gate_up_rows, qkv_rows
from kernels.cpu.library import Library, load
from kernels.cpu.packed import PackedLayer, PackedMatrix, PackedModel
from kernels.cpu.structures import Format, KvType

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB, POSITIONS = 7, 256, 4, 2, 64, 512, 96, 512
BLOCK_SIZE, BLOCKS = 16, 40


def model(library: Library) -> PackedModel:
    random = np.random.default_rng(1)

    def matrix(n: int, k: int, rows: NDArray[np.int32] | None = None) -> PackedMatrix:
        return pack(library, Format.F32, random.standard_normal((n, k), np.float32) / k**0.5, rows=rows)

    def layer() -> PackedLayer:
        return PackedLayer(
            input_norm=np.ones(HIDDEN, np.float32),
            q_norm=None,
            k_norm=None,
            mlp_norm=np.ones(HIDDEN, np.float32),
            qkv=matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, qkv_rows(HEADS, KV_HEADS, DIM)),
            output=matrix(HIDDEN, HEADS * DIM),
            gate_up=matrix(2 * INTERMEDIATE, HIDDEN, gate_up_rows(INTERMEDIATE)),
            down=matrix(HIDDEN, INTERMEDIATE),
            window=None,
        )

    angles = np.arange(POSITIONS)[:, None] / 1e4 ** (np.arange(DIM // 2) / (DIM // 2))
    return PackedModel(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        vocab=VOCAB,
        norm_eps=1e-6,
        scale=DIM**-0.5,
        embedding=random.standard_normal((VOCAB, HIDDEN), np.float32),
        layers=[layer() for _ in range(LAYERS)],
        final_norm=np.ones(HIDDEN, np.float32),
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        head=matrix(VOCAB, HIDDEN),
    )


def step_of(begin: int, end: int, rows: int) -> StepArrays:
    """Tokens [begin, end) of one sequence whose blocks lie in order; `rows`, 0 or 1, of logits."""
    positions = np.arange(begin, end, dtype=np.int32)
    return StepArrays(
        token_ids=positions * 7 % VOCAB,
        positions=positions,
        slots=positions.astype(np.int64),
        query_start=np.array([0, end - begin], np.int32),
        lengths=np.array([end], np.int32),
        blocks=np.arange(BLOCKS, dtype=np.int32),
        block_start=np.zeros(1, np.int32),
        rows=np.full(rows, end - begin - 1, np.int32),
    )


class Decoding:
    def __init__(self, threads: int) -> None:
        library = load()
        self.cache = PagedCache.new(KvType.F32, BLOCKS, LAYERS, KV_HEADS, BLOCK_SIZE, DIM)
        self.decoder = CpuDecoder(
            library, ThreadPool(library, threads), model(library), self.cache.native, max_tokens=400
        )

    def step(self, step: StepArrays) -> None:
        self.decoder.step(step, np.empty((max(1, len(step.rows)), VOCAB), np.float32))


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    """Of the GIL, so that the polling thread is not held up."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_numbers() -> None:
    decoding = Decoding(1)
    progress = decoding.decoder.progress
    assert decoding.decoder.steps_begun == 0
    assert progress.layers_done(1) == 0
    for number, rows in enumerate((1, 0, 1), 1):  # without rows the last layer ends with its keys and values
        decoding.step(step_of(number - 1, number, rows))
        assert decoding.decoder.steps_begun == progress.steps_begun == number
        assert [progress.layers_done(n) for n in range(number + 2)] == [LAYERS] * (number + 1) + [0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_layer_that_is_done_has_its_final_bytes(threads: int) -> None:
    """Snapshots that another thread takes of the layers called done, while steps run over a cache of other bytes."""
    decoding = Decoding(threads)
    decoder, data = decoding.decoder, decoding.cache.data.numpy()
    progress = decoder.progress
    tokens = 300
    within: list[int] = []  # layers done when a snapshot was taken during a step
    for number in range(1, 9):
        step = step_of(0, tokens, number % 2)
        data[:] = 0xA5
        taken: list[tuple[int, NDArray[np.uint8]]] = []
        words: list[int] = []
        go, over = threading.Event(), threading.Event()

        def watch(
            number: int = number,
            taken: list[tuple[int, NDArray[np.uint8]]] = taken,
            words: list[int] = words,
            go: threading.Event = go,
            over: threading.Event = over,
        ) -> None:
            seen = 0
            go.set()
            while seen < LAYERS and not over.is_set():
                words.append(decoder.progress_word())
                done = progress.layers_done(number)
                if done > seen:
                    taken.append((done, data[:, seen:done].copy()))
                    seen = done

        watcher = threading.Thread(target=watch)
        watcher.start()
        go.wait()
        decoding.step(step)
        ended = progress.layers_done(number)
        over.set()
        watcher.join()
        assert ended == LAYERS
        assert words == sorted(words)
        seen = 0
        used = -(-tokens // BLOCK_SIZE)
        for done, snapshot in taken:
            assert np.array_equal(snapshot[:used], data[:used, seen:done]), (
                f"layers {seen} to {done} of step {number}"
            )
            seen = done
        assert (data[: used - 1] != 0xA5).any(-1).all()  # each tile was written
        within += [done for done, _ in taken if done < LAYERS]
    assert within  # at least once a layer was seen while the step ran

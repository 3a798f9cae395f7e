"""One layer with experts on a CPU, router included: Headrace's kernels beside transformers' own implementations.

python -m bench.experts block [--shapes olmoe,qwen3-30b-a3b] [--batches 1,16,256] [--rounds 15] [--threads 2] [--clock wall]

All compute the same tokens on the same bfloat16 weights, both sides' in huge pages, in turn, so that a change of the
machine's mood meets all of them; figures are medians. Every round has new tokens, so that its experts are not in the
caches. The floor is the time in which the weights of the chosen experts could be read at the best rate seen in the
run, or the multiply-adds be done at the processor's best rate, whichever is longer. `--clock cpu --threads 1` counts
the processor's time, for machines that others use too: a thread that waits for its turn then costs nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from bench.floors import peak_bf16, read_bandwidth
from bench.machine import describe, sentence
from kernels.cpu.decoder import ThreadPool
from kernels.cpu.gemm import pack
from kernels.cpu.layout import gate_up_rows
from kernels.cpu.library import Library, load
from kernels.cpu.moe import MoeBlock
from kernels.cpu.packed import PackedExpert, PackedMatrix, PackedMoe
from kernels.cpu.structures import Format
from kernels.reference_moe import Routing, route
from workers.huge_pages import huge_zeros

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_MOST_COPIED = 2 << 30  # bytes: batched_mm copies the weights of every choice
_HOPELESS = 4.0  # times slower than the best at the first try: not asked again


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    normalize: bool

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8, False),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, True),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, True),
    "small": Shape(256, 128, 16, 2, True),  # to try this program
}

Layer = Callable[[Tensor], Tensor]  # [T, hidden] bfloat16 -> [T, hidden]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experts block")
    parser.add_argument("--shapes", default="olmoe,qwen3-30b-a3b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,16,256", help="tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread only")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        parser.error(
            "--clock cpu adds up the time of all threads, waiting ones included: use it with --threads 1"
        )
    torch.set_num_threads(options.threads)
    machine = Machine(options.threads, CLOCKS[options.clock])
    print(sentence(describe()))
    print(
        "| layer | tokens | headrace, ms | times the floor | best of transformers | ms | ratio | others, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in options.shapes.split(","):
            batches = [int(batch) for batch in options.batches.split(",")]
            for row in _compare(SHAPES[name], batches, options.rounds, machine):
                print(f"| {name} | {row} |", flush=True)


class Machine:
    """Its clock, and the best it has shown so far."""

    def __init__(self, threads: int, clock: Callable[[], float]) -> None:
        self.threads, self.clock = threads, clock
        self._read_rate = self._peak = 0.0

    def floor(self, num_bytes: float, flops: float) -> float:
        """Seconds. Probes anew: a floor is what the machine can do at best."""
        rates = [self._read_rate, read_bandwidth(self.threads)]
        if self.clock is time.process_time:
            rates += [self._read_alone() for _ in range(4)]
        self._read_rate, self._peak = max(rates), max(self._peak, peak_bf16(self.threads))
        return max(num_bytes / self._read_rate, flops / self._peak)

    def _read_alone(self) -> float:
        memory, read = huge_zeros(1 << 28), load().cdll.hr_bench_read
        read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        memory.fill(1)
        began = self.clock()
        read(memory.ctypes.data, memory.nbytes, 1)
        return memory.nbytes / (self.clock() - began)


def _compare(shape: Shape, batches: Sequence[int], rounds: int, machine: Machine) -> Sequence[str]:
    theirs = _transformers(shape)
    mine = _headrace(theirs, shape, machine.threads, max(16, *batches))
    checked = {"headrace": mine} | {kind: _as(theirs, kind) for kind in _kinds(shape, 1)}
    _check(checked, torch.randn(16, shape.hidden).bfloat16())
    rows = []
    for tokens in batches:
        layers: dict[str, Layer] = {"headrace": mine}
        layers |= {kind: _as(theirs, kind) for kind in _kinds(shape, tokens)}
        inputs = [torch.randn(tokens, shape.hidden).bfloat16() for _ in range(rounds + 1)]
        times = _interleaved(layers, inputs, machine.clock)
        chosen = median(_distinct(theirs, shape, x) for x in inputs[1:])
        flops = 2 * tokens * shape.top_k * shape.expert_parameters
        floor = machine.floor(chosen * shape.expert_parameters * 2, flops)
        ours = median(times.pop("headrace"))
        (best, kind), *others = sorted((median(taken), kind) for kind, taken in times.items())
        rows.append(
            f"{tokens} | {1e3 * ours:.3g} | {ours / floor:.2f} | {kind} | {1e3 * best:.3g} | {best / ours:.2f} | "
            + ", ".join(f"{kind} {1e3 * taken:.3g}" for taken, kind in others)
        )
    return rows


def _transformers(shape: Shape) -> Qwen3MoeSparseMoeBlock:
    """Router, experts and weighted sum: the same in Mixtral and OLMoE."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalize,
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    for module in (block.gate, block.experts):
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = (
                torch.from_numpy(huge_zeros(parameter.numel() * 2)).view(torch.bfloat16).view(parameter.shape)
            )
            setattr(
                module,
                name,
                nn.Parameter(values.normal_(std=parameter.shape[-1] ** -0.5), requires_grad=False),
            )
    return block.eval()


def _headrace(theirs: Any, shape: Shape, threads: int, max_tokens: int) -> Layer:
    library = load()
    halves = gate_up_rows(shape.intermediate)
    gate_up, down = theirs.experts.gate_up_proj, theirs.experts.down_proj
    moe = PackedMoe(
        routing=Routing(shape.top_k, normalize=shape.normalize),
        router=pack(library, Format.F32, theirs.gate.weight.float().numpy()),
        correction_bias=None,
        experts=[
            PackedExpert(_packed(library, gate_up[e], halves), _packed(library, down[e], None))
            for e in range(shape.experts)
        ],
    )
    block = MoeBlock(library, ThreadPool(library, threads), moe, max_tokens)
    return lambda x: torch.from_numpy(block(x.float().numpy()))


def _packed(library: Library, weight: Tensor, rows: np.ndarray | None) -> PackedMatrix:
    packed = pack(library, Format.BF16, weight.view(torch.int16).numpy().view(np.uint16), rows=rows)
    huge = huge_zeros(packed.data.nbytes)
    huge[:] = packed.data
    return packed.with_arrays([huge])


def _kinds(shape: Shape, tokens: int) -> list[str]:
    """transformers' implementations that run on a CPU."""
    copied = tokens * shape.top_k * shape.expert_parameters * 2
    return ["eager", "grouped_mm"] + (["batched_mm"] if copied <= _MOST_COPIED else [])


def _as(block: Any, kind: str) -> Layer:
    def run(x: Tensor) -> Tensor:
        block.experts.config._experts_implementation = kind
        return block(x[None])[0]

    return run


def _check(layers: dict[str, Layer], x: Tensor) -> None:
    """Raises where two of them do not compute the same. transformers' router rounds its logits to bfloat16, so that a
    few tokens take another expert than those with float32 logits: the token in the middle counts."""
    first = layers["headrace"](x)
    for kind, layer in layers.items():
        error = ((layer(x).float() - first).norm(dim=-1) / first.norm(dim=-1)).median()
        if error > 0.03:
            raise RuntimeError(f"{kind} differs from headrace by {error:.3f} of the result's norm")


def _interleaved(
    layers: dict[str, Layer], inputs: Sequence[Tensor], clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each round, the first input only warming up."""
    first = {kind: _seconds(layer, inputs[0], clock) for kind, layer in layers.items()}
    best = min(taken for kind, taken in first.items() if kind != "headrace")
    asked = [kind for kind in layers if kind == "headrace" or first[kind] <= _HOPELESS * best]
    times: dict[str, list[float]] = defaultdict(list)
    for x in inputs[1:]:
        for kind in asked:
            times[kind].append(_seconds(layers[kind], x, clock))
    return dict(times)


def _seconds(layer: Layer, x: Tensor, clock: Callable[[], float]) -> float:
    began = clock()
    layer(x)
    return clock() - began


def _distinct(block: Any, shape: Shape, x: Tensor) -> int:
    logits = x.float() @ block.gate.weight.float().T
    return len(route(logits, Routing(shape.top_k))[1].unique())

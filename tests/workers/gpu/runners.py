"""Device runners over a tiny model on the CPU, without an engine, and a stand-in for CUDA graphs that is as strict."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.workers.gpu.sampling_requests import EOS
from workers.engine.request import Request
from workers.engine.sampler import SampleInput
from workers.engine.step_input import StepBuilder, StepInput
from workers.gpu.buckets import Shape
from workers.gpu.buffers import Outputs, StepBuffers
from workers.gpu.device import HostDevice
from workers.gpu.draw import Draw, TorchDraw
from workers.gpu.runner import DeviceRunner
from workers.gpu.sampler import DeviceSampler
from workers.models.decoder import Decoder

BLOCK_SIZE = 4
MAX_LENGTH = 40
NUM_BLOCKS = 60
CAPTURED_ROWS = 16


def runner_over(model: Decoder, draw: Draw | None = None, **settings: Any) -> DeviceRunner:
    device = HostDevice(torch.device("cpu"))
    outputs = Outputs.of(device.device, 64, CAPTURED_ROWS, model.spec.vocab_size)
    names = {"kernels": "torch", "weights": "float32"}
    return DeviceRunner(
        model,
        model.new_kv_cache(NUM_BLOCKS, BLOCK_SIZE),
        DeviceSampler(device, draw or TorchDraw(), EOS),
        StepBuffers(device, Shape(64, CAPTURED_ROWS, 64, 64), MAX_LENGTH // BLOCK_SIZE, BLOCK_SIZE),
        outputs,
        device,
        max_model_len=MAX_LENGTH,
        **names | settings,
    )


class Sequence:
    """A request with blocks of its own, and how much of it is computed."""

    def __init__(self, request: Request, first_block: int) -> None:
        self.request = request
        self.table = array("i", range(first_block, first_block + MAX_LENGTH // BLOCK_SIZE))
        self.computed = 0


def step_of(parts: list[tuple[Sequence, int]], carried: dict[Sequence, int] | None = None) -> StepInput:
    """The next `count` tokens of each sequence; those that reach the last known one sample. `carried`: of sequences whose
    next token is not known here, its place among the last step's samples."""
    builder, samples, places = StepBuilder(BLOCK_SIZE), [], []
    num_tokens = 0
    for sequence, count in parts:
        request, start = sequence.request, sequence.computed
        tokens = request.token_ids[start : start + count]
        if carried and sequence in carried:
            places.append((num_tokens, carried[sequence]))
            tokens = [0]
        sequence.computed += len(tokens)
        num_tokens += len(tokens)
        last = sequence.computed >= request.num_tokens
        builder.add(tokens, start, sequence.table, int(last))
        if last:
            samples.append(SampleInput(request, sequence.computed - request.num_prompt_tokens))
    return StepInput(builder.arrays(), samples, places)


class StrictGraphs:
    """A replay calls the captured function again, and may read only memory that was there at its capture, or that a captured
    function has allocated, as a graph does: what was made for one step, on the host or the device, is refused."""

    def __init__(self) -> None:
        """After what is to be read was made, but for the arguments of captured functions."""
        self.replays = 0
        self._known = set(_addresses([one for one in gc.get_objects() if issubclass(type(one), Tensor)]))
        self._pool: list[
            Tensor
        ] = []  # what captured functions have allocated: kept, so that no address returns

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            with _Watched(self._known, self._pool):
                body()

        self._known.update(_addresses(getattr(body, "args", ())))
        with _Watched(self._known, self._pool):
            body()
        return replay

    def memory_used(self) -> int:
        return 0


class _Watched(TorchDispatchMode):
    def __init__(self, known: set[int], pool: list[Tensor]) -> None:
        super().__init__()
        self._known, self._pool = known, pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is not torch.ops.aten.lift_fresh.default
        ):  # of torch.tensor, by which the oracle makes indices of numbers
            strange = set(_addresses(tree_leaves((args, kwargs or {})))) - self._known
            assert not strange, f"{func} reads {len(strange)} tensors that were not there at the capture"
        result = func(*args, **kwargs or {})
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._pool += made
        self._known.update(_addresses(made))
        return result


def _addresses(leaves: Iterable[Any]) -> Iterator[int]:
    for leaf in leaves:
        if (
            isinstance(leaf, Tensor) and leaf.layout == torch.strided
        ):  # weights in oneDNN's layout lie nowhere
            yield leaf.untyped_storage().data_ptr()

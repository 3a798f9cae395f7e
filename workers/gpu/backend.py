"""A model on a torch device, before the size of its KV cache is known: measures what it needs, makes its runner."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from kernels import reference_step_inputs
from workers.config import EngineConfig
from workers.device_memory import DevicePages, exportable_pages
from workers.engine.backend import configured_blocks
from workers.gpu.buckets import Buckets, Shape, decode_shapes, mixed_shapes
from workers.gpu.buffers import Outputs, StepBuffers
from workers.gpu.device import CudaDevice, device_for
from workers.gpu.draw import Draw, TorchDraw, TritonDraw
from workers.gpu.graphs import CudaGraphs, Graphs
from workers.gpu.memory import Budget, DeviceMemory, MemoryAtStart, memory_for
from workers.gpu.runner import DeviceRunner, Model, PlaceInputs
from workers.gpu.sampler import DeviceSampler
from workers.gpu.trial import largest_step, warm_steps
from workers.models.catalog import PreparedModel
from workers.models.ops import Ops
from workers.parallel.collectives import ALONE, Parallel
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages

logger = logging.getLogger(__name__)

_MOST_GRAPH_SEQS = 512  # a graph for every 8 of them
_MOST_GRAPH_TOKENS = 256  # of a step that reads prompts
_PROBED = 4  # small graphs that are captured to see what the others will take


class CacheModel(Model, Protocol):
    @property
    def ops(self) -> Ops: ...

    @property
    def device(self) -> torch.device: ...

    def new_kv_cache(self, num_blocks: int, block_size: int, pages: Tensor | None = None) -> Tensor: ...


class DeviceBackend:
    """Eager torch or Triton's kernels, chosen with the model's `ops`."""

    def __init__(
        self,
        config: EngineConfig,
        prepared: PreparedModel,
        model: CacheModel,
        layout: KvLayout,
        *,
        weights: str,
        kernels: str | None = None,
        spread: bool = False,
        start: MemoryAtStart | None = None,
        parallel: Parallel = ALONE,
        graphs: bool = True,
    ) -> None:
        """`weights`, `kernels`: their names, the latter None for that of the model's `ops`. `spread`: other ranks compute
        some of the experts. `start`: for a cache as large as there is room; None: as configured. `graphs`: whether the
        model can be captured. With `parallel` all ranks make the same calls."""
        self.layout = layout
        self._config, self._model, self._weights = config, model, weights
        self._kernels = kernels or model.ops.name
        # A step with other ranks' experts is made when their group has met, and not before.
        self._start, self._spread, self._parallel = None if spread else start, spread, parallel
        self._compiles = model.ops.name == "triton" and model.device.type == "cuda"
        capturable = graphs and not spread and self._compiles
        self._captures = capturable and config.graphs != "none"
        self._max_model_len = min(config.max_model_len or prepared.max_model_len, prepared.max_model_len)
        self._device = device_for(model.device, own_queue=not spread)
        most_seqs, most_tokens = config.batch(model.device.type)
        self._most = Shape(most_tokens, most_seqs, most_tokens, most_tokens)
        width = -(-self._max_model_len // layout.block_size)
        self._buffers = StepBuffers(self._device, self._most, width, layout.block_size)
        self._trial = self._most, self._max_model_len, layout.block_size, parallel.shard.first
        captured_rows = max((shape.rows for shape in self._buckets().all), default=0)
        self._outputs = Outputs.of(model.device, most_tokens, captured_rows, prepared.vocab_size)
        draw: Draw = TorchDraw()
        self._place_inputs: PlaceInputs = reference_step_inputs.place_inputs
        if model.ops.name == "triton":
            from kernels.triton import step_inputs

            draw, self._place_inputs = TritonDraw(self._device), step_inputs.place_inputs
        eos = frozenset(prepared.eos_token_ids)
        self._sampler = DeviceSampler(self._device, draw, eos)

    # --- the size of the cache --------------------------------------------------------------------------------------

    def num_blocks(self) -> int:
        """As configured, or as many as there is room for. Raises ValueError. Ranks have room for different numbers."""
        start, config = self._start, self._config
        if start is None or config.num_blocks or config.kv_cache_memory:
            return configured_blocks(config, self.layout)
        block_bytes, activations, graphs = self._measure(start.memory)
        held = start.free - start.memory.free_and_total()[0]
        budget = Budget(start.total, start.free, config.gpu_memory_utilization, held, activations, graphs)
        blocks = budget.kv_bytes(block_bytes) // block_bytes
        logger.info("a KV cache of %.2f GiB: %s", blocks * block_bytes / 2**30, budget)
        return blocks

    def _measure(self, memory: DeviceMemory) -> tuple[int, int, int]:
        """Bytes of a KV block here, of the largest step at one time, and of all graphs."""
        with memory_for("the largest step", "lower engine.max_num_batched_tokens or engine.max_num_seqs"):
            cache = self._model.new_kv_cache(1, self.layout.block_size)
            runner = self._runner_over(cache, None)
            step = largest_step(*self._trial)
            activations = memory.peak_of(lambda: runner.run(step))
            return cache.nbytes, activations, self._graph_bytes(runner)

    def _graph_bytes(self, runner: DeviceRunner) -> int:
        """What all graphs will take, from the largest and some of the others."""
        shapes = self._buckets().all
        graphs = self._graphs()
        if graphs is None or not shapes:
            return 0
        probed = shapes[1 : 1 + _PROBED]
        first = self._capture(runner, graphs, Buckets.of(shapes[:1]))
        others = self._capture(runner, graphs, Buckets.of(probed)) if probed and self._captures else 0
        runner.forget_graphs()
        return first + others * (len(shapes) - 1) // max(len(probed), 1)

    def _capture(self, runner: DeviceRunner, graphs: Graphs, buckets: Buckets) -> int:
        """Bytes that the graphs take. Where graphs were not asked for by name, what cannot be captured is launched."""
        try:
            return runner.capture(graphs, buckets).num_bytes
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._config.graphs != "auto" or not self._parallel.shard.whole:
                raise
            logger.warning("steps run without CUDA graphs, more slowly: they cannot be captured: %s", error)
            self._captures = False
            runner.forget_graphs()
            return 0

    # --- the runner -------------------------------------------------------------------------------------------------

    def runner(self, num_blocks: int, share_kv: bool = False) -> DeviceRunner:
        with memory_for(
            f"{num_blocks} KV blocks", "lower engine.gpu_memory_utilization or engine.num_blocks"
        ):
            runner = self._make_runner(num_blocks, share_kv)
        graphs = self._graphs()
        if graphs is not None:
            with memory_for(
                "CUDA graphs", "lower engine.gpu_memory_utilization, or set engine.graphs to none"
            ):
                self._capture(runner, graphs, self._buckets())
        if self._compiles and not self._spread:
            for step in warm_steps(*self._trial):
                runner.run_launched(step)
        return runner

    def _make_runner(self, num_blocks: int, share_kv: bool) -> DeviceRunner:
        size = self.layout.block_size
        shared, pages = None, None
        if share_kv:
            one = self._model.new_kv_cache(1, size)  # of this rank's heads
            shared = shared_pages(num_blocks * one.nbytes, one.device)
            pages = None if shared is None else shared.tensor
        return self._runner_over(self._model.new_kv_cache(num_blocks, size, pages), shared)

    def _runner_over(self, cache: Tensor, shared: SharedPages | DevicePages | None) -> DeviceRunner:
        if isinstance(self._device, CudaDevice):
            torch.cuda.synchronize(self._device.device)  # weights and cache come from the default queue
        return DeviceRunner(
            self._model,
            cache,
            self._sampler,
            self._buffers,
            self._outputs,
            self._device,
            kernels=self._kernels,
            weights=self._weights,
            max_model_len=self._max_model_len,
            shared=shared,
            overlaps=self._model.device.type == "cuda" and not self._spread,
            parallel=self._parallel,
            place_inputs=self._place_inputs,
        )

    def _graphs(self) -> Graphs | None:
        return CudaGraphs(self._device) if self._captures and isinstance(self._device, CudaDevice) else None

    def _buckets(self) -> Buckets:
        """None where nothing is captured."""
        if not self._captures:
            return Buckets([], [])
        seqs, tokens = self._most.seqs, self._most.tokens
        mixed = min(tokens, _MOST_GRAPH_TOKENS) if self._config.graphs != "decode" else 0
        return Buckets(decode_shapes(min(seqs, _MOST_GRAPH_SEQS)), mixed_shapes(mixed, seqs))


def shared_pages(num_bytes: int, device: torch.device) -> SharedPages | DevicePages | None:
    """Memory that other processes of the host can map or open."""
    if device.type == "cpu":
        return SharedPages(num_bytes)
    return exportable_pages(num_bytes, device) if device.type == "cuda" else None

"""Steps by the native CPU library: one call for the whole model, one for the sampling of all rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kernels.cpu import attention
from kernels.cpu.build import BuildError
from kernels.cpu.decoder import CpuDecoder, StepArrays, ThreadPool
from kernels.cpu.library import Library, load
from kernels.cpu.packed import PackedModel
from kernels.cpu.structures import Format, KvCache, KvType
from workers.config import EngineConfig
from workers.engine.backend import configured_blocks, kv_layout
from workers.engine.native_sampler import NativeSampler
from workers.engine.pending import Ready
from workers.engine.plan import Sampled
from workers.engine.step_input import StepInput
from workers.experts.exchange import Shape
from workers.experts.group import ExpertModel
from workers.experts.native_experts import NativeExperts
from workers.experts.plane import ExpertPlane
from workers.huge_pages import huge_zeros
from workers.models.catalog import PreparedModel
from workers.models.checkpoint import read_json
from workers.models.errors import NotHere
from workers.models.native import FLOAT_FORMATS, open_packed_model
from workers.models.spec import DecoderSpec
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages

_KV_TYPES = {"float32": KvType.F32, "bfloat16": KvType.BF16, "int8": KvType.I8}


class NativeBackend:
    """A model in packed form, usually mapped from a file that all workers of a host share."""

    def __init__(
        self, config: EngineConfig, model: PreparedModel, experts: ExpertPlane | None = None
    ) -> None:
        """`experts`: see open_backend. Raises ModelError; NotHere when this model or machine needs torch."""
        try:
            self._library = load(config.kernels)
        except BuildError as error:
            raise NotHere(str(error)) from error
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        if dtype not in FLOAT_FORMATS:
            raise NotHere(f"engine.dtype {dtype} is none of theirs; float32 and bfloat16 are")
        spec = DecoderSpec.from_config(read_json(model.path / "config.json"))
        if missing := _not_yet_native(spec):
            raise NotHere(f"models with {missing} are not supported")
        if not attention.supports(self._library, spec.head_dim, config.block_size):
            raise NotHere(
                f"heads of {spec.head_dim} in KV blocks of {config.block_size} tokens are not supported"
            )
        if config.kv_cache_dtype == "fp8":
            raise ValueError(
                "engine.kv_cache_dtype is fp8, which needs a GPU or engine.kernels torch; native CPU kernels have int8"
            )
        _check_cores(config.cpus)
        threads = config.num_threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)  # weights are quantized by as many threads as torch has
        # Whoever asks for float32 asks for exactness, not for four bits because the file has no more.
        exact = config.quantization == "auto" and dtype == "float32"
        quantization = "none" if exact else config.quantization
        self._experts, self._slots = experts, None if experts is None else experts.slots(spec.moe)
        packed = open_packed_model(
            model,
            spec,
            quantization,
            dtype,
            self._library,
            threads=threads,
            memory=config.weights_memory,
            all_experts=experts is None,
        )
        torch.set_num_threads(1)  # from here on torch computes nothing: its threads would be in the way
        self._weights = dtype if packed.scheme == "none" else packed.scheme
        self._pool = ThreadPool(self._library, threads, config.cpus)
        self._model, self._spec, self._config = packed.model, spec, config
        self._eos_token_ids = frozenset(model.eos_token_ids)
        kv_dtype = "int8" if config.kv_cache_dtype == "int8" else dtype
        self.layout = kv_layout(spec, config.block_size, kv_dtype, packed.fingerprint)

    def num_blocks(self) -> int:
        return configured_blocks(self._config, self.layout)

    def runner(self, num_blocks: int, share_kv: bool = False) -> NativeRunner:
        sampler = NativeSampler(self._library, self._spec.vocab_size, self._eos_token_ids)
        return NativeRunner(
            self._library,
            self._pool,
            self._model,
            sampler,
            self.layout,
            num_blocks,
            self._config,
            self._weights,
            share_kv,
            self._experts,
            self._slots,
        )


def _not_yet_native(spec: DecoderSpec) -> str | None:
    if spec.mla is not None:
        return "latent attention (MLA)"
    if spec.sinks:
        return "attention sinks"
    return None


def _no_tokens() -> StepArrays:
    none = np.empty(0, np.int32)
    return StepArrays(none, none, np.empty(0, np.int64), np.zeros(1, np.int32), none, none, none, none)


def _check_cores(cpus: list[int] | None) -> None:
    """Raises ValueError. Not held against this thread's own affinity: an engine before this one may have pinned it."""
    cores = os.cpu_count() or 1
    if cpus is not None and (max(cpus, default=0) >= cores or len(set(cpus)) < len(cpus)):
        raise ValueError(f"engine.cpus is {cpus}: it must list different cores from 0 to {cores - 1}")


class NativeRunner:
    device = torch.device("cpu")
    overlaps, captured = False, None

    def __init__(
        self,
        library: Library,
        pool: ThreadPool,
        model: PackedModel,
        sampler: NativeSampler,
        layout: KvLayout,
        num_blocks: int,
        config: EngineConfig,
        weights: str,
        share_kv: bool,
        experts: ExpertPlane | None = None,
        slots: int | None = None,
    ) -> None:
        """`experts`: it is equipped with those of the model, of which `slots` per layer have room here."""
        self.kernels, self.weights = library.variant, weights
        num_bytes = num_blocks * layout.block_bytes
        self.shared = SharedPages(num_bytes) if share_kv else None
        pages = huge_zeros(num_bytes) if self.shared is None else self.shared.array
        pages = pages.reshape(num_blocks, layout.block_bytes)
        self.kv_cache = torch.from_numpy(pages)
        kv = KvCache(
            pages.ctypes.data,
            _KV_TYPES[layout.dtype],
            num_blocks,
            layout.num_layers,
            layout.num_kv_heads,
            layout.block_size,
            layout.head_dim,
        )
        self.decoder = CpuDecoder(library, pool, model, kv, config.batch("cpu").num_tokens, slots)
        self._exchange = None if experts is None else self._spread(experts, config)
        self._sampler = sampler
        self._use_tiles = not config.deterministic
        self._logits = torch.empty((0, model.vocab))

    def watch_next(self) -> Callable[[], int]:
        number = self.decoder.steps_begun + 1
        return partial(self.decoder.progress.layers_done, number)

    def submit(self, step: StepInput) -> Ready:
        return Ready(self.run(step))

    def run(self, step: StepInput) -> list[Sampled]:
        """One entry for each of `step.samples`."""
        logits = self.logits(step.arrays)
        if not step.samples:
            return []
        return self._sampler(logits, step.samples)

    def logits(self, arrays: StepArrays) -> torch.Tensor:
        """Compute a step; float32 [rows, vocab], valid until the next step."""
        rows = len(arrays.rows)
        if rows > len(self._logits):
            self._logits = torch.empty((rows, self._logits.shape[1]))
        self.decoder.step(arrays, self._logits.numpy(), use_tiles=self._use_tiles, exchange=self._exchange)
        return self._logits[:rows]

    def _spread(self, plane: ExpertPlane, config: EngineConfig) -> NativeExperts:
        table, hidden = self.decoder.experts, self.decoder.model.hidden
        experts = NativeExperts(table, hidden)
        experts.idle_step = partial(self.logits, _no_tokens())
        bf16 = table.logical(0, 0).gate_up.format == Format.BF16
        num_layers, num_experts = table.routed.shape
        top_k = table.structs[0].routing.top_k
        most = config.batch("cpu").num_tokens
        shape = Shape(hidden, "bfloat16" if bf16 else "float32", "float32", most, top_k)
        model = ExpertModel(num_layers, num_experts, shape)
        experts.ranks = plane.equip(model, table.slots, experts, self.device)
        return experts

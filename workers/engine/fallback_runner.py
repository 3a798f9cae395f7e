"""Steps by transformers' modules over our KV cache, for architectures that the decoder cannot express."""

from __future__ import annotations

import logging

import torch

from workers.config import EngineConfig
from workers.engine.backend import choose_dtype
from workers.engine.fallback_check import check_chunks
from workers.engine.pending import Ready
from workers.engine.plan import Sampled
from workers.engine.runner import StepTensors, shared_pages
from workers.engine.sampler import Sampler
from workers.engine.step_input import StepInput
from workers.experts.plane import ExpertPlane
from workers.models.catalog import PreparedModel
from workers.models.fallback import FallbackModel, load_fallback
from workers.models.fallback_spec import FallbackSpec
from workers.models.kv_cache import wire_of
from workers.protocol.messages import KvLayout

logger = logging.getLogger(__name__)


class FallbackBackend:
    def __init__(
        self,
        config: EngineConfig,
        model: PreparedModel,
        spec: FallbackSpec,
        device: torch.device,
        experts: ExpertPlane | None = None,
    ) -> None:
        """Raises ModelError, and ValueError for a setting that this cannot heed."""
        if setting := _not_heeded(config, experts):
            raise ValueError(
                f"{setting} cannot be had: {spec.architecture} runs through transformers, {spec.reason}"
            )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        wire = wire_of(config.kv_cache_dtype)
        self._model = load_fallback(model.path, spec, choose_dtype(config.dtype), device, kv_wire=wire)
        check_chunks(self._model)
        logger.warning(
            "%s runs through transformers, slower than an architecture that we know: %s",
            spec.class_name,
            spec.reason,
        )
        if spec.named_position is not None:
            logger.warning(
                "longrope turns every key anew beyond %d tokens, cached ones too: the context ends there, not at %d",
                spec.max_position,
                spec.named_position,
            )
        self._sampler = Sampler(frozenset(model.eos_token_ids))
        self.layout = KvLayout(
            num_layers=self._model.num_layers,
            num_kv_heads=self._model.num_kv_heads,
            head_dim=self._model.head_dim,
            block_size=config.block_size,
            dtype=wire or str(self._model.dtype).removeprefix("torch."),
            model_fingerprint=model.fingerprint,
        )

    def runner(self, num_blocks: int, share_kv: bool = False) -> FallbackRunner:
        return FallbackRunner(self._model, self._sampler, self.layout, num_blocks, share_kv)


def _not_heeded(config: EngineConfig, experts: ExpertPlane | None) -> str | None:
    """The setting that transformers' modules cannot have, if there is one."""
    if config.kernels not in ("auto", "torch"):
        return f"engine.kernels {config.kernels}"
    if config.quantization not in ("auto", "none"):
        return f"engine.quantization {config.quantization}"
    return "a pool of expert-parallel ranks" if experts is not None else None


class FallbackRunner:
    kernels = "transformers"
    overlaps = False

    def __init__(
        self,
        model: FallbackModel,
        sampler: Sampler,
        layout: KvLayout,
        num_blocks: int,
        share_kv: bool = False,
    ) -> None:
        self.device = model.device
        self.weights = str(model.dtype).removeprefix("torch.")
        self._model, self._sampler, self._block_size = model, sampler, layout.block_size
        self.shared = shared_pages(num_blocks * layout.block_bytes, model.device) if share_kv else None
        pages = None if self.shared is None else self.shared.tensor
        self.kv_cache = model.new_kv_cache(num_blocks, layout.block_size, pages)

    def watch_next(self) -> None:
        return None

    def submit(self, step: StepInput) -> Ready:
        return Ready(self.run(step))

    @torch.inference_mode()
    def run(self, step: StepInput) -> list[Sampled]:
        """One entry for each of `step.samples`."""
        inputs = StepTensors.of(step.arrays, self._block_size, self.device)
        found = self._model.forward(
            inputs.token_ids, inputs.positions, self.kv_cache, inputs.attention, inputs.rows
        )
        return self._sampler(self._model.logits(found), step.samples) if step.samples else []

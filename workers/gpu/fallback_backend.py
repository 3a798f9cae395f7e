"""Architectures that the decoder cannot express: transformers' modules over our KV cache, by the same runner."""

from __future__ import annotations

import logging

import torch

from workers.config import EngineConfig
from workers.engine.backend import choose_dtype
from workers.engine.fallback_check import check_chunks
from workers.experts.plane import ExpertPlane
from workers.gpu.backend import DeviceBackend
from workers.gpu.device import CudaDevice, device_for
from workers.gpu.graphs import CudaGraphs
from workers.gpu.memory import MemoryAtStart, memory_for
from workers.models.catalog import PreparedModel
from workers.models.choose_ops import choose_ops
from workers.models.fallback import FallbackModel, load_fallback
from workers.models.fallback_capture import first_wait, trial_pass
from workers.models.fallback_spec import FallbackSpec
from workers.models.kv_cache import wire_of
from workers.protocol.messages import KvLayout

logger = logging.getLogger(__name__)


def open_fallback(
    config: EngineConfig,
    model: PreparedModel,
    spec: FallbackSpec,
    device: torch.device,
    experts: ExpertPlane | None = None,
) -> DeviceBackend:
    """Raises ModelError, and ValueError for a setting that this cannot heed."""
    if setting := _not_heeded(config, experts):
        raise ValueError(
            f"{setting} cannot be had: {spec.architecture} runs through transformers, {spec.reason}"
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    wire, dtype = wire_of(config.kv_cache_dtype), choose_dtype(config.dtype)
    ops, start = choose_ops(config.kernels, device, dtype), MemoryAtStart.of(device)
    with memory_for(f"the weights in {dtype}: {start}", "use a smaller model"):
        loaded = load_fallback(model.path, spec, dtype, device, ops, kv_wire=wire)
    check_chunks(loaded)
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
    weights = str(loaded.dtype).removeprefix("torch.")
    layout = KvLayout(
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        block_size=config.block_size,
        dtype=wire or weights,
        model_fingerprint=model.fingerprint,
    )
    captured = device.type == "cuda" and config.graphs != "none" and _can_be_captured(loaded)
    return DeviceBackend(
        config, model, loaded, layout, weights=weights, kernels="transformers", start=start, graphs=captured
    )


def _can_be_captured(model: FallbackModel) -> bool:
    """Others' modules may ask the device how many tokens there are, or do what no capture allows: one is tried."""
    wait, device = first_wait(model), device_for(model.device)
    obstacle = None if wait is None else f"{wait} waits for the device"
    if wait is None and isinstance(device, CudaDevice):
        torch.cuda.synchronize(device.device)  # the weights come from the default queue
        try:
            with torch.inference_mode():
                CudaGraphs(device).capture(trial_pass(model))
        except RuntimeError as error:
            obstacle = str(error)
    if obstacle is not None:
        logger.warning("%s runs without CUDA graphs: %s", model.spec.class_name, obstacle)
    return obstacle is None


def _not_heeded(config: EngineConfig, experts: ExpertPlane | None) -> str | None:
    """The setting that transformers' modules cannot have, if there is one."""
    if config.kernels not in ("auto", "torch", "triton"):
        return f"engine.kernels {config.kernels}"
    if config.quantization not in ("auto", "none"):
        return f"engine.quantization {config.quantization}"
    return "a pool of expert-parallel ranks" if experts is not None else None

"""A decoder on a torch device: the oracle and what is left on a CPU without a compiler, and what runs on every GPU."""

from __future__ import annotations

import torch

from workers.config import EngineConfig
from workers.engine.backend import choose_dtype, kv_layout
from workers.experts.exchange import Shape
from workers.experts.group import ExpertModel
from workers.experts.plane import ExpertPlane
from workers.experts.torch_experts import TorchExperts
from workers.gpu.backend import DeviceBackend
from workers.gpu.memory import MemoryAtStart, memory_for
from workers.models.catalog import PreparedModel
from workers.models.checkpoint import read_json
from workers.models.choose_ops import choose_ops
from workers.models.decoder import load_decoder
from workers.models.kv_cache import wire_of
from workers.models.moe import MakeExperts, local_experts
from workers.models.scheme import FLOATS, choose_scheme, weights_fingerprint
from workers.models.spec import DecoderSpec
from workers.parallel.collectives import ALONE, Parallel


def open_decoder(
    config: EngineConfig,
    model: PreparedModel,
    device: torch.device,
    experts: ExpertPlane | None = None,
    parallel: Parallel = ALONE,
) -> DeviceBackend:
    """As workers.engine.backend.open_backend."""
    dtype, wire = choose_dtype(config.dtype), wire_of(config.kv_cache_dtype)
    ops = choose_ops(config.kernels, device, dtype)
    if (setting := only_native(config)) and ops.name == "torch":
        raise ValueError(
            f"{setting} needs a GPU or the native CPU kernels, this engine runs on torch; use auto"
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    start, scheme = MemoryAtStart.of(device), choose_scheme(config.quantization, model.path)
    # Eager torch widens what is stored in fewer bits; and whoever asks for float32 asks for exactness.
    if ops.name == "torch" or (config.quantization == "auto" and dtype == torch.float32):
        scheme = FLOATS
    weights = _name(dtype) if scheme == FLOATS else scheme.name
    make = local_experts if experts is None else _spread(experts, config, model, dtype, device)
    with memory_for(
        f"the weights in {weights}: {start}",
        "use a smaller or a quantized model, or share it out (tensor_parallel)",
    ):
        decoder = load_decoder(
            model.path,
            dtype,
            device,
            model.max_model_len,
            make,
            ops,
            kv_wire=wire,
            parallel=parallel,
            scheme=scheme,
            keep_quantized=scheme != FLOATS,
        )
    fingerprint = weights_fingerprint(model.fingerprint, scheme)
    layout = kv_layout(decoder.spec, config.block_size, wire or _name(dtype), fingerprint)
    return DeviceBackend(
        config,
        model,
        decoder,
        layout,
        weights=weights,
        spread=experts is not None,
        start=start,
        parallel=parallel,
    )


def only_native(config: EngineConfig) -> str | None:
    """The setting that eager torch cannot heed, if there is one."""
    if config.quantization in ("int8", "int4", "fp8"):
        return f"engine.quantization {config.quantization}"
    return None


def _spread(
    plane: ExpertPlane, config: EngineConfig, model: PreparedModel, dtype: torch.dtype, device: torch.device
) -> MakeExperts:
    """Experts that the plane's group places. Raises ValueError."""
    spec = DecoderSpec.from_config(read_json(model.path / "config.json"))
    slots = plane.slots(spec.moe)
    assert spec.moe is not None
    experts = TorchExperts(spec.moe, spec.hidden_size, dtype, device, slots)
    name, most = _name(dtype), config.batch(device.type).num_tokens
    shape = Shape(spec.hidden_size, name, name, most, spec.moe.top_k)
    held = ExpertModel(sum(spec.moe.layers), spec.moe.num_experts, shape)
    experts.ranks = plane.equip(held, slots, experts, device)
    return experts.make


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

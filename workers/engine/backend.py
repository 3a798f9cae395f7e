"""What carries out the steps: torch, the native kernels of this CPU, or transformers. Chosen once, at the start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from workers.config import EngineConfig
from workers.device_memory import DevicePages
from workers.engine.pending import Pending
from workers.engine.plan import Sampled
from workers.engine.runner import TorchRunner
from workers.engine.step_input import StepInput
from workers.experts.exchange import Shape
from workers.experts.group import ExpertModel
from workers.experts.plane import ExpertPlane
from workers.experts.torch_experts import TorchExperts
from workers.models.catalog import PreparedModel
from workers.models.checkpoint import read_json
from workers.models.errors import NotHere
from workers.models.fallback_spec import FallbackSpec, read_spec
from workers.models.kv_cache import wire_of
from workers.models.moe import MakeExperts, local_experts
from workers.models.spec import DecoderSpec
from workers.parallel.collectives import ALONE, Parallel
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages

logger = logging.getLogger(__name__)


LayersDone = Callable[[], int]  # layers whose keys and values of a step are in the cache


class Runner(Protocol):
    """A model with its KV cache. Steps run one after another, in the order of submission, called from one thread."""

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> str:
        """What computes: "torch", "transformers", or the variant of the native library."""

    @property
    def weights(self) -> str:
        """Their format: a dtype, or the name of a quantization scheme."""

    @property
    def kv_cache(self) -> torch.Tensor:
        """[num_blocks, ...], each block contiguous, in the layout's bytes."""

    @property
    def shared(self) -> SharedPages | DevicePages | None:
        """The pages of the KV cache, when other processes can map or open them."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be submitted before the one submitted last was waited for: two at most run at a time."""

    def watch_next(self) -> LayersDone | None:
        """Of the step that is run next, to be asked from any thread. None: nobody can tell before its end."""

    def submit(self, step: StepInput) -> Pending:
        """Begin a step; all that hangs on the requests' tokens is read before it returns.

        With experts on other ranks it, or `wait`, raises GroupBroken.
        """

    def run(self, step: StepInput) -> list[Sampled]:
        """`submit(step).wait()`, with no other step running."""


class Backend(Protocol):
    """A loaded model, before the size of its KV cache is known."""

    @property
    def layout(self) -> KvLayout: ...

    def runner(self, num_blocks: int, share_kv: bool = False) -> Runner:
        """Called once. `share_kv`: keep the KV cache in memory that other processes can map or open."""


def open_backend(
    config: EngineConfig,
    model: PreparedModel,
    experts: ExpertPlane | None = None,
    parallel: Parallel = ALONE,
) -> Backend:
    """Load the weights; routed experts are left to `experts`, which is equipped, where they are spread over ranks.

    With tensor-parallel ranks this one's part; the backend's layout is the whole model's.

    Raises ModelError, and ValueError for a setting that cannot be had here.
    """
    from workers.engine.native_runner import NativeBackend

    device = choose_device(config.device)
    spec = read_spec(model.path)
    if isinstance(spec, FallbackSpec):
        from workers.engine.fallback_runner import FallbackBackend

        if not parallel.shard.whole:
            raise ValueError(
                f"tensor_parallel is {parallel.shard.size}: {spec.architecture} runs through transformers, whole"
            )
        return FallbackBackend(config, model, spec, device, experts)
    if not parallel.shard.whole and config.kernels not in ("auto", "torch"):
        raise ValueError(
            f"engine.kernels is {config.kernels}, tensor_parallel is {parallel.shard.size}: its ranks run on torch; "
            "use auto"
        )
    if device.type != "cpu" or config.kernels == "torch" or not parallel.shard.whole:
        return TorchBackend(config, model, device, experts, parallel)
    try:
        return NativeBackend(config, model, experts)
    except NotHere as error:
        if config.kernels != "auto":
            raise ValueError(f"engine.kernels is {config.kernels}: {error}") from error
        if setting := _only_native(config):
            raise ValueError(f"{setting} needs the native CPU kernels: {error}") from error
        logger.warning(
            "native CPU kernels are not used, torch takes their place, several times slower: %s", error
        )
        return TorchBackend(config, model, device, experts)


class TorchBackend:
    """Eager torch on any device: the oracle, the GPU path, and what is left on a CPU without a compiler."""

    def __init__(
        self,
        config: EngineConfig,
        model: PreparedModel,
        device: torch.device,
        experts: ExpertPlane | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        from workers.engine.sampler import Sampler
        from workers.models.decoder import load_decoder

        if setting := _only_native(config):
            raise ValueError(f"{setting} needs the native CPU kernels, this engine runs on torch; use auto")
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        dtype = choose_dtype(config.dtype)
        make = local_experts if experts is None else _spread(experts, config, model, dtype, device)
        wire = wire_of(config.kv_cache_dtype)
        self._decoder = load_decoder(
            model.path, dtype, device, model.max_model_len, make, kv_wire=wire, parallel=parallel
        )
        self._sampler = Sampler(frozenset(model.eos_token_ids))
        stored = wire or _name(dtype)
        self.layout = kv_layout(self._decoder.spec, config.block_size, stored, model.fingerprint)

    def runner(self, num_blocks: int, share_kv: bool = False) -> Runner:
        return TorchRunner(self._decoder, self._sampler, self.layout, num_blocks, share_kv)


def _spread(
    plane: ExpertPlane, config: EngineConfig, model: PreparedModel, dtype: torch.dtype, device: torch.device
) -> MakeExperts:
    """Experts that the plane's group places. Raises ValueError."""
    spec = DecoderSpec.from_config(read_json(model.path / "config.json"))
    slots = plane.slots(spec.moe)
    assert spec.moe is not None
    experts = TorchExperts(spec.moe, spec.hidden_size, dtype, device, slots)
    name, most = _name(dtype), config.max_num_batched_tokens
    shape = Shape(spec.hidden_size, name, name, most, spec.moe.top_k)
    held = ExpertModel(sum(spec.moe.layers), spec.moe.num_experts, shape)
    experts.ranks = plane.equip(held, slots, experts, device)
    return experts.make


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _only_native(config: EngineConfig) -> str | None:
    """The setting that torch cannot heed, if there is one."""
    if config.quantization in ("int8", "int4"):
        return f"engine.quantization {config.quantization}"
    return None


def kv_layout(spec: DecoderSpec, block_size: int, dtype: str, fingerprint: str) -> KvLayout:
    """Raises ValueError for a block size or dtype that the model's cache cannot have."""
    if dtype in ("int8", "fp8") and spec.head_dim % 4:
        raise ValueError(
            f"engine.kv_cache_dtype is {dtype}: heads must be of a multiple of 4 values, this model's are of {spec.head_dim}"
        )
    if spec.kv_planes == 1 and block_size % 2:
        raise ValueError(
            f"engine.block_size is {block_size}; for a model with latent attention it must be even"
        )
    return KvLayout(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype,
        model_fingerprint=fingerprint,
        planes=spec.kv_planes,
    )


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device is cuda, but torch finds no GPU here; use cpu or auto")
    return torch.device(device)


def choose_dtype(dtype: str) -> torch.dtype:
    chosen = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert isinstance(chosen, torch.dtype)
    return chosen

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
from workers.engine.step_input import StepInput
from workers.experts.plane import ExpertPlane
from workers.gpu.graphs import Captured
from workers.models.catalog import PreparedModel
from workers.models.errors import NotHere
from workers.models.fallback_spec import FallbackSpec, read_spec
from workers.models.spec import DecoderSpec
from workers.parallel.collectives import ALONE, Parallel
from workers.protocol.messages import KvLayout
from workers.shared_memory import SharedPages

logger = logging.getLogger(__name__)

_CPU_KV_BYTES = 512 * 2**20  # where nothing is configured


LayersDone = Callable[[], int]  # layers whose keys and values of a step are in the cache


class Runner(Protocol):
    """A model with its KV cache. Steps run one after another, in the order of submission, called from one thread."""

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> str:
        """What computes: "torch", "triton", "transformers", or the variant of the native library."""

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
    def captured(self) -> Captured | None:
        """What of its steps is launched whole, as CUDA graphs; None where that cannot be."""

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

    def num_blocks(self) -> int:
        """Of its KV cache: as configured, or as many as there is memory for. Called before `runner`.

        Raises ValueError, with the sizes, where that is none.
        """

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
    from workers.gpu.decoder_backend import only_native, open_decoder

    device = choose_device(config.device)
    if config.quantization == "fp8" and device.type == "cpu":
        raise ValueError("engine.quantization is fp8, which needs a GPU; on a CPU use int8 or int4")
    spec = read_spec(model.path)
    if isinstance(spec, FallbackSpec):
        from workers.gpu.fallback_backend import open_fallback

        if not parallel.shard.whole:
            raise ValueError(
                f"tensor_parallel is {parallel.shard.size}: {spec.architecture} runs through transformers, whole"
            )
        return open_fallback(config, model, spec, device, experts)
    if not parallel.shard.whole and config.kernels not in ("auto", "torch", "triton"):
        raise ValueError(
            f"engine.kernels is {config.kernels}, tensor_parallel is {parallel.shard.size}: its ranks run on torch; "
            "use auto"
        )
    if device.type != "cpu" or config.kernels in ("torch", "triton") or not parallel.shard.whole:
        return open_decoder(config, model, device, experts, parallel)
    try:
        return NativeBackend(config, model, experts)
    except NotHere as error:
        if config.kernels != "auto":
            raise ValueError(f"engine.kernels is {config.kernels}: {error}") from error
        if setting := only_native(config):
            raise ValueError(f"{setting} needs the native CPU kernels: {error}") from error
        logger.warning(
            "native CPU kernels are not used, torch takes their place, several times slower: %s", error
        )
        return open_decoder(config, model, device, experts)


def configured_blocks(config: EngineConfig, layout: KvLayout) -> int:
    """Raises ValueError where there is no memory for one."""
    if config.num_blocks:
        return config.num_blocks
    num_bytes = int(config.kv_cache_memory or _CPU_KV_BYTES)
    if num_bytes < layout.block_bytes:
        raise ValueError(
            f"engine.kv_cache_memory is {num_bytes} bytes, one KV block of this model has {layout.block_bytes}"
        )
    return num_bytes // layout.block_bytes


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

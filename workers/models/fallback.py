"""Models that `DecoderSpec` cannot express: transformers' modules over our paged KV cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference_relayout import Wire
from workers.models.errors import ModelError
from workers.models.fallback_attention import (
    NAME,
    TRIAL_NAME,
    Layer,
    Paged,
    Slot,
    Step,
    Trial,
    install,
    register,
)
from workers.models.fallback_spec import UNREADABLE, FallbackSpec
from workers.models.kv_cache import new_kv_cache
from workers.models.ops import Ops, torch_ops

logger = logging.getLogger(__name__)


def load_fallback(
    path: Path,
    spec: FallbackSpec,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops | None = None,
    kv_wire: Wire | None = None,
) -> FallbackModel:
    """Read a prepared directory. Raises ModelError when it cannot be read, or caches what pages do not hold."""
    register()
    module = _load(path, spec, dtype).to(device).eval()
    slot = install(module)
    layers = _try_layers(module, slot)
    return FallbackModel(module, spec, slot, layers, dtype, device, ops or torch_ops(), kv_wire)


class FallbackModel:
    """A causal language model of transformers, called as a `Decoder` is. The KV cache belongs to the caller.

    Not thread-safe.
    """

    def __init__(
        self,
        module: Any,
        spec: FallbackSpec,
        slot: Slot,
        layers: Mapping[nn.Module, Layer],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        kv_wire: Wire | None,
    ) -> None:
        """`layers`: as `Trial` has seen them, with equal numbers of KV heads. `kv_wire`: as in Decoder."""
        self.ops, self.kv_wire = ops, kv_wire
        self.module, self.spec, self.dtype, self.device = module, spec, dtype, device
        self._slot, self.layers = slot, layers
        self.num_layers = len(layers)
        self.num_kv_heads = next(iter(layers.values())).num_kv_heads
        self.head_dim = max(max(layer.key_dim, layer.value_dim) for layer in layers.values())

    def new_kv_cache(self, num_blocks: int, block_size: int, pages: Tensor | None = None) -> Tensor:
        """A zeroed cache, see kernels/paged_kv.py; in `pages`, uint8 zeros, when given."""
        shape = (num_blocks, self.num_layers, 2, self.num_kv_heads, block_size, self.head_dim)
        return new_kv_cache(shape, self.dtype, self.kv_wire, self.device, pages)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: Tensor,
        step: AttentionStep,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv_cache`. What `logits` takes, of `rows` or all tokens.

        token_ids, positions: int64 [T], positions below spec.max_position; rows: int64 [R]. It is logits [R, vocab] in the
        model's dtype already: a family's caps and scales of logits are part of transformers' own pass.
        """
        cache = PagedKv.held_in(kv_cache, self.head_dim, self.kv_wire)
        attention = self.ops.attention(cache, step, None, positions)
        paged = Step(self.layers, attention, self.head_dim, self.dtype)
        return self.run(paged, token_ids, positions, 0 if rows is None else rows)

    def run(self, paged: Paged, token_ids: Tensor, positions: Tensor, rows: Tensor | int) -> Tensor:
        """A pass in which `paged` attends: what `logits` takes, of `rows`; 0: of all tokens."""
        with self._slot.holding(paged):
            return _forward(self.module, token_ids, positions, rows)

    @torch.inference_mode()
    def logits(self, found: Tensor) -> Tensor:
        """What `forward` gave, [R, vocab], in float32."""
        return found.float()

    @torch.inference_mode()
    def own_logits(self, token_ids: Tensor) -> Tensor:
        """What the model gives of one sequence [T] in one piece, without our attention: float32 [T, vocab]."""
        positions = torch.arange(len(token_ids), device=self.device)
        self.module.set_attn_implementation("eager")  # which heeds every mask and cap
        try:
            return _forward(self.module, token_ids, positions, 0).float()
        finally:
            self.module.set_attn_implementation(NAME)


def _forward(module: Any, token_ids: Tensor, positions: Tensor, rows: Tensor | int) -> Tensor:
    """Logits [R, vocab] of one flattened batch, caps and scales of the model included. rows 0: of all tokens."""
    out = module(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=rows,
        return_dict=True,
    )
    logits = out.logits[0]
    assert isinstance(logits, Tensor)
    return logits


def _load(path: Path, spec: FallbackSpec, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # a worker's log is no terminal
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=TRIAL_NAME,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise ModelError(f"transformers cannot load {path} as {spec.class_name}: {error}") from error
    module, report = loaded
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:3])
        raise ModelError(f"{path} lacks {len(missing)} weights of {spec.class_name}, such as {named}")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("%s has no use for %d tensors, such as %s", spec.class_name, len(unused), unused[0])
    return module


@torch.inference_mode()
def _try_layers(module: Any, slot: Slot) -> dict[nn.Module, Layer]:
    """What the layers cache, by a pass of a few tokens through the model. Raises ModelError."""
    trial, name = Trial(), type(module).__name__
    positions = torch.arange(8, device=module.device)
    try:
        with slot.holding(trial):
            logits = _forward(module, positions + 1, positions, positions[-2:])
    except (*UNREADABLE, ModelError) as error:
        raise ModelError(f"{name} cannot run over a paged KV cache: {error}") from error
    if not trial.layers:
        raise ModelError(f"{name} does no attention through transformers' attention interface")
    heads = sorted({layer.num_kv_heads for layer in trial.layers.values()})
    if len(heads) > 1:
        raise ModelError(f"layers of {name} have different numbers of KV heads: {heads}")
    vocab_size = module.config.get_text_config(decoder=True).vocab_size
    if logits.shape != (2, vocab_size):
        raise ModelError(f"{name} gives logits of shape {list(logits.shape)}, not [2, {vocab_size}]")
    module.set_attn_implementation(NAME)
    return trial.layers

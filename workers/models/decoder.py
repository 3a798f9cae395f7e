"""One decoder for every architecture a `DecoderSpec` can describe.

Token ids in, hidden states and logits out. A layer is built with the callables it needs, so the loop asks no flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.reference import AttentionBatch, AttentionPlan, Scratch, rms_norm
from workers.models.attention_layer import AttentionLayer, GroupedAttentionLayer
from workers.models.checkpoint import read_json
from workers.models.head import Head
from workers.models.layer_weights import LatentAttention, SparseMlp
from workers.models.mla import LatentAttentionLayer
from workers.models.moe import DenseMlp, LocalExperts, MakeExperts, SparseLayer, local_experts
from workers.models.rope import RopeTable
from workers.models.spec import DecoderSpec
from workers.models.weights import DecoderWeights, LayerWeights, load_weights

MlpLayer = Callable[[Tensor], Tensor]  # [T, hidden], normed -> [T, hidden], float32 where it sums experts


def load_decoder(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
    make_experts: MakeExperts = local_experts,
) -> Decoder:
    """Read a model directory (config.json + safetensors). Raises ModelError."""
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    return Decoder(spec, load_weights(path, spec, dtype, device), max_positions, make_experts)


class Decoder:
    """The model's weights and its forward pass. The KV cache belongs to the caller. Not thread-safe."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        max_positions: int | None = None,
        make_experts: MakeExperts = local_experts,
    ) -> None:
        """`max_positions` in tokens bounds the positions; None: the model's own. Reads `weights.layers` once."""
        self.spec = spec
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.max_positions = max_positions or spec.max_position
        self._embedding = weights.embedding
        self._rope = RopeTable(spec.rope, spec.rope_dim, self.max_positions, self.dtype, self.device)
        self._layers = _layers(spec, weights.layers, make_experts)
        self._final_norm = weights.final_norm.float()
        self._head = Head(weights.head)
        self._scratch = Scratch()

    def new_kv_cache(self, num_blocks: int, block_size: int, pages: Tensor | None = None) -> Tensor:
        """A zeroed cache in canonical layout, see `kernels.reference`; in `pages`, uint8 zeros, when given."""
        spec = self.spec
        shape = (num_blocks, spec.num_layers, spec.kv_planes, spec.num_kv_heads, block_size, spec.head_dim)
        return zeroed_kv_cache(shape, self.dtype, self.device, pages)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: Tensor,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv_cache`.

        token_ids, positions: int64 [T], positions below max_positions. Returns the hidden states after the final norm,
        [T, hidden], or of `rows` (int64 [R]) only, [R, hidden]. With `rows` the last layer's MLP runs on them alone.
        """
        attention = AttentionPlan(batch, kv_cache, self._scratch)
        cos, signed_sin = self._rope.at(positions)
        # The residual stream is float32: its sums over all layers are where 16 bits lose most.
        x = self._embedding.index_select(0, token_ids).float()
        for layer in self._layers[:-1]:
            x = layer(x, cos, signed_sin, attention, None)
        x = self._layers[-1](x, cos, signed_sin, attention, rows)
        return rms_norm(x, self._final_norm, self.spec.norm_eps).to(self.dtype)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] after the final norm -> float32 [R, vocab]."""
        return self._head(hidden)

    def expert_counts(self) -> Tensor:
        """How many tokens each expert was given so far: int64 [layers with experts, experts].

        Of the last layer those count that went on to the head. Rows of experts that are not all here are left out:
        who made them counts.
        """
        experts = [layer.mlp.experts for layer in self._layers if isinstance(layer.mlp, SparseLayer)]
        counts = [one.counts for one in experts if isinstance(one, LocalExperts)]
        return torch.stack(counts) if counts else torch.zeros((0, 0), dtype=torch.int64)


class _Layer:
    def __init__(
        self, spec: DecoderSpec, weights: LayerWeights, attention: AttentionLayer, mlp: MlpLayer
    ) -> None:
        self.mlp = mlp
        self._attention = attention
        self._eps = spec.norm_eps
        self._input_norm, self._mlp_norm = weights.input_norm.float(), weights.mlp_norm.float()
        self._dtype = weights.input_norm.dtype

    def __call__(
        self, x: Tensor, cos: Tensor, signed_sin: Tensor, attention: AttentionPlan, rows: Tensor | None
    ) -> Tensor:
        """x float32 [T, hidden] -> [T, hidden], or the given rows of it."""
        seen = self._attention.attend(self._normed(x, self._input_norm), cos, signed_sin, attention)
        if rows is not None:
            x, seen = x.index_select(0, rows), seen.index_select(0, rows)
        x = x + self._attention.output(seen)
        return x + self.mlp(self._normed(x, self._mlp_norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps).to(self._dtype)


def _layers(spec: DecoderSpec, weights: Iterable[LayerWeights], make_experts: MakeExperts) -> list[_Layer]:
    layers, sparse = [], 0
    for index, layer in enumerate(weights):
        attention: AttentionLayer
        if isinstance(layer.attention, LatentAttention):
            attention = LatentAttentionLayer(spec, index, layer.attention)
        else:
            attention = GroupedAttentionLayer(spec, index, layer.attention)
        mlp: MlpLayer
        if isinstance(layer.mlp, SparseMlp):
            assert spec.moe is not None, f"layer {index} of {spec.architecture} has experts"
            mlp = SparseLayer(spec.moe, layer.mlp, make_experts(sparse, spec, layer.mlp))
            sparse += 1
        else:
            mlp = DenseMlp(layer.mlp)
        layers.append(_Layer(spec, layer, attention, mlp))
    return layers


def zeroed_kv_cache(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pages: Tensor | None
) -> Tensor:
    """In `pages`, uint8 zeros, when given. Not garbage, because padding is read and masked, and 0 * NaN is still NaN.

    On a CPU the pages come from the kernel as zeros and cost no memory before a block is used: torch.zeros would
    write all of them at once.
    """
    if pages is not None:
        return pages.view(dtype).view(shape)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    own = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(own).view(dtype).view(shape)

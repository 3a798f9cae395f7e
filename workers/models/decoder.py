"""One decoder for every architecture a `DecoderSpec` can describe.

Token ids in, hidden states and logits out. A layer is built with the callables it needs, so the loop asks no flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference_relayout import Wire
from workers.models.attention_layer import AttentionLayer, GroupedAttentionLayer
from workers.models.checkpoint import read_json
from workers.models.embedding import Embedding
from workers.models.head import Head
from workers.models.kv_cache import new_kv_cache
from workers.models.layer_weights import LatentAttention, SparseMlp
from workers.models.mla import LatentAttentionLayer
from workers.models.moe import DenseMlp, LocalExperts, MakeExperts, SparseLayer, local_experts
from workers.models.ops import Attention, Ops, torch_ops
from workers.models.rope import RopeTable
from workers.models.scheme import FLOATS, Scheme
from workers.models.sharding import sharded
from workers.models.spec import DecoderSpec
from workers.models.weights import DecoderWeights, LayerWeights, load_weights
from workers.parallel.collectives import ALONE, Parallel

# (x [T, hidden], normed; slots int64 [T], below 0: a row that fills up) -> [T, hidden], float32 where it sums experts
MlpLayer = Callable[[Tensor, Tensor], Tensor]


def load_decoder(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
    make_experts: MakeExperts = local_experts,
    ops: Ops | None = None,
    kv_wire: Wire | None = None,
    parallel: Parallel = ALONE,
    scheme: Scheme = FLOATS,
    keep_quantized: bool = False,
) -> Decoder:
    """Read a model directory (config.json + safetensors). `keep_quantized`: see load_weights. Raises ModelError."""
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    weights = load_weights(
        path, spec, dtype, device, scheme, shard=parallel.shard, keep_quantized=keep_quantized
    )
    return Decoder(spec, weights, max_positions, make_experts, ops, kv_wire, parallel)


class Decoder:
    """The model's weights and its forward pass. The KV cache belongs to the caller. Not thread-safe."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        max_positions: int | None = None,
        make_experts: MakeExperts = local_experts,
        ops: Ops | None = None,
        kv_wire: Wire | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        """`max_positions` in tokens bounds the positions; None: the model's own. `ops`: None for eager torch. `kv_wire`:
        the form of the KV cache; None: floats of the weights' dtype.

        `spec` is the whole model's, `weights`, read once, what this rank of `parallel` has of it.
        """
        self.ops = ops or torch_ops()
        self.spec, self.kv_wire = spec, kv_wire
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.max_positions = max_positions or spec.max_position
        self.shard = parallel.shard
        self._local = local = sharded(spec, parallel.shard)
        self._embed = Embedding(weights.embedding, spec.vocab_size, parallel)
        self._rope = RopeTable(spec.rope, spec.rope_dim, self.max_positions, self.dtype, self.device)
        self._layers = _layers(local, weights.layers, make_experts, self.ops, parallel)
        self._final_norm = weights.final_norm.float()
        self._head = Head(weights.head, spec.vocab_size, parallel, self.ops)

    def new_kv_cache(self, num_blocks: int, block_size: int, pages: Tensor | None = None) -> Tensor:
        """A zeroed cache of this rank's KV heads, see kernels/paged_kv.py; in `pages`, uint8 zeros, when given."""
        spec = self._local
        shape = (num_blocks, spec.num_layers, spec.kv_planes, spec.num_kv_heads, block_size, spec.head_dim)
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
        """Run one step and write its keys and values into `kv_cache`.

        token_ids, positions: int64 [T], positions below max_positions. Returns the hidden states after the final norm,
        [T, hidden], or of `rows` (int64 [R]) only, [R, hidden]. With `rows` the last layer's MLP runs on them alone.
        """
        cache = PagedKv.held_in(kv_cache, self.spec.head_dim, self.kv_wire)
        attention = self.ops.attention(cache, step, self._rope, positions)
        x = self._embed(token_ids)
        added: Tensor | None = None  # what a layer's MLP gives is added by the norm that follows
        for layer in self._layers[:-1]:
            x, added = layer(x, added, attention, step.slots, None)
        x, added = self._layers[-1](x, added, attention, step.slots, rows)
        return self.ops.add_rms_norm(x, added, self._final_norm, self.spec.norm_eps, self.dtype)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] after the final norm -> float32 [R, vocab], of the whole vocabulary on every rank."""
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
        self,
        spec: DecoderSpec,
        weights: LayerWeights,
        attention: AttentionLayer,
        mlp: MlpLayer,
        ops: Ops,
        parallel: Parallel,
    ) -> None:
        self.mlp = mlp
        self._sum = parallel.all_reduce
        self._attention = attention
        self._norm, self._eps, self._dtype = ops.add_rms_norm, spec.norm_eps, weights.input_norm.dtype
        self._input_norm, self._mlp_norm = weights.input_norm.float(), weights.mlp_norm.float()

    def __call__(
        self, x: Tensor, added: Tensor | None, attention: Attention, slots: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x float32 [T, hidden], changed in place, and what is to be added to it -> the same two, or `rows` of them."""
        normed = self._norm(x, added, self._input_norm, self._eps, self._dtype)
        seen = self._attention.attend(normed, attention)
        if rows is not None:
            x, seen, slots = (part.index_select(0, rows) for part in (x, seen, slots))
        added = self._sum(self._attention.output(seen))
        normed = self._norm(x, added, self._mlp_norm, self._eps, self._dtype)
        return x, self._sum(self.mlp(normed, slots))


def _layers(
    spec: DecoderSpec,
    weights: Iterable[LayerWeights],
    make_experts: MakeExperts,
    ops: Ops,
    parallel: Parallel,
) -> list[_Layer]:
    """`spec`: of this rank."""
    layers, sparse = [], 0
    for index, layer in enumerate(weights):
        attention: AttentionLayer
        if isinstance(layer.attention, LatentAttention):
            attention = LatentAttentionLayer(spec, index, layer.attention, ops)
        else:
            attention = GroupedAttentionLayer(spec, index, layer.attention, ops)
        mlp: MlpLayer
        if isinstance(layer.mlp, SparseMlp):
            assert spec.moe is not None, f"layer {index} of {spec.architecture} has experts"
            mlp = SparseLayer(spec.moe, layer.mlp, make_experts(sparse, spec, layer.mlp, ops), ops)
            sparse += 1
        else:
            mlp = DenseMlp(layer.mlp, ops)
        layers.append(_Layer(spec, layer, attention, mlp, ops, parallel))
    return layers

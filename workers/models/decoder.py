"""One decoder for every architecture a `DecoderSpec` can describe.

Token ids in, hidden states and logits out. A layer is built with the callables it needs, so the loop asks no flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.reference import AttentionBatch, AttentionPlan, Scratch, rms_norm, rope_rotate, silu_mul
from workers.models.checkpoint import read_json
from workers.models.head import Head
from workers.models.linear import make_linear
from workers.models.rope import RopeTable
from workers.models.spec import DecoderSpec
from workers.models.weights import DecoderWeights, LayerWeights, load_weights


def load_decoder(
    path: Path, dtype: torch.dtype, device: torch.device, max_positions: int | None = None
) -> Decoder:
    """Read a model directory (config.json + safetensors). Raises ModelError."""
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    return Decoder(spec, load_weights(path, spec, dtype, device), max_positions)


class Decoder:
    """The model's weights and its forward pass. The KV cache belongs to the caller. Not thread-safe."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, max_positions: int | None = None) -> None:
        """`max_positions` in tokens bounds the positions; None: the model's own. Reads `weights.layers` once."""
        self.spec = spec
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.max_positions = max_positions or spec.max_position
        self._embedding = weights.embedding
        self._rope = RopeTable(spec.rope, spec.head_dim, self.max_positions, self.dtype, self.device)
        self._layers = [_Layer(spec, index, layer) for index, layer in enumerate(weights.layers)]
        self._final_norm = weights.final_norm.float()
        self._head = Head(weights.head)
        self._scratch = Scratch()

    def new_kv_cache(self, num_blocks: int, block_size: int, pages: Tensor | None = None) -> Tensor:
        """A zeroed cache in canonical layout, see `kernels.reference`; in `pages`, uint8 zeros, when given."""
        spec = self.spec
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, block_size, spec.head_dim)
        if pages is not None:
            return pages.view(self.dtype).view(shape)
        return _zeros(shape, self.dtype, self.device)

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


HeadsNorm = Callable[[Tensor], Tensor]  # [T, num_heads + num_kv_heads, head_dim] -> the same


class _Layer:
    def __init__(self, spec: DecoderSpec, index: int, weights: LayerWeights) -> None:
        self._index = index
        self._eps = spec.norm_eps
        self._scale = spec.scale
        self._window = spec.windows[index]
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._dtype = weights.qkv.dtype
        self._input_norm, self._mlp_norm = weights.input_norm.float(), weights.mlp_norm.float()
        self._qkv = make_linear(weights.qkv, weights.qkv_bias)
        self._output = make_linear(weights.output, weights.output_bias)
        self._gate_up = make_linear(weights.gate_up, weights.gate_up_bias)
        self._down = make_linear(weights.down, weights.down_bias)
        self._heads_norm = _heads_norm(spec, weights)

    def __call__(
        self, x: Tensor, cos: Tensor, signed_sin: Tensor, attention: AttentionPlan, rows: Tensor | None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden], or the given rows of it."""
        qkv = self._qkv(self._normed(x, self._input_norm)).view(x.shape[0], -1, self._head_dim)
        qk, v = qkv[:, : -self._num_kv_heads], qkv[:, -self._num_kv_heads :]
        qk = rope_rotate(self._heads_norm(qk), cos, signed_sin)
        attention.write(self._index, qk[:, self._num_heads :], v)
        seen = attention.attend(qk[:, : self._num_heads], self._index, self._scale, self._window)
        if rows is not None:
            x, seen = x.index_select(0, rows), seen.index_select(0, rows)
        x = x + self._output(seen.flatten(1))
        return x + self._down(silu_mul(self._gate_up(self._normed(x, self._mlp_norm))))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps).to(self._dtype)


def _heads_norm(spec: DecoderSpec, weights: LayerWeights) -> HeadsNorm:
    if weights.q_norm is None or weights.k_norm is None:
        return _unchanged
    q, k = weights.q_norm.expand(spec.num_heads, -1), weights.k_norm.expand(spec.num_kv_heads, -1)
    both = torch.cat((q, k))  # [num_heads + num_kv_heads, head_dim]: one norm over all heads
    return lambda heads: rms_norm(heads, both, spec.norm_eps)


def _unchanged(heads: Tensor) -> Tensor:
    return heads


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The KV cache: zeros, not garbage, because padding is read and masked, and 0 * NaN would still be NaN.

    On a CPU the pages come from the kernel as zeros and cost no memory before a block is used: torch.zeros would
    write all of them at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)

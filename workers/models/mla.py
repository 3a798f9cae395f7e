"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents.

Keys and values of all heads are projections of one latent, so a head's score against a key is its query, taken through
the key projection, against the latent; and the values are projected after they were summed ("weight absorption",
section 2.1.3). Attention is then that of many query heads with one shared KV head, whose values are the first part of
its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantized_matrix import Weight
from workers.models.layer_weights import LatentAttention
from workers.models.ops import Attention, Ops
from workers.models.spec import DecoderSpec, MlaSpec


class LatentAttentionLayer:
    def __init__(self, spec: DecoderSpec, index: int, weights: LatentAttention[Weight], ops: Ops) -> None:
        assert spec.mla is not None, f"{spec.architecture} has no latent attention"
        mla = self._mla = spec.mla
        self._ops, self._index, self._num_heads = ops, index, spec.num_heads
        self._scale, self._window, self._eps = spec.scale, spec.windows[index], spec.norm_eps
        down, q_up = weights.down, weights.q_up
        if mla.rope_interleaved:
            rank = mla.q_lora_rank
            queries = torch.arange(down.shape[0] - mla.latent_dim)
            latents = torch.arange(len(queries), down.shape[0])
            if rank is None:
                queries = _rotated_in_halves(queries, spec.num_heads, mla)
            down = _picked(down, torch.cat((queries, _rotated_in_halves(latents, 1, mla))))
            if q_up is not None:
                q_up = _picked(q_up, _rotated_in_halves(torch.arange(q_up.shape[0]), spec.num_heads, mla))
        self._down = ops.linear(down)
        self._q_up = None if q_up is None else ops.linear(q_up)
        self._q_norm, self._kv_norm = weights.q_norm, weights.kv_norm
        assert isinstance(weights.kv_up, Tensor), "kv_up is folded into queries, as floats"
        up = weights.kv_up.view(spec.num_heads, mla.nope_dim + mla.value_dim, mla.kv_lora_rank)
        self._key_up = up[:, : mla.nope_dim].contiguous()  # [heads, nope_dim, kv_lora_rank]
        # [heads, kv_lora_rank, value_dim]
        self._value_up = up[:, mla.nope_dim :].transpose(1, 2).contiguous()
        self.output = ops.linear(weights.output)

    def attend(self, x: Tensor, attention: Attention) -> Tensor:
        mla, tokens = self._mla, x.shape[0]
        rank = mla.kv_lora_rank
        down = self._down(x)
        queries, rows = down[:, : -mla.latent_dim], down[:, -mla.latent_dim :]
        if self._q_up is not None and self._q_norm is not None:
            queries = self._q_up(self._ops.rms_norm(queries, self._q_norm, self._eps))
        queries = queries.view(tokens, self._num_heads, mla.query_dim)
        q = attention.write_latents(rows, queries, self._index, self._kv_norm, self._eps)
        # Into the first part of q: [heads, T, nope_dim] times [heads, nope_dim, rank].
        nope = queries[..., : mla.nope_dim].transpose(0, 1)
        torch.bmm(nope, self._key_up, out=q[..., :rank].transpose(0, 1))
        seen = attention.attend(q, self._index, self._scale, self._window, values=rank)
        out = seen.new_empty(tokens, self._num_heads, mla.value_dim)
        torch.bmm(seen.transpose(0, 1), self._value_up, out=out.transpose(0, 1))
        return out.flatten(1)


def _rotated_in_halves(rows: Tensor, heads: int, mla: MlaSpec) -> Tensor:
    """Of `rows` [heads * d], each head's last `rope_dim` first the even, then the odd: pairs that are rotated together
    lie half a head apart, as rotary kernels take them. Scores don't change when queries and keys agree."""
    of_heads = rows.view(heads, -1)
    plain, rotated = of_heads[:, : -mla.rope_dim], of_heads[:, -mla.rope_dim :]
    return torch.cat((plain, rotated[:, 0::2], rotated[:, 1::2]), 1).flatten()


def _picked(weight: Weight, rows: Tensor) -> Weight:
    """The outputs `rows`, in that order."""
    rows = rows.to(weight.device)
    return weight.index_select(0, rows) if isinstance(weight, Tensor) else weight.picked(rows)

"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents.

Keys and values of all heads are projections of one latent, so a head's score against a key is its query, taken through
the key projection, against the latent; and the values are projected after they were summed ("weight absorption",
section 2.1.3). Attention is then that of many query heads with one shared KV head, whose values are the first part of
its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import AttentionPlan, rms_norm, rope_rotate
from workers.models.layer_weights import LatentAttention
from workers.models.linear import make_linear
from workers.models.spec import DecoderSpec, MlaSpec


class LatentAttentionLayer:
    def __init__(self, spec: DecoderSpec, index: int, weights: LatentAttention[Tensor]) -> None:
        assert spec.mla is not None, f"{spec.architecture} has no latent attention"
        mla = self._mla = spec.mla
        self._index, self._num_heads = index, spec.num_heads
        self._scale, self._window, self._eps = spec.scale, spec.windows[index], spec.norm_eps
        down, q_up = weights.down, weights.q_up
        if mla.rope_interleaved:
            rank = mla.q_lora_rank
            queries, latents = down[: -mla.latent_dim], down[-mla.latent_dim :]
            if rank is None:
                queries = _rotated_in_halves(queries, spec.num_heads, mla)
            down = torch.cat((queries, _rotated_in_halves(latents, 1, mla)))
            q_up = None if q_up is None else _rotated_in_halves(q_up, spec.num_heads, mla)
        self._down = make_linear(down)
        self._q_up = None if q_up is None else make_linear(q_up)
        self._q_norm, self._kv_norm = weights.q_norm, weights.kv_norm
        up = weights.kv_up.view(spec.num_heads, mla.nope_dim + mla.value_dim, mla.kv_lora_rank)
        self._key_up = up[:, : mla.nope_dim].contiguous()  # [heads, nope_dim, kv_lora_rank]
        # [heads, kv_lora_rank, value_dim]
        self._value_up = up[:, mla.nope_dim :].transpose(1, 2).contiguous()
        self.output = make_linear(weights.output)

    def attend(self, x: Tensor, cos: Tensor, signed_sin: Tensor, attention: AttentionPlan) -> Tensor:
        mla, tokens = self._mla, x.shape[0]
        down = self._down(x)
        sizes = [down.shape[1] - mla.latent_dim, mla.kv_lora_rank, mla.rope_dim]
        q, latent, key_rope = torch.split(down, sizes, -1)
        if self._q_up is not None and self._q_norm is not None:
            q = self._q_up(rms_norm(q, self._q_norm, self._eps))
        q_nope, q_rope = torch.split(q.view(tokens, self._num_heads, -1), [mla.nope_dim, mla.rope_dim], -1)
        rotated = rope_rotate(
            torch.cat((q_rope, key_rope[:, None]), 1), cos, signed_sin
        )  # [T, heads + 1, rope]
        latent = rms_norm(latent, self._kv_norm, self._eps)
        attention.write_latents(self._index, torch.cat((latent, rotated[:, -1]), -1))
        absorbed = torch.bmm(q_nope.transpose(0, 1), self._key_up).transpose(0, 1)  # [T, heads, kv_lora_rank]
        q = torch.cat((absorbed, rotated[:, :-1]), -1)
        seen = attention.attend(q, self._index, self._scale, self._window)[..., : mla.kv_lora_rank]
        return torch.bmm(seen.transpose(0, 1), self._value_up).transpose(0, 1).flatten(1)


def _rotated_in_halves(weight: Tensor, heads: int, mla: MlaSpec) -> Tensor:
    """Rows [heads * d, in], of each head's last `rope_dim` first the even, then the odd: pairs that are rotated
    together lie half a head apart, as `rope_rotate` takes them. Scores don't change when queries and keys agree."""
    rows = weight.view(heads, -1, weight.shape[1])
    plain, rotated = rows[:, : -mla.rope_dim], rows[:, -mla.rope_dim :]
    return torch.cat((plain, rotated[:, 0::2], rotated[:, 1::2]), 1).view(weight.shape)

"""Sampling in its reference form: one row of logits to one token, on any torch device.

A draw is a function of (seed, position, token id) and nothing else. Noise is Gumbel: argmax(z + g) is distributed as
softmax(z) (Gumbel-max; Maddison et al., "A* Sampling", 2014, section 2). Each candidate's noise hangs on its own token
id, so the result does not change with the order of candidates, with the batch, or with the machine, and filters
(top-k, top-p, min-p) only take candidates away.
"""

from __future__ import annotations

import hashlib
import struct

import torch

# Noise is drawn from u in [2**-33, 1 - 2**-33], so it lies in [-3.14, 22.88]: a token this much below the best one
# can't win and need not be drawn for.
_NOISE_SPAN = 26.1
# Below this a draw is an argmax: the best token wins unless another is within 0.0003 of it, and dividing by much less
# would overflow float32, where all large logits become the same infinity.
COLDEST = 1e-5
_MASK32 = 0xFFFFFFFF


def noise_key(seed: int, position: int) -> bytes:
    """Two little-endian u32 that key the noise of one draw."""
    return hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 noise for each of `token_ids` (int64, any shape): murmur3's finalizer, keyed twice, over the id."""
    first, second = struct.unpack("<II", noise_key(seed, position))
    bits = (token_ids * 0x9E3779B1 + first) & _MASK32
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK32
    bits = (bits ^ (bits >> 16) ^ second) & _MASK32
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK32
    bits = bits ^ (bits >> 16)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def candidates(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Token ids that may be drawn from `logits` [vocab] (float32, temperature applied), best first with top_p.

    Filters apply in the order min-p, top-k, top-p, each to what the one before has left. Ties at the k-th place stay.
    """
    best = logits.max()
    floor = best - _NOISE_SPAN
    if min_p > 0.0:
        floor = torch.maximum(floor, best + torch.log(torch.tensor(min_p, device=logits.device)))
    if 0 < top_k < logits.numel():
        floor = torch.maximum(floor, torch.topk(logits, top_k).values[-1])
    ids = torch.nonzero(logits >= floor).squeeze(-1)
    if top_p >= 1.0:
        return ids
    kept = logits[ids]
    # What _NOISE_SPAN left out still counts in the total that top_p is a share of, unless another filter took it out.
    rest_filtered = min_p > 0.0 or 0 < top_k < logits.numel()
    # In float64: at a temperature next to zero the logits are so large that float32 cannot tell shares apart.
    total = torch.logsumexp((kept if rest_filtered else logits).to(torch.float64), dim=0)
    order = torch.argsort(kept, descending=True, stable=True)
    probs = torch.exp(kept[order].to(torch.float64) - total)
    before = torch.cumsum(probs, dim=0) - probs
    return ids[order[before < top_p]]  # the first has 0 before it, so one always stays


def sample(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> int:
    """One token from `logits` [vocab] (float32, penalties and bias applied). temperature 0, or nearly, is argmax."""
    best = torch.argmax(logits)
    if temperature < COLDEST or logits[best].isinf():  # -inf: every token is barred, and there are no shares
        return int(best)
    scaled = logits / temperature
    ids = candidates(scaled, top_k, top_p, min_p)
    return int(ids[torch.argmax(scaled[ids] + gumbel_noise(seed, position, ids))])

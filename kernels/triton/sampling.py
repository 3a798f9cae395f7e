"""Rows of logits to tokens on a GPU without sorting the vocabulary: the tokens of kernels.sampling.

Every draw is an argmax of z + Gumbel noise over the tokens that top-k, top-p and min-p leave. Those are all tokens
above a threshold (kernels/triton/sampling_cut.py finds it), up to some id among its equals, so nothing is sorted and
nothing goes to the host. The vocabulary is cut into pieces, each a program's.

The same token as on the CPU: z = logits / temperature is the float32 division, the noise comes of the same bits, and
what decides is float64, as there. Two float64 logarithms a token would cost more than reading the logits, so float32
picks who is near the best, and mostly that is one token. Left to chance is a tie in the last bits of float64.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import COLDEST, noise_key
from kernels.triton.sampling_cut import Filters, find_cuts

NOT_A_NUMBER = -1  # the token of a row that holds a NaN


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """The parameters of R rows on the device. Rows that do not change need not be sent anew."""

    temperature: Tensor  # float32 [R]
    filters: Filters
    keys: Tensor  # int32 [R, 2]: the bits of noise_key
    filtered: bool  # whether some row has top-k or top-p

    @classmethod
    def of(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seeds: Sequence[int],
        positions: Sequence[int],
        device: torch.device | str,
    ) -> SamplingRows:
        """Each [R], as kernels.sampling.sample takes them."""
        keys = [
            struct.unpack("<ii", noise_key(seed, position))
            for seed, position in zip(seeds, positions, strict=True)
        ]
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            Filters(
                torch.tensor(top_k, dtype=torch.int32, device=device),
                torch.tensor(top_p, dtype=torch.float64, device=device),
                # The logarithm is the CPU's: a GPU's may differ in the last bit.
                torch.log(torch.tensor(min_p, dtype=torch.float32)).to(device),
            ),
            torch.tensor(keys, dtype=torch.int32, device=device).view(-1, 2),
            any(k > 0 for k in top_k) or any(p < 1.0 for p in top_p),
        )


def sample_rows(logits: Tensor, rows: SamplingRows, *, piece: int = 4096, room: int = 8192) -> Tensor:
    """logits float32 [R, vocab] (penalties and bias applied) -> tokens int64 [R], on the device.

    A row that holds a NaN gets NOT_A_NUMBER. `piece`: tokens of one program, a power of two; `room`: how many
    candidates of a row are set apart, beyond which the whole row is searched. Raises ValueError.
    """
    count, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(
            f"logits are float32, a row's together, not {logits.dtype} of strides {logits.stride()}"
        )
    if len(rows.temperature) != count:
        raise ValueError(f"{count} rows of logits and parameters of {len(rows.temperature)}")
    device = logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    if not count:
        return tokens
    pieces = triton.cdiv(vocab, piece)
    best = torch.empty((count, pieces), dtype=torch.float32, device=device)
    best_ids = torch.empty((count, pieces), dtype=torch.int32, device=device)
    _best_of_pieces[(count, pieces)](logits, best, best_ids, vocab, logits.stride(0), PIECE=piece)
    # [R] each: the largest logit, its first id, NaN where there is one. Pieces come in order of their ids.
    top, at = best.max(1)
    top_ids = best_ids.gather(1, at[:, None])[:, 0]
    cut, cut_ids = find_cuts(logits, top, rows.temperature, rows.filters, rows.filtered, piece, room)
    scores = torch.empty((count, pieces), dtype=torch.float64, device=device)
    ids = torch.empty((count, pieces), dtype=torch.int32, device=device)
    _draw_pieces[(count, pieces)](
        logits, rows.temperature, rows.keys, cut, cut_ids, scores, ids, vocab, logits.stride(0), PIECE=piece
    )
    _choose[(count,)](
        top, top_ids, rows.temperature, scores, ids, tokens, pieces, COLDEST,
        NOT_A_NUMBER=NOT_A_NUMBER, PIECES=triton.next_power_of_2(pieces),
    )  # fmt: skip
    return tokens


@triton.jit
def _best_of_pieces(logits, best, best_ids, vocab, stride, PIECE: tl.constexpr):
    row, piece = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, PIECE)
    id = piece * PIECE + column
    x = tl.load(logits + row.to(tl.int64) * stride + id, mask=id < vocab, other=float("-inf"))
    top = tl.max(x, axis=0)
    broken = tl.max((x != x).to(tl.int32), axis=0)
    at = row * tl.num_programs(1) + piece
    tl.store(best + at, tl.where(broken == 1, float("nan"), top))
    tl.store(best_ids + at, tl.min(tl.where((x == top) & (id < vocab), id, vocab - 1), axis=0))


@triton.jit
def noise_bits(id, first, second):
    """kernels.sampling.gumbel_noise's bits: `first`, `second` int32 scalars."""
    bits = id.to(tl.uint32) * 0x9E3779B1 + first.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16) ^ second.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _gumbel(bits):
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return -tl.log(-tl.log(uniform))


@triton.jit
def _rough_gumbel(bits):
    """In float32, within 1e-4. Where u is near 1, -log u comes of 1 - u, which has more bits there."""
    scale: tl.constexpr = 2.3283064365386963e-10
    u = (bits.to(tl.float32) + 0.5) * scale
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * scale  # 1 - u
    series = rest * (1.0 + rest * (0.5 + rest * (1.0 / 3.0 + rest * 0.25)))
    return -tl.log(tl.where(rest < 0.03125, series, -tl.log(tl.minimum(u, 0.99))))


@triton.jit
def _draw_pieces(logits, temperature, keys, cut, cut_ids, scores, ids, vocab, stride, PIECE: tl.constexpr):
    """The best z + noise of a piece and its id; -inf where the piece has no token to draw."""
    row, piece = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + piece
    id = piece * PIECE + tl.arange(0, PIECE)
    t = tl.load(temperature + row)
    x = tl.load(logits + row.to(tl.int64) * stride + id, mask=id < vocab, other=float("-inf"))
    z = tl.div_rn(x, tl.zeros((PIECE,), tl.float32) + t)
    least, last = tl.load(cut + row), tl.load(cut_ids + row)
    stays = (id < vocab) & ((z > least) | ((z == least) & (id <= last)))
    bits = noise_bits(id, tl.load(keys + row * 2), tl.load(keys + row * 2 + 1))
    rough = tl.where(stays, z + _rough_gumbel(bits), float("-inf"))
    best = tl.max(rough, axis=0)
    if best == float("-inf"):
        tl.store(scores + at, float("-inf"))
        tl.store(ids + at, vocab)
    else:
        near = stays & (rough >= best - (1e-3 + 1e-6 * tl.abs(best)))
        first = tl.min(tl.where(near, id, vocab), axis=0)
        if tl.sum(near.to(tl.int32), axis=0) == 1:
            only = noise_bits(first, tl.load(keys + row * 2), tl.load(keys + row * 2 + 1))
            its_z = tl.max(tl.where(near, z, float("-inf")), axis=0)
            tl.store(scores + at, its_z.to(tl.float64) + _gumbel(only))
            tl.store(ids + at, first)
        else:
            exact = tl.where(near, z.to(tl.float64) + _gumbel(bits), float("-inf"))
            score = tl.max(exact, axis=0)
            tl.store(scores + at, score)
            tl.store(ids + at, tl.min(tl.where(exact == score, id, vocab), axis=0))


@triton.jit
def _choose(
    top, top_ids, temperature, scores, ids, tokens, pieces, coldest,
    NOT_A_NUMBER: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES)
    score = tl.load(scores + row * pieces + piece, mask=piece < pieces, other=float("-inf"))
    id = tl.load(ids + row * pieces + piece, mask=piece < pieces, other=2147483647)
    best = tl.max(score, axis=0)
    drawn = tl.min(tl.where(score == best, id, 2147483647), axis=0)
    largest, t = tl.load(top + row), tl.load(temperature + row)
    # Cold, or no finite share to draw by: the largest logit.
    z = tl.abs(largest / tl.maximum(t, coldest))
    sure = (t < coldest) | (z == float("inf"))
    token = tl.where(sure, tl.load(top_ids + row), drawn)
    tl.store(tokens + row, tl.where(largest != largest, NOT_A_NUMBER, token).to(tl.int64))

"""Which tokens min-p, top-k and top-p leave of each row of logits: all above a threshold, some of those equal to it.

kernels.sampling.candidates by bisection instead of sorting. One launch over pieces of the vocabulary counts and weighs
what lies within 4, 8, 16 and 26.1 of the best; the nearest of these that holds k tokens, or the share p, is enough to
look at. Its tokens, a few hundred as a rule, are set apart in order of their ids, and the threshold is bisected among
them over the bits of float32, which are in the order of the numbers. Weights are float64, as in the reference.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import _NOISE_SPAN

REACHES = 4


@dataclass(frozen=True, eq=False)
class Filters:
    top_k: Tensor  # int32 [R]; 0: off
    top_p: Tensor  # float64 [R]; 1: off
    log_min_p: Tensor  # float32 [R]: of min_p; -inf: off


def find_cuts(
    logits: Tensor, top: Tensor, temperature: Tensor, filters: Filters, filtered: bool, piece: int, room: int
) -> tuple[Tensor, Tensor]:
    """z float32 [R] and ids int32 [R]: of row r stay tokens with logit / temperature > z[r], or = z[r] and id <= ids[r].

    logits [R, vocab]; top [R]: the largest of each row. `filtered`: whether some row has top-k or top-p.
    """
    rows, vocab = logits.shape
    device = logits.device
    cut = torch.empty(rows, dtype=torch.float32, device=device)
    ids = torch.empty(rows, dtype=torch.int32, device=device)
    pieces = triton.cdiv(vocab, piece)
    counts, masses, found, found_ids = ids, cut, cut, ids  # not used where nothing is filtered
    if filtered:
        counts = torch.empty((rows, pieces, REACHES), dtype=torch.int32, device=device)
        masses = torch.empty((rows, pieces, REACHES + 1), dtype=torch.float64, device=device)
        found = torch.empty((rows, room), dtype=torch.float32, device=device)
        found_ids = torch.empty((rows, room), dtype=torch.int32, device=device)
        _weigh[(rows, pieces)](
            logits, top, temperature, filters.top_k, filters.top_p, counts, masses, vocab, logits.stride(0),
            SPAN=_NOISE_SPAN, PIECE=piece,
        )  # fmt: skip
    _find_cut[(rows,)](
        logits, top, temperature, filters.top_k, filters.top_p, filters.log_min_p, counts, masses, found, found_ids,
        cut, ids, vocab, logits.stride(0), pieces,
        FILTERED=filtered, SPAN=_NOISE_SPAN, ROOM=room, PIECE=piece, PIECES=triton.next_power_of_2(pieces),
        num_warps=8,
    )  # fmt: skip
    return cut, ids


@triton.jit
def _floor_of_reach(best, i, SPAN: tl.constexpr):
    return best - tl.where(i == 0, 4.0, tl.where(i == 1, 8.0, tl.where(i == 2, 16.0, SPAN)))


@triton.jit
def _weigh(
    logits, top, temperature, top_k, top_p, counts, masses, vocab, stride, SPAN: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """How many tokens of a piece lie within each reach of the best, their sums of exp(z - best), and that of all."""
    row, piece = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0):
        id = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits + row.to(tl.int64) * stride + id, mask=id < vocab, other=float("-inf"))
        z = tl.div_rn(x, tl.zeros((PIECE,), tl.float32) + t)
        best = tl.div_rn(tl.load(top + row), t)
        weight = tl.exp(z.to(tl.float64) - best.to(tl.float64))
        at = row * tl.num_programs(1) + piece
        for i in tl.static_range(4):
            near = z >= _floor_of_reach(best, i, SPAN)
            tl.store(counts + at * 4 + i, tl.sum(near.to(tl.int32), axis=0))
            tl.store(masses + at * 5 + i, tl.sum(tl.where(near, weight, 0.0), axis=0))
        tl.store(masses + at * 5 + 4, tl.sum(weight, axis=0))


@triton.jit
def _ordered(z):
    """Integers in the order of float32."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _candidates(values, ids, start, num, searched, t, floor, PIECE: tl.constexpr):
    """Some of the row's candidates: z, their ids, and which of them are at or above `floor`."""
    place = start + tl.arange(0, PIECE)
    inside = place < num
    x = tl.load(values + place, mask=inside, other=float("-inf"))
    z = tl.div_rn(x, tl.zeros((PIECE,), tl.float32) + t)
    set_apart = inside & (place * 0 + searched == 0)
    id = tl.where(set_apart, tl.load(ids + place, mask=set_apart, other=0), place)
    return z, id, inside & (z >= floor)


@triton.jit
def _held_from(values, ids, num, searched, t, floor, best, least, WEIGHED: tl.constexpr, PIECE: tl.constexpr):
    """Of the candidates whose ordered z is at least `least`: their mass, or their number."""
    held = tl.full((), 0.0, tl.float64)
    for start in range(0, num, PIECE):
        z, _, here = _candidates(values, ids, start, num, searched, t, floor, PIECE)
        here = here & (_ordered(z).to(tl.int64) >= least)
        if WEIGHED:
            held += tl.sum(tl.where(here, tl.exp(z.to(tl.float64) - best.to(tl.float64)), 0.0), axis=0)
        else:
            held += tl.sum(here.to(tl.int32), axis=0).to(tl.float64)
    return held


@triton.jit
def _bisect(
    values, ids, num, searched, t, floor, best, wanted, WEIGHED: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """The largest ordered z from which on the candidates hold `wanted`; that of `floor` where all hold less."""
    low = _ordered(floor).to(tl.int64)
    high = _ordered(best).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        if _held_from(values, ids, num, searched, t, floor, best, middle, WEIGHED, PIECE) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _set_apart(row_logits, values, ids, vocab, t, floor, ROOM: tl.constexpr, PIECE: tl.constexpr):
    """Logits and ids of the tokens at or above `floor`, in order of their ids, as far as there is room."""
    num = tl.full((), 0, tl.int32)
    for start in range(0, vocab, PIECE):
        id = start + tl.arange(0, PIECE)
        x = tl.load(row_logits + id, mask=id < vocab, other=float("-inf"))
        here = (tl.div_rn(x, tl.zeros((PIECE,), tl.float32) + t) >= floor) & (id < vocab)
        one = here.to(tl.int32)
        place = num + tl.cumsum(one, axis=0) - 1
        fits = here & (place < ROOM)
        tl.store(values + place, x, mask=fits)
        tl.store(ids + place, id, mask=fits)
        num += tl.sum(one, axis=0)


@triton.jit
def _last_of_equals(
    values, ids, num, searched, t, floor, cut, number, vocab, PIECE: tl.constexpr
):  # fmt: skip
    """The id of the `number`-th candidate, from 1, with z = cut, by id; the last there is where there are fewer."""
    seen = tl.full((), 0, tl.int32)
    last = vocab
    for start in range(0, num, PIECE):
        z, id, here = _candidates(values, ids, start, num, searched, t, floor, PIECE)
        equal = (here & (z == cut)).to(tl.int32)
        rank = seen + tl.cumsum(equal, axis=0)
        chosen = (equal == 1) & (rank.to(tl.float64) == number)
        last = tl.minimum(last, tl.min(tl.where(chosen, id, vocab), axis=0))
        seen += tl.sum(equal, axis=0)
    return last


@triton.jit
def _find_cut(
    logits, top, temperature, top_k, top_p, log_min_p, counts, masses, found, found_ids, cut, cut_ids,
    vocab, stride, pieces,
    FILTERED: tl.constexpr, SPAN: tl.constexpr, ROOM: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    best = tl.div_rn(tl.load(top + row), t)
    span: tl.constexpr = SPAN
    floor = tl.maximum(best - span, best + tl.load(log_min_p + row))
    last = vocab
    if FILTERED:
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        by_count, by_share = (k > 0) & (k < vocab), p < 1.0
        # Otherwise nothing is to be found, or what the row holds is no number to compare.
        if (by_count | by_share) & (tl.abs(best) < float("inf")):
            piece = tl.arange(0, PIECES)
            at, real = row * pieces + piece, piece < pieces
            total = tl.sum(tl.load(masses + at * 5 + 4, mask=real, other=0.0), axis=0)
            # Filters before top-p take part in its total: then no reach is known to hold the share of it.
            alone = by_share & (by_count == 0) & (tl.load(log_min_p + row) == float("-inf"))
            enough = tl.full((), 3, tl.int32)
            for j in tl.static_range(3):
                count = tl.sum(tl.load(counts + at * 4 + (2 - j), mask=real, other=0), axis=0)
                mass = tl.sum(tl.load(masses + at * 5 + (2 - j), mask=real, other=0.0), axis=0)
                holds = (by_count & (count >= k)) | (alone & (mass > p * total))
                holds |= floor >= _floor_of_reach(best, 2 - j, SPAN)
                enough = tl.where(holds, 2 - j, enough)
            reached = tl.maximum(floor, _floor_of_reach(best, enough, SPAN))
            count = tl.sum(tl.load(counts + at * 4 + enough, mask=real, other=0), axis=0)
            searched = (count > ROOM).to(tl.int32)
            row_logits, own, own_ids = logits + row * stride, found + row * ROOM, found_ids + row * ROOM
            num = vocab
            if searched == 0:
                _set_apart(
                    row_logits, own, own_ids, vocab, t, _floor_of_reach(best, enough, SPAN), ROOM, PIECE
                )
                tl.debug_barrier()  # other threads of this program read them
                num = count
                row_logits = own
            if by_count:
                least = _bisect(
                    row_logits, own_ids, num, searched, t, reached, best, k.to(tl.float64), False, PIECE
                )
                back = (least ^ ((least >> 63) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
                reached = tl.maximum(reached, back)
                floor = reached
            if by_share:
                if alone == 0:
                    whole = _ordered(reached).to(tl.int64)
                    total = _held_from(
                        row_logits, own_ids, num, searched, t, reached, best, whole, True, PIECE
                    )
                share = p * total
                least = _bisect(row_logits, own_ids, num, searched, t, reached, best, share, True, PIECE)
                z = (least ^ ((least >> 63) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
                above = _held_from(
                    row_logits, own_ids, num, searched, t, reached, best, least + 1, True, PIECE
                )
                each = tl.exp(z.to(tl.float64) - best.to(tl.float64))
                number = tl.maximum(tl.ceil((share - above) / each), 1.0)
                last = _last_of_equals(
                    row_logits, own_ids, num, searched, t, reached, z, number, vocab, PIECE
                )
                floor = z
    tl.store(cut + row, floor)
    tl.store(cut_ids + row, last)

"""Float matrices into int8 or float8 by output channel, or into 8 or 4 bits by groups of 32 inputs. No calibration data.

A matrix on a GPU is quantized there; what comes back is on the host.

A change of any result must raise `scheme.VALUES_VERSION`.

Four bits have a free minimum (value = d * q + m): with d and m fitted, the relative error of normally distributed
weights is 7.0%, of Laplace ones 8.2%; of the best of 19 symmetric grids (m = -8 d) 8.1% and 10.2%; and the kernels
read m in any case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from workers.models.quantized import GROUP, Q8_OFFSET, ChannelWeight, Fp8Weight, GroupedWeight

_INT8_MAX = 127
_INT4_MAX = 15
_FP8_MAX = 448
_CHUNK = 1 << 18  # weights at a time: 1 MiB of float32, so that the search stays in the L2 cache
_DEVICE_CHUNK = 1 << 26  # the same on a GPU: enough to fill it
# Parts of max - min that the first grids leave out at each end: clipping the extremes of a group often costs less than
# the coarser step. All pairs of these come within 4% of the squared error of an exhaustive search.
_CLIPS = (0.0, 0.05, 0.1)
_MIN_SCALE = 2.0**-24  # float16's smallest


def quantize_channels(weight: Tensor) -> ChannelWeight:
    """[n, k], symmetric: scale = absmax / 127 of each row."""
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, dtype=torch.float32, device=weight.device)

    def convert(rows: slice, part: Tensor) -> None:
        absmax = part.abs().amax(-1)
        scale[rows] = absmax / _INT8_MAX
        part *= torch.where(absmax > 0, _INT8_MAX / absmax, 0)[:, None]
        q[rows] = part.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)

    _by_chunks(weight, k, convert)
    return ChannelWeight(q.cpu().numpy(), scale.cpu().numpy())


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """[n, k], scale = absmax / 448 of each row; to the nearest of e4m3."""
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, 1, dtype=torch.float32, device=weight.device)

    def convert(rows: slice, part: Tensor) -> None:
        absmax = part.abs().amax(-1, keepdim=True)
        scale[rows] = absmax / _FP8_MAX
        part *= torch.where(absmax > 0, _FP8_MAX / absmax, 0)
        q[rows] = part.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)

    _by_chunks(weight, k, convert)
    return Fp8Weight(q.cpu().numpy(), scale.cpu().numpy(), k)


def quantize_q8(weight: Tensor) -> GroupedWeight:
    """[n, k] in groups of 32, symmetric: d = absmax / 127."""
    n, k = weight.shape
    q = torch.empty(n * k // GROUP, GROUP, dtype=torch.uint8, device=weight.device)
    d = torch.empty(n * k // GROUP, dtype=torch.float16, device=weight.device)

    def convert(groups: slice, part: Tensor) -> None:
        scale = (part.abs().amax(-1) / _INT8_MAX).half()
        d[groups] = scale
        part *= _inverse(scale)[:, None]
        q[groups] = part.round_().clamp_(-_INT8_MAX, _INT8_MAX).add_(Q8_OFFSET).to(torch.uint8)

    _by_chunks(weight, GROUP, convert)
    return GroupedWeight("q8", q.cpu().numpy().reshape(n, k), d.cpu().numpy().reshape(n, -1))


def quantize_q4(weight: Tensor) -> GroupedWeight:
    """[n, k] in groups of 32, each with the scale and minimum that were found to err least (squared).

    From each of a few first grids: round, fit d and m to the integers by least squares, round again.
    """
    n, k = weight.shape
    q = torch.empty(n * k // GROUP, GROUP, dtype=torch.uint8, device=weight.device)
    d = torch.empty(n * k // GROUP, dtype=torch.float16, device=weight.device)
    m = torch.empty_like(d)

    def convert(groups: slice, part: Tensor) -> None:
        q[groups], d[groups], m[groups] = _best_grid(part)

    _by_chunks(weight, GROUP, convert)
    minima = m.cpu().numpy().reshape(n, -1)
    return GroupedWeight("q4", q.cpu().numpy().reshape(n, k), d.cpu().numpy().reshape(n, -1), minima)


def _best_grid(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w float32 [g, 32] -> q uint8 [g, 32], d and m float16 [g]."""
    low, high = w.amin(-1), w.amax(-1)
    width = high - low
    w_sum = w.sum(-1)
    best_d, best_m = (width / _INT4_MAX).half(), low.half()
    best_error = torch.full_like(low, torch.inf)
    for below, above in itertools.product(_CLIPS, repeat=2):
        d = width * ((1 - below - above) / _INT4_MAX)
        q = _rounded(w, d, low + below * width)
        for _ in range(2):
            d16, m16 = _fitted(w, q, w_sum, d)
            q = _rounded(w, d16, m16)
            error = torch.addcmul(m16.float()[:, None], q, d16.float()[:, None]).sub_(w).square_().sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_d, best_m = torch.where(better, d16, best_d), torch.where(better, m16, best_m)
    return _rounded(w, best_d, best_m).to(torch.uint8), best_d, best_m


def _fitted(w: Tensor, q: Tensor, w_sum: Tensor, d_before: Tensor) -> tuple[Tensor, Tensor]:
    """The d and m, in float16, that minimize sum (d q + m - w)^2 for the integers q."""
    q_sum = q.sum(-1)
    variance = (q * q).sum(-1) * GROUP - q_sum * q_sum
    covariance = (q * w).sum(-1) * GROUP - q_sum * w_sum
    d = torch.where(variance > 0, covariance / variance, d_before).half()
    # m is fitted to the scale as it is stored, so that d's rounding is partly made good.
    return d, ((w_sum - d.float() * q_sum) / GROUP).half()


def _rounded(w: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """The nearest integers of the grid, as float32."""
    return ((w - m.float()[:, None]) * _inverse(d)[:, None]).round_().clamp_(0, _INT4_MAX)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0: a group of equal values."""
    d = d.float()
    return torch.where(d.abs() >= _MIN_SCALE, 1 / d, 0)


def _by_chunks(weight: Tensor, columns: int, convert: Callable[[slice, Tensor], None]) -> None:
    """`weight` as rows of `columns` values, some at a time: `convert` gets a float32 copy that it may overwrite.

    A thread takes a chunk through all of its operations. Threads inside of torch's operations would meet at each of
    them, which on a busy machine takes ten times as long as one thread alone.
    """
    flat = weight.contiguous().view(-1, columns)
    rows = max(1, (_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // columns)

    def run(first: int) -> None:
        part = flat[first : first + rows]
        convert(slice(first, first + len(part)), part.to(torch.float32, copy=True))

    if weight.device.type != "cpu":
        for first in range(0, len(flat), rows):
            run(first)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(0, len(flat), rows)))
    finally:
        torch.set_num_threads(threads)

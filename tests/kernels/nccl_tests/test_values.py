"""What is expected, against the operations carried out on whole buffers, one rank after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.nccl_tests.plan import DTYPES, NO_REDOP, OPERATIONS, REDOPS, Case
from kernels.nccl_tests.values import PERIOD, count_wrong, decode, encode, expected, sent

LONG = 3 * PERIOD // 4 // 16 * 16  # of parts of a buffer: with two ranks and more, beyond one period


def whole(case: Case, rank: int, num_ranks: int) -> np.ndarray:
    """A rank's send buffer in full."""
    count = case.counts(num_ranks).send
    period = decode(sent(case, rank, num_ranks, 1), case.dtype).astype(np.float64)
    return np.resize(period, count)


def by_hand(case: Case, rank: int, num_ranks: int) -> np.ndarray | None:
    """A rank's receive buffer after the operation, in float64; None where it is undefined."""
    buffers = [whole(case, each, num_ranks) for each in range(num_ranks)]
    reduce = {
        "sum": lambda x: x.sum(0),
        "avg": lambda x: x.mean(0) if DTYPES[case.dtype].floating else np.floor(x.mean(0)),
        "prod": lambda x: x.prod(0),
        "min": lambda x: x.min(0),
        "max": lambda x: x.max(0),
        NO_REDOP: lambda x: x,
    }[case.redop]
    part = slice(rank * case.count, (rank + 1) * case.count)
    match case.operation:
        case "all_reduce":
            return reduce(np.stack(buffers))
        case "reduce":
            return reduce(np.stack(buffers)) if rank == case.root else None
        case "reduce_scatter":
            return reduce(np.stack(buffers))[part]
        case "broadcast":
            return buffers[case.root]
        case "sendrecv":
            return buffers[(rank + num_ranks - 1) % num_ranks]
        case "all_gather":
            return np.concatenate(buffers)
        case "alltoall":
            return np.concatenate([buffer[part] for buffer in buffers])
    raise AssertionError


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 48, LONG, 3 * PERIOD + 5])
def test_every_operation(operation: str, num_ranks: int, count: int) -> None:
    for redop in REDOPS if OPERATIONS[operation].reduces else (NO_REDOP,):
        case = Case(operation, "int32", redop, num_ranks - 1, count)
        for rank in range(num_ranks):
            want = by_hand(case, rank, num_ranks)
            segments = list(expected(case, rank, num_ranks, 1))
            if want is None:
                assert segments == []
                continue
            got = np.concatenate([np.resize(segment.pattern, segment.count) for segment in segments])
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("redop", REDOPS)
@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_no_type_rounds(dtype: str, redop: str, num_ranks: int) -> None:
    """Reduced one rank after the other in the type itself, by torch, as a backend would."""
    torch_dtype = getattr(
        torch, {"float": "float32", "half": "float16", "double": "float64"}.get(dtype, dtype)
    )
    case = Case("all_reduce", dtype, redop, -1, 1000)
    inputs = [torch.from_numpy(sent(case, rank, num_ranks, 1)).view(torch_dtype) for rank in range(num_ranks)]
    floating = DTYPES[dtype].floating
    total = inputs[0] / num_ranks if redop == "avg" and floating else inputs[0].clone()
    for one in inputs[1:]:
        if redop == "avg":
            total += one / num_ranks if floating else one
        else:
            total = {"sum": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum}[redop](
                total, one
            )
    if redop == "avg" and not floating:
        total //= num_ranks
    data = total.contiguous().view(torch.uint8).numpy()
    assert count_wrong(case, 0, num_ranks, 1, lambda first, size: data[first : first + size]) == 0


def test_an_average_over_three_is_compared_within_rounding() -> None:
    case = Case("all_reduce", "float", "avg", -1, 500)
    inputs = [decode(sent(case, rank, 3, 1), "float") for rank in range(3)]
    total = sum(one * np.float32(1 / 3) for one in inputs)
    assert np.any(total != sum(inputs) / np.float32(3)), "nothing was rounded"
    data = np.ascontiguousarray(total, np.float32)
    read = lambda first, size: data.view(np.uint8)[first : first + size]  # noqa: E731
    assert count_wrong(case, 0, 3, 1, read) == 0
    data[17] += 0.01
    data[18] = np.nan
    assert count_wrong(case, 0, 3, 1, read) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_elements_are_counted(dtype: str) -> None:
    case = Case("broadcast", dtype, NO_REDOP, 1, 2 * PERIOD + 100)
    data = encode(whole(case, 1, 2), dtype)
    item = DTYPES[dtype].num_bytes
    read = lambda first, size: data[first : first + size]  # noqa: E731
    assert count_wrong(case, 0, 2, 1, read) == 0
    assert count_wrong(case, 0, 2, 2, read) > case.count // 2, "an earlier repetition would pass"
    for element in (0, PERIOD, case.count - 1):
        data[element * item + item - 1] ^= 0x10
    assert count_wrong(case, 0, 2, 1, read) == 3


def test_parts_in_the_wrong_order_are_wrong() -> None:
    case = Case("all_gather", "float", NO_REDOP, -1, 64)
    data = np.concatenate([sent(case, rank, 2, 1) for rank in (1, 0)])
    assert count_wrong(case, 0, 2, 1, lambda first, size: data[first : first + size]) > 100


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    ours = decode(encode(values, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())

"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.sampling import _NOISE_SPAN
from kernels.triton import sampling, sampling_cut, step_inputs
from tests.kernels.triton.gpu_builds import build

SIZES = {"vocab": "i32", "stride": "i32"}
PIECE: dict[str, Any] = {"PIECE": 4096}


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_draws(architecture: int) -> None:
    best = {"logits": "*fp32", "best": "*fp32", "best_ids": "*i32"}
    build(sampling._best_of_pieces, architecture, best | SIZES, PIECE)
    draw = {"logits": "*fp32", "temperature": "*fp32", "keys": "*i32", "cut": "*fp32", "cut_ids": "*i32"}
    ptx = build(sampling._draw_pieces, architecture, draw | {"scores": "*fp64", "ids": "*i32"} | SIZES, PIECE)
    assert "div.rn.f32" in ptx  # as the CPU divides
    choose = {"top": "*fp32", "top_ids": "*i32", "temperature": "*fp32", "scores": "*fp64", "ids": "*i32"}
    choose |= {"tokens": "*i64", "pieces": "i32", "coldest": "fp32"}
    build(sampling._choose, architecture, choose, {"NOT_A_NUMBER": -1, "PIECES": 32})


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("filtered", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cuts(architecture: int, filtered: bool) -> None:
    params = {"logits": "*fp32", "top": "*fp32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp64"}
    sums = {"counts": "*i32", "masses": "*fp64"}
    build(sampling_cut._weigh, architecture, params | sums | SIZES, PIECE | {"SPAN": _NOISE_SPAN})
    found = {"log_min_p": "*fp32", "found": "*fp32", "found_ids": "*i32", "cut": "*fp32", "cut_ids": "*i32"}
    constants = PIECE | {"SPAN": _NOISE_SPAN, "FILTERED": filtered, "ROOM": 8192, "PIECES": 32}
    arguments = params | found | sums | SIZES | {"pieces": "i32"}
    build(sampling_cut._find_cut, architecture, arguments, constants, num_warps=8)


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_step_inputs(architecture: int) -> None:
    arrays = {"token_ids": "*i64", "carried": "*i32", "sampled": "*i64", "blocks": "*i32"}
    arrays |= {"block_start": "*i32", "lengths": "*i32", "tables": "*i32"}
    sizes = {"num_tokens": "i32", "num_seqs": "i32", "table_width": "i32"}
    build(step_inputs._place, architecture, arrays | sizes, {"BLOCK_SIZE": 16, "PIECE": 1024})

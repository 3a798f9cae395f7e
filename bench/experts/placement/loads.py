"""Loads of experts: OLMoE's as they were measured, and synthetic ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.experts.simulate.scenarios import DOMAINS
from router.experts.arrays import Floats

SYNTHETIC = ("zipf 0.4", "zipf 0.8", "zipf 1.2", "bursty")
_BURST = 10.0  # times the load that an expert has otherwise


class LoadsError(ValueError):
    """The message says which file is missing."""


def synthetic(name: str, num_layers: int, num_experts: int, seed: int = 0) -> Floats:
    """[layers, E]. "zipf A": the n-th hottest expert has n^-A, give or take a fifth; "bursty": zipf 0.4, and a thirtieth
    of the experts, by chance, has ten times as much."""
    random = np.random.default_rng(seed)
    exponent = 0.4 if name == "bursty" else float(name.split()[1])
    law = np.arange(1, num_experts + 1) ** -exponent * 1e6
    loads = np.stack([random.permutation(law) for _ in range(num_layers)])
    loads *= random.uniform(0.8, 1.2, loads.shape)
    if name == "bursty":
        for row in loads:
            row[random.choice(num_experts, max(num_experts // 30, 1), replace=False)] *= _BURST
    return np.asarray(loads)


def olmoe(folder: Path) -> dict[str, Floats]:
    """Tokens of each expert [3 layers, 64] by domain of text (allenai/OLMoE, scripts/routing_output)."""
    return {domain: _read(folder / f"olmoe__expert_counts__{domain}.npz") for domain in DOMAINS}


def olmoe_coactivation(folder: Path) -> dict[str, Floats]:
    """Hops from the experts of a layer to those of the next [2, 64, 64], for the domains that it was counted for."""
    paths = {domain: folder / f"olmoe__expert_counts_crosslayer__{domain}.npz" for domain in DOMAINS}
    return {domain: _read(path) for domain, path in paths.items() if path.is_file()}


def _read(path: Path) -> Floats:
    if not path.is_file():
        raise LoadsError(f"{path} is missing: --olmoe names the folder with OLMoE's expert counts")
    return np.asarray(np.load(path)["a"].astype(np.float64))

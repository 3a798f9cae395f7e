"""How popular each expert is, from second to second.

Measured: the counts of OLMoE by domain of text (allenai/OLMoE, scripts/routing_output; 3 layers of 64 experts, six
domains). A layer of 256 experts is made of four of these layers, experts shuffled; which ones, and how, is the same for
all domains, so that a change of domain moves load as it did there. Synthetic: Zipf's law over experts whose ranks drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.experts.simulate.machine import Array

DOMAINS = ("arxiv", "book", "c4", "github", "tulu", "wikipedia")
Popularity = Callable[[float], Array]  # seconds -> [layers, experts], each layer sums to 1
_BURST_S = 60.0


class ScenarioError(ValueError):
    """The message says what is missing or wrong."""


def olmoe_domains(folder: Path, layers: int, experts: int, seed: int) -> Array:
    """[domains, layers, experts], shares. Raises ScenarioError."""
    counts = []
    for domain in DOMAINS:
        path = folder / f"olmoe__expert_counts__{domain}.npz"
        if not path.is_file():
            raise ScenarioError(f"{path} is missing: --olmoe names the folder with OLMoE's expert counts")
        counts.append(np.load(path)["a"].astype(np.float64))
    measured = np.stack(counts)  # [domains, measured layers, measured experts]
    measured /= measured.sum(axis=2, keepdims=True)
    rng = np.random.default_rng(seed)
    blocks = -(-experts // measured.shape[2])
    found = np.empty((len(DOMAINS), layers, experts))
    for layer in range(layers):
        picked = rng.integers(0, measured.shape[1], blocks)
        row = np.concatenate([measured[:, one] for one in picked], axis=1)
        found[:, layer] = row[:, rng.permutation(row.shape[1])[:experts]]
    return _shares(found)


def _shares(popularity: Array) -> Array:
    return np.asarray(popularity / popularity.sum(axis=-1, keepdims=True))


def mixed(domains: Array, weights: Callable[[float], Array]) -> Popularity:
    """A mixture of domains whose weights change with time."""

    def at(seconds: float) -> Array:
        given = weights(seconds)
        return np.tensordot(given / given.sum(), domains, 1)

    return at


def steady(domains: Array) -> Popularity:
    return mixed(domains, lambda seconds: np.ones(len(domains)))


def drifting(domains: Array, period_s: float) -> Popularity:
    """Each domain comes to the fore once in a period, and goes slowly: its weight is a bump around its turn."""
    turns = np.arange(len(domains)) / len(domains)

    def weights(seconds: float) -> Array:
        angle = 2 * np.pi * (seconds / period_s - turns)
        return np.exp(3.0 * np.cos(angle))

    return mixed(domains, weights)


def switching(domains: Array, every_s: float) -> Popularity:
    """One domain at a time, nine tenths of the tokens, and another one at once."""

    def weights(seconds: float) -> Array:
        found = np.full(len(domains), 0.1 / (len(domains) - 1))
        found[int(seconds // every_s) % len(domains)] = 0.9
        return found

    return mixed(domains, weights)


def bursty(domains: Array, every_s: float) -> Popularity:
    """An even mixture, and every now and then a minute in which one domain has half of the tokens."""

    def weights(seconds: float) -> Array:
        found = np.ones(len(domains))
        turn, within = divmod(seconds, every_s)
        if within < _BURST_S and turn:
            found[int(turn) % len(domains)] += len(domains)
        return found

    return mixed(domains, weights)


def zipf(layers: int, experts: int, exponent: float, every_s: float, seed: int) -> Popularity:
    """Zipf's law. Every `every_s` some pairs of neighbours in popularity change places, so that half of the experts'
    popularity is another one after some hundred such moments."""
    rng = np.random.default_rng(seed)
    law = np.arange(1, experts + 1) ** -exponent
    orders = np.stack([rng.permutation(experts) for _ in range(layers)])
    state = {"moment": 0}

    def at(seconds: float) -> Array:
        while state["moment"] < seconds // every_s:  # time only goes forward in a simulation
            state["moment"] += 1
            for order in orders:
                for place in rng.integers(0, experts - 8, experts // 16):
                    other = place + rng.integers(1, 8)
                    order[place], order[other] = order[other], order[place]
        popularity = np.empty((layers, experts))
        np.put_along_axis(popularity, orders, np.broadcast_to(law, (layers, experts)), axis=1)
        return _shares(popularity)

    return at


def scenarios(
    layers: int, experts: int, seconds: float, seed: int, olmoe: Path | None
) -> Iterator[tuple[str, Popularity]]:
    """Name and popularity. Without the folder of OLMoE's counts only the synthetic one."""
    if olmoe is not None:
        domains = olmoe_domains(olmoe, layers, experts, seed)
        yield "steady mixture", steady(domains)
        yield "slow drift", drifting(domains, seconds)
        yield "change of domain", switching(domains, seconds / len(DOMAINS))
        yield "bursts", bursty(domains, 300.0)
    yield "Zipf, drifting", zipf(layers, experts, 0.8, 60.0, seed)

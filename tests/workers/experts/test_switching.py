"""On the way from one placement to another every expert is always somewhere, and memory is never exceeded."""

from __future__ import annotations

import random

import pytest

from workers.experts.switching import Switch
from workers.protocol.experts import Placement, PlacementError

NUM_EXPERTS, NUM_LAYERS = 6, 4


def placement(version: int, rng: random.Random, shares: bool = False) -> Placement:
    layers, parts = [], []
    for _ in range(NUM_LAYERS):
        ranks: list[list[int]] = [[], [], []]
        for expert in range(NUM_EXPERTS):
            for rank in rng.sample(range(3), rng.choice([1, 1, 2])):
                ranks[rank].append(expert)
        layers.append(tuple(map(tuple, ranks)))
        count = [sum(expert in rank for rank in ranks) for expert in range(NUM_EXPERTS)]
        parts.append(tuple(tuple(1 / count[expert] for expert in rank) for rank in ranks))
    return Placement(version, tuple(layers), tuple(parts) if shares else None)


@pytest.mark.parametrize("seed", range(20))
def test_every_mixture_on_the_way_is_valid(seed: int) -> None:
    rng = random.Random(seed)
    now, aim = placement(1, rng, seed % 2 == 0), placement(2, rng, seed % 3 == 0)
    switch = Switch(now)
    switch.towards(aim)
    ready = 0
    while not switch.ended:
        ready += rng.randint(0, 2)
        before = switch.now
        changed = switch.advance(min(ready, NUM_LAYERS))
        switch.now.validate(NUM_EXPERTS, [NUM_EXPERTS] * 3, NUM_LAYERS)
        for layer in range(NUM_LAYERS):
            source = aim if layer < switch.done else now
            assert switch.now.layers[layer] == source.layers[layer]
            if before.layers[layer] != switch.now.layers[layer]:
                assert layer in changed
        assert switch.now.version == (2 if switch.ended else 1)
    assert switch.now == aim


@pytest.mark.parametrize("seed", range(20))
def test_room_is_judged_as_loading_meets_it(seed: int) -> None:
    """Layer after layer: what is new is loaded beside all that is used, then the old of that layer goes."""
    rng = random.Random(seed)
    now, aim = placement(1, rng), placement(2, rng)
    most = 0
    for rank in range(3):
        held = {(layer, e) for layer in range(NUM_LAYERS) for e in now.layers[layer][rank]}
        for layer in range(NUM_LAYERS):
            wanted = {(layer, expert) for expert in aim.layers[layer][rank]}
            most = max(most, len(held | wanted))
            held = {one for one in held if one[0] != layer} | wanted
        most = max(most, len(held))
    Switch(now).check_room(aim, [0, 1, 2], most)
    if any(set(aim.layers[i][r]) - set(now.layers[i][r]) for i in range(NUM_LAYERS) for r in range(3)):
        tight = max(sum(len(layer[rank]) for layer in now.layers) for rank in range(3))
        if tight < most:
            with pytest.raises(PlacementError, match=r"rank \d: layer \d brings"):
                Switch(now).check_room(aim, [0, 1, 2], most - 1)

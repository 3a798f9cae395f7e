"""Ranks of a group write what one engine with all experts writes, whatever happens meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workers.experts.engines import Group, expected, until
from workers.models.random_model import write_random_model
from workers.protocol.experts import Placement
from workers.protocol.messages import Sampling

GREEDY = Sampling(max_tokens=12, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", seed=3)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 40))] for _ in range(count)]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_tokens_on_any_number_of_ranks(model: Path, size: int, kernels: str) -> None:
    given = prompts(6)
    wanted = expected(model, given, GREEDY)
    with Group(model, size, engine={"kernels": kernels}) as group:
        waiting = [group.ranks[i % size].submit(prompt, GREEDY) for i, prompt in enumerate(given)]
        assert [result() for result in waiting] == wanted


def random_placement(
    version: int, num_layers: int, num_experts: int, size: int, rng: random.Random
) -> Placement:
    layers = []
    for _ in range(num_layers):
        ranks: list[list[int]] = [[] for _ in range(size)]
        for expert in range(num_experts):
            ranks[rng.randrange(size)].append(expert)
        for rank in ranks:  # copies of some
            rank += rng.sample(sorted(set(range(num_experts)) - set(rank)), rng.randint(0, 2))
            rng.shuffle(rank)
        layers.append(tuple(map(tuple, ranks)))
    return Placement(version, tuple(layers))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_ten_placements_while_tokens_flow(model: Path, kernels: str) -> None:
    given, rng = prompts(6), random.Random(5)
    wanted = expected(model, given, GREEDY)
    with Group(model, 3, slots=8, staging=1, engine={"kernels": kernels}) as group:
        for version in range(2, 12):
            placement = random_placement(version, 2, 8, 3, rng)
            waiting = [group.ranks[i % 3].submit(prompt, GREEDY) for i, prompt in enumerate(given)]
            for rank in group.ranks:
                rank.group.propose(placement)
            assert [result() for result in waiting] == wanted, f"under placement {version}"
            until(
                lambda v=version: all(rank.group.status.version == v for rank in group.ranks),  # type: ignore[misc]
                f"placement {version} is not in use: {[rank.group.status for rank in group.ranks]}",
            )
            for rank in group.ranks:
                number = rank.plane.place.rank
                assert rank.group.status.experts == tuple(ranks[number] for ranks in placement.layers)
                assert rank.group.holdings.num_held() == sum(map(len, rank.group.status.experts))
                assert rank.group.holdings.most_held <= rank.group.capacity


@pytest.mark.parametrize("exchange", ["shm", "gloo"])
def test_a_rank_that_is_lost_and_comes_back(model: Path, exchange: str) -> None:
    """First a follower, then the leader."""
    given = prompts(8)
    wanted = expected(model, given, GREEDY)
    with Group(model, 3, exchange=exchange) as group:
        for number, lost in enumerate((1, 0)):
            others = [rank for rank in group.ranks if rank.plane.place.rank != lost]
            waiting = [others[i % 2].submit(prompt, GREEDY) for i, prompt in enumerate(given)]
            group.ranks[lost].submit(given[0], GREEDY)
            steps = others[0].steps
            until(lambda: others[0].steps > steps + 2, "nothing moves")  # noqa: B023
            group.ranks[lost].stop()
            assert [result() for result in waiting] == wanted
            present = tuple(rank.plane.place.rank for rank in others)
            assert all(rank.group.status.members == present for rank in others)
            group.ranks[lost] = group.make(lost, epoch=2 + number)
            until(lambda: all(r.group.status.members == (0, 1, 2) for r in group.ranks), "it is not back")
            until(lambda: all(r.group.status.experts[0] for r in group.ranks), "it has no experts")
            waiting = [group.ranks[i % 3].submit(prompt, GREEDY) for i, prompt in enumerate(given)]
            assert [result() for result in waiting] == wanted


def test_without_memory_for_all_experts_it_waits_for_the_lost_rank(model: Path) -> None:
    given = prompts(2)
    wanted = expected(model, given, GREEDY)
    with Group(model, 2, slots=4) as group:
        first = group.ranks[0]
        waiting = [first.submit(prompt, GREEDY) for prompt in given]
        group.ranks[1].stop()
        until(lambda: first.group.status.lacking != "", "nothing was said")
        assert "8 experts do not fit on ranks 0, whose memory holds 4 each" in first.group.status.lacking
        group.ranks[1] = group.make(1, epoch=2)
        assert [result() for result in waiting] == wanted
        assert first.group.status.lacking == ""


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (Placement(3, (((0, 1, 2, 3), (4, 5, 6)),) * 2), "expert 7 is on no rank"),
        (Placement(3, (((0, 1, 2, 3, 4, 5), (6, 7)),) * 2), "its memory holds 5"),
        (Placement(3, (((0, 1, 2), (3, 4, 5), (6, 7)),) * 2), "unknown rank 2"),
        (Placement(3, (((0, 1, 2, 3), (4, 5, 6, 7)),)), "the placement has 1 layers, the model has 2"),
        (Placement(3, (((4, 5, 6, 7), (0, 1, 2, 3)),) * 2), "layer 0 brings 4 experts beside 8"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    model: Path, placement: Placement, reason: str
) -> None:
    with Group(model, 2, slots=5, staging=1) as group:
        for rank in group.ranks:
            rank.group.propose(placement)
        until(lambda: all(rank.group.status.refused == 3 for rank in group.ranks), "it was not refused")
        for rank in group.ranks:
            assert reason in rank.group.status.reason
            assert rank.group.status.version == 1
        waiting = group.ranks[0].submit(prompts(1)[0], GREEDY)
        assert waiting() == expected(model, prompts(1), GREEDY)[0]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_weights_come_from_other_ranks(model: Path, kernels: str) -> None:
    given = prompts(2)
    wanted = expected(model, given, GREEDY)
    with Group(model, 2, source="peers", slots=8, engine={"kernels": kernels}) as group:
        swapped = Placement(2, (((4, 5, 6, 7), (0, 1, 2, 3)),) * 2)
        for rank in group.ranks:
            rank.plane._own.load = None  # type: ignore[assignment]  # nothing can be read any more
            rank.group.propose(swapped)
        until(lambda: all(rank.group.status.version == 2 for rank in group.ranks), "not switched")
        waiting = [rank.submit(prompt, GREEDY) for rank, prompt in zip(group.ranks, given, strict=True)]
        assert [result() for result in waiting] == wanted


def test_idle_ranks_sleep(model: Path) -> None:
    with Group(model, 2) as group:
        group.ranks[0].submit(prompts(1)[0], GREEDY)()
        # A rank counts a step when it has ended: tokens are told a moment before.
        until(lambda: group.ranks[0].steps == group.ranks[1].steps > 0, "the other rank took no part")
        before = group.ranks[0].steps
        group.ranks[1].submit(prompts(1)[0], GREEDY)()
        until(
            lambda: group.ranks[0].steps == group.ranks[1].steps > before,
            "one made more steps than the other",
        )

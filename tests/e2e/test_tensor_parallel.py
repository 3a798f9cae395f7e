"""Workers of several tensor-parallel ranks, each a process: transformers' tokens, hand-over between different numbers of
ranks, and the loss of a rank."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest

from tests.e2e.local_cluster import LocalCluster
from tests.e2e.oracle import Oracle
from workers.models.random_model import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return write_random_model(tmp_path_factory.mktemp("tiny"), heads, seed=3)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    shared = [rng.randrange(3, 250) for _ in range(40)]
    return [shared[: rng.randrange(41)] + [rng.randrange(3, 250) for _ in range(100)] for _ in range(count)]


async def assert_handed_over(cluster: LocalCluster) -> None:
    """Right tokens would come, too, if the decode worker read every prompt itself."""
    loads = {name: status.load for name, status in (await cluster.status()).items()}
    assert loads["decode-0"].prompt_tokens == 0
    assert loads["prefill-0"].peers["decode-0"].sent_bytes > 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("ranks", "channels"),
    [
        ({"decode": 2}, ["shm"]),
        ({"prefill": 2}, ["shm"]),
        pytest.param({"prefill": 2, "decode": 4}, ["tcp"], marks=pytest.mark.slow),
        pytest.param({"prefill": 4, "decode": 2}, ["shm"], marks=pytest.mark.slow),
    ],
    ids=["1 to 2", "2 to 1", "2 to 4", "4 to 2"],
)
async def test_right_tokens_from_prefill_to_decode(
    model: Path, oracle: Oracle, ranks: dict[str, int], channels: list[str]
) -> None:
    """What has one rank computes with the native kernels, where there are some. Twice: out of the prefix caches then."""
    given = prompts(6)
    async with LocalCluster(
        model, tensor_parallel=ranks, transfer={"channels": channels}, timeout_s=20.0
    ) as cluster:
        for name in ("first", "second"):
            answers = await cluster.ask_all(given, name=name, max_tokens=24, ignore_eos=True)
            for prompt, answer in zip(given, answers, strict=True):
                assert oracle.fault(prompt, answer.tokens) is None
            if name == "first":
                await assert_handed_over(cluster)
        found = {m.info.role: m.info.ranks for m in cluster.dispatcher.fleet.members()}
        assert found == {"prefill": 1, "decode": 1} | ranks
        await cluster.assert_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
async def test_latents_that_every_rank_has_and_experts_cut_in_parts(tmp_path: Path, family: str) -> None:
    path = write_random_model(tmp_path, {"model_type": family, "max_position_embeddings": 2048}, seed=3)
    oracle, given = Oracle(path), prompts(4)
    async with LocalCluster(path, tensor_parallel={"prefill": 2, "decode": 4}, timeout_s=20.0) as cluster:
        answers = await cluster.ask_all(given, max_tokens=24, ignore_eos=True)
        for prompt, answer in zip(given, answers, strict=True):
            assert oracle.fault(prompt, answer.tokens) is None
        await assert_handed_over(cluster)
        await cluster.assert_at_rest()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("rank", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=["rank 1 killed", "rank 0 killed", "rank 1 stopped"],
)
async def test_streams_survive_the_loss_of_a_rank(
    model: Path, oracle: Oracle, rank: int, how: signal.Signals
) -> None:
    """Its worker ends as a whole; streams go on in the other one, and a new life serves beside it."""
    given = prompts(8)
    async with LocalCluster(
        model,
        prefill=0,
        decode=2,
        tensor_parallel={"decode": 2},
        router={"timeout_s": 3.0, "heartbeat_s": 0.2},
    ) as cluster:
        asking = asyncio.ensure_future(cluster.ask_all(given, max_tokens=120, ignore_eos=True))
        await cluster.wait_for_tokens(100)
        assert not asking.done(), "too late to disturb anything"
        process = cluster.processes["decode-0"]
        assert process.child is not None
        ranks = [process.child, *process.followers]
        ranks.pop(rank).signal(how)
        assert await asyncio.to_thread(ranks[0].ended, 30), "the other rank lives on"
        for follower in process.followers:
            follower.signal(signal.SIGCONT)
            assert await asyncio.to_thread(follower.ended, 30)
        cluster.launch("decode-0")
        for prompt, answer in zip(given, await asking, strict=True):
            assert len(answer.tokens) == 120
            assert oracle.fault(prompt, answer.tokens) is None
        await cluster.wait_for_workers()
        await cluster.assert_at_rest()

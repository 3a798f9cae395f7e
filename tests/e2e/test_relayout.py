"""Keys and values of a prompt go from two ranks in one process to one, two or four in another: the answer is the same.

P's engine computes the prompt, its cache is split among two ranks as tensor parallelism would, travels to the ranks of
the receiver, and is put together in D's engine, which decodes on it.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.e2e.oracle import Oracle
from tests.e2e.relayout_sender import SECRET, RankCaches, cache_of, open_engine
from workers.config import TransferConfig
from workers.engine.engine import Engine
from workers.engine.plan import StepResult
from workers.engine.request import Request
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling, Work, WorkerInfo
from workers.transfer.receiver import Receiver
from workers.transfer.tickets import Arrival, Tickets

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 24
_epochs = itertools.count(1)
GREEDY = Sampling(max_tokens=NEW_TOKENS, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_size": 96,
    }
    return write_random_model(tmp_path_factory.mktemp("four-heads"), config, seed=5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 16, 33, 150, 301)]
    return [*prompts, [*prompts[-1][:200], 7, 8, 9]]  # of which the receiver has some already


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """One engine alone; transformers agrees."""
    oracle = Oracle(model)
    answers = [completion.tokens for completion in open_engine(model).generate(prompts, GREEDY)]
    faults = [oracle.fault(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert not any(faults), faults
    return answers


class Sender:
    """P, in a process of its own."""

    def __init__(self, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.relayout_sender", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def send(self, **message: Any) -> str | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        code: str | None = json.loads(self.process.stdout.readline())["code"]
        return code


@pytest.fixture(scope="module")
def sender(model: Path) -> Iterator[Sender]:
    sender = Sender(model)
    yield sender
    sender.process.kill()
    sender.process.wait()


class Decode:
    """D: an engine, and as many ranks to receive for it."""

    def __init__(self, engine: Engine, ranks: int) -> None:
        self.engine = engine
        self.caches = RankCaches(engine.layout, engine.num_blocks, ranks)
        self.tokens: list[int] = []
        self.landed = threading.Event()
        self.lost = ""
        self.tickets = Tickets(engine, "d", next(_epochs), self._commit, self._lose)
        config = TransferConfig(channels=["shm", "tcp"])
        self.receiver = Receiver(self.tickets, self.caches.memories, engine.layout, config, secret=SECRET)
        self.tickets.endpoints, self.tickets.ranks = self.receiver.endpoints, ranks
        self.receiver.start(
            WorkerInfo(
                "d",
                self.tickets.epoch,
                "decode",
                "",
                "m",
                engine.layout,
                engine.hash_root,
                256,
                2048,
                8,
                259,
                "cpu",
                0,
            )
        )
        self.tickets.start()

    def _commit(self, arrival: Arrival) -> None:
        blocks = arrival.new.request.block_table.tolist()
        fresh = blocks[self.first_block :]
        self.caches.gather(cache_of(self.engine), fresh)
        self.tokens = [arrival.new.token]
        self.landed.set()

    def _lose(self, request: Request, code: str, reason: str) -> None:
        self.lost = f"{code}: {reason}"
        self.landed.set()

    def answer(self, sender: Sender, prompt: list[int], road: str) -> list[int]:
        self.landed.clear()
        with self.engine.lock:
            ticket = self.tickets.open(Request(Work("r", prompt, GREEDY)), "t", 10.0)
            assert ticket is not None
            self.first_block = ticket.first_block
        assert sender.send(prompt=prompt, ticket=msgspec.to_builtins(ticket), road=road) is None
        assert self.landed.wait(20)
        assert not self.lost

        def collect(result: StepResult) -> None:
            self.tokens += [new.token for new in result.tokens]

        while self.engine.scheduler.has_work:
            self.engine.step(collect)
        return self.tokens

    def stop(self) -> None:
        self.receiver.stop()
        self.tickets.stop()


@pytest.mark.parametrize("road", ["shm", "tcp"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_tokens_whatever_the_ranks(
    model: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    sender: Sender,
    ranks: int,
    road: str,
) -> None:
    engine = open_engine(model)
    d = Decode(engine, ranks)
    answers = []
    for prompt in prompts:
        answers.append(d.answer(sender, prompt, road))
    assert d.first_block == 200 // engine.layout.block_size, "the last prompt was here in part"
    assert answers == expected
    engine.pool.check()
    assert engine.pool.num_referenced == 0
    d.stop()


def test_a_wrong_head_would_be_seen(
    model: Path, prompts: list[list[int]], expected: list[list[int]], sender: Sender
) -> None:
    """The oracle's edge: with two ranks' heads exchanged on arrival the tokens are others."""
    d = Decode(open_engine(model), 2)
    (first, one), (second, other) = d.caches._parts
    d.caches._parts = [(first, other), (second, one)]
    answers = [d.answer(sender, prompt, "shm") for prompt in prompts[2:5]]
    assert all(a != e for a, e in zip(answers, expected[2:5], strict=True))
    d.stop()

"""Whole workers whose steps overlap: hand-over, cancels and ends in the middle of a second step."""

from __future__ import annotations

import pytest

from tests.workers.engine.late_runner import Late
from tests.workers.test_worker import Client, Start, alone, at_rest, local, model, remote, start, until  # noqa: F401
from workers.engine.engine import Engine
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Prefill,
    PrefillDone,
    Sampling,
    Ticketed,
    Tokens,
    Work,
)
from workers.worker import Worker

PROMPTS = [list(range(30 + 7 * n, 60 + 20 * n)) for n in range(4)]
SAMPLINGS = [
    Sampling(max_tokens=30, seed=1, temperature=0.0, ignore_eos=True),
    Sampling(max_tokens=25, seed=2, temperature=0.9, logprobs=1, stop_token_ids=tuple(range(0, 256, 9))),
    Sampling(max_tokens=20, seed=3, temperature=0.7, ignore_eos=True),
    Sampling(max_tokens=15, seed=4, temperature=0.7, frequency_penalty=0.3),
]


def overlapping(worker: Worker) -> Late:
    worker.engine.runner = runner = Late(worker.engine.runner)  # type: ignore[assignment]
    return runner


def collect(client: Client, names: set[str]) -> dict[str, list[int]]:
    """Tokens of each, in order and without a gap, until all have ended."""
    tokens: dict[str, list[int]] = {}
    while names:
        message = client.next(Tokens, Accepted)
        for delta in message.deltas if isinstance(message, Tokens) else ():
            mine = tokens.setdefault(delta.request_id, [])
            assert delta.index == len(mine)
            mine += delta.tokens
            if delta.finish_reason is not None:
                names = names - {delta.request_id}
    return tokens


def test_requests_beside_each_other_some_cancelled_some_ended_early(start: Start, alone: Engine) -> None:  # noqa: F811
    expected = [c.tokens for c in alone.generate(PROMPTS, SAMPLINGS)]
    worker = start(max_num_batched_tokens=40, max_num_seqs=8)
    runner = overlapping(worker)
    client = Client(worker.info.address)
    works = [Work(f"w{n}", *given) for n, given in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))]
    unwanted = [Work(f"no{n}", [n, 5, 6], SAMPLINGS[0]) for n in range(3)]
    for pair in zip(works, [*unwanted, None], strict=True):
        for w in filter(None, pair):
            client.send(local(w))
    for w in unwanted:
        client.send(Cancel(w.request_id))
    tokens = collect(client, {w.request_id for w in works})
    assert [tokens[w.request_id] for w in works] == expected
    until(lambda: at_rest(worker))
    assert runner.most_waiting == 2
    assert runner.num_carried > 0
    # The same again: nothing wrong was cached by what had been computed for nothing.
    for w in works:
        client.send(local(Work(f"{w.request_id}-again", w.prompt, w.sampling)))
    tokens = collect(client, {f"{w.request_id}-again" for w in works})
    assert [tokens[f"{w.request_id}-again"] for w in works] == expected
    until(lambda: at_rest(worker))


@pytest.mark.parametrize("road", ["shm", "tcp"])
def test_chunks_are_sent_when_they_are_computed_not_when_they_are_scheduled(
    start: Start,  # noqa: F811
    alone: Engine,  # noqa: F811
    road: str,
) -> None:
    transfer = {"channels": [road], "layer_groups": 2}
    d, p = (
        start(role, transfer=transfer, max_num_batched_tokens=16, max_num_seqs=8)
        for role in ("decode", "prefill")
    )
    runner = overlapping(p)
    overlapping(d)
    runner.delay_s = 0.01  # whatever is sent before it is computed has left by then
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    works = [Work(f"w{n}", *given) for n, given in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))]
    tickets = []
    for w in works:
        to_d.send(remote(w))
        tickets.append(to_d.next(Ticketed).ticket)
    for w, ticket in zip(works, tickets, strict=True):
        to_p.send(Prefill(w, ticket))
    tokens = collect(to_d, {w.request_id for w in works})
    assert {to_p.next(PrefillDone).request_id for _ in works} == set(tokens)
    assert runner.most_waiting == 2
    expected = alone.generate(PROMPTS, SAMPLINGS)
    assert [tokens[w.request_id] for w in works] == [c.tokens for c in expected]
    until(lambda: at_rest(d) and at_rest(p))

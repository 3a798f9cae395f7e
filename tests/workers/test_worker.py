"""A whole worker, driven over its token port by a plain socket client."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from workers.config import EngineConfig, TransferConfig, WorkerConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.frames import (
    ProtocolError,
    from_worker,
    greet,
    recv_frame,
    send_frame,
)
from workers.protocol.messages import (
    Accepted,
    Cancel,
    Failed,
    Heartbeat,
    KvEndpoint,
    Ping,
    Prefill,
    PrefillDone,
    PrefixHolder,
    Reserve,
    Room,
    Sampling,
    StatusReply,
    StatusRequest,
    Ticketed,
    Tokens,
    Work,
)
from workers.worker import Worker

SECRET = "a secret of the tests"
_ids = itertools.count()


class Client:
    """A router, as seen from a worker."""

    def __init__(self, address: str, secret: str = SECRET) -> None:
        host, port = address.split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=10)
        self.info = greet(self.sock, secret.encode(), "router", from_worker)

    def send(self, message: Any) -> None:
        send_frame(self.sock, message)

    def next(self, *kinds: type) -> Any:
        """The next message of one of the kinds; heartbeats are passed over unless asked for."""
        while True:
            message = recv_frame(self.sock, from_worker)
            if isinstance(message, kinds):
                return message
            assert isinstance(message, Heartbeat), f"unexpected {message}"

    def tokens(self, request_id: str) -> list[int]:
        """Until the request ends; checks that indices have no gap."""
        tokens: list[int] = []
        while True:
            for delta in self.next(Tokens).deltas:
                assert delta.request_id == request_id
                assert delta.index == len(tokens)
                tokens += delta.tokens
                if delta.finish_reason is not None:
                    return tokens

    def status(self, **want: bool) -> StatusReply:
        self.send(StatusRequest(query_id=next(_ids), **want))
        while True:
            message = recv_frame(self.sock, from_worker)
            if isinstance(message, StatusReply):
                return message

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("m"), {"max_position_embeddings": 512}, seed=3)


@pytest.fixture(scope="module")
def alone(model: Path) -> Engine:
    """The same model in one process: what any placement must answer."""
    return Engine(EngineConfig(dtype="float32", num_blocks=64, num_threads=1), prepare_model(str(model)))


Start = Callable[..., Worker]


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    workers: list[Worker] = []

    def launch(
        role: str = "decode", timeout_s: float = 5.0, transfer: dict[str, Any] | None = None, **engine: Any
    ) -> Worker:
        worker = Worker(
            WorkerConfig(
                worker_id=f"{role}-{len(workers)}",
                epoch=1,
                role=role,  # type: ignore[arg-type]
                model_path=model,
                served_name="tiny",
                cluster="c",
                secret=SECRET,
                heartbeat_s=0.1,
                timeout_s=timeout_s,
                transfer=TransferConfig(**(transfer or {})),
                engine=EngineConfig(**({"dtype": "float32", "num_blocks": 64, "num_threads": 1} | engine)),
            )
        )
        worker.start()
        workers.append(worker)
        return worker

    yield launch
    for worker in workers:
        worker.stop()


def work(prompt: list[int] | None = None, max_tokens: int = 8, **kwargs: Any) -> Work:
    sampling = Sampling(max_tokens=max_tokens, seed=1, temperature=0.0, ignore_eos=True)
    return Work(f"q{next(_ids)}", [5, 6, 7] if prompt is None else prompt, sampling, **kwargs)


def local(w: Work) -> Reserve:
    return Reserve(w, f"t-{w.request_id}", 5.0, 2**31 - 1)


def remote(w: Work, lease_s: float = 5.0) -> Reserve:
    return Reserve(w, f"t-{w.request_id}", lease_s, 0)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def at_rest(worker: Worker) -> bool:
    load = worker.serving.load()
    worker.serving.check()
    return (
        worker.engine.pool.num_referenced == 0
        and worker.serving.num_requests() == 0
        and not worker.engine.scheduler.requests
        and load.sending == 0
    )


def test_a_request_is_served_and_leaves_nothing(start: Start, alone: Engine) -> None:
    worker = start()
    client = Client(worker.info.address)
    w = work()
    client.send(local(w))
    assert client.next(Accepted).request_id == w.request_id
    tokens = client.tokens(w.request_id)
    assert tokens == alone.generate([w.prompt], w.sampling)[0].tokens
    until(lambda: at_rest(worker))


def test_tokens_given_are_gone_on_from(start: Start) -> None:
    """The same request placed anew in the middle of its answer continues as if nothing had happened."""
    worker = start()
    client = Client(worker.info.address)
    whole = work([9, 8, 7, 6], max_tokens=12)
    client.send(local(whole))
    client.next(Accepted)
    tokens = client.tokens(whole.request_id)
    rest = msgspec.structs.replace(whole, request_id="rest", output=tokens[:5])
    client.send(local(rest))
    client.next(Accepted)
    deltas = []
    while len(deltas) < 7:
        deltas += client.next(Tokens).deltas
    assert [d.index for d in deltas] == list(range(5, 12))
    assert [t for d in deltas for t in d.tokens] == tokens[5:]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (work([]), "the prompt is empty"),
        (work([1] * 500, max_tokens=100), "exceed the 512 tokens"),
        (work([1, 10**6]), "token id 1000000 is outside the vocabulary"),
        (work([1], max_tokens=2, output=[1, 2]), "max_tokens is 2"),
        (Work("bias", [1], Sampling(2, seed=1, logit_bias={10**6: 1.0})), "token id 1000000 is outside"),
        (Work("stop", [1], Sampling(2, seed=1, stop_token_ids=(10**6,))), "token id 1000000 is outside"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(start: Start, bad: Work, says: str) -> None:
    client = Client(start().info.address)
    client.send(local(bad))
    failed = client.next(Failed)
    assert (failed.code, failed.request_id) == ("invalid", bad.request_id)
    assert says in failed.message


@pytest.mark.parametrize(
    ("road", "transfer"),
    [
        ("shm", {}),
        ("shm", {"layer_groups": 64}),
        ("tcp", {"channels": ["tcp"], "tcp_streams": 1}),
        ("tcp", {"channels": ["tcp"], "tcp_streams": 3, "layer_groups": 2}),
    ],
)
def test_prefill_and_decode_between_two_workers(
    start: Start, alone: Engine, road: str, transfer: dict[str, Any]
) -> None:
    chunks = {"max_num_batched_tokens": 40, "max_num_seqs": 8}
    d, p = start("decode", transfer=transfer), start("prefill", transfer=transfer, **chunks)
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    w = work(list(range(3, 100)))
    to_d.send(remote(w))
    ticket = to_d.next(Ticketed).ticket
    assert (ticket.first_block, ticket.num_blocks) == (0, 7)
    to_p.send(Prefill(w, ticket))
    done = to_p.next(PrefillDone)
    assert done.transfer_bytes == 7 * d.info.layout.block_bytes
    assert done.channel == road
    assert to_d.tokens(w.request_id) == alone.generate([w.prompt], w.sampling)[0].tokens
    again = msgspec.structs.replace(w, request_id="again")
    to_d.send(remote(again))
    assert to_d.next(Ticketed).ticket.first_block == 6, "the decode worker has the full blocks"
    to_d.send(Cancel("again"))
    until(lambda: at_rest(d) and at_rest(p))
    assert to_p.status().load.peers["decode-0"].road == road


def holder_of(worker: Worker, num_blocks: int) -> PrefixHolder:
    return PrefixHolder(worker.info.worker_id, 1, num_blocks, worker.info.endpoints)


def held_by(worker: Worker, prompt: list[int]) -> list[int]:
    """Let it serve the prompt, so that the prefix is cached there; the whole answer."""
    client = Client(worker.info.address)
    w = work(prompt)
    client.send(local(w))
    client.next(Accepted)
    return client.tokens(w.request_id)


def test_a_decode_worker_fetches_the_prefix_that_another_has(start: Start, alone: Engine) -> None:
    first, second = start("decode"), start("decode")
    prompt = list(range(3, 100))
    held_by(first, prompt)
    client = Client(second.info.address)
    w = work([*prompt, 7, 7])
    client.send(Reserve(w, "t", 5.0, local_prefill_max=16, holder=holder_of(first, 6)))
    assert client.next(Accepted).cached_tokens == 96, "no prefill worker is needed"
    assert client.tokens(w.request_id) == alone.generate([w.prompt], w.sampling)[0].tokens
    until(lambda: at_rest(first) and at_rest(second))
    assert first.serving.load().peers["decode-1"].sent_bytes == 6 * first.info.layout.block_bytes


def test_a_prefill_worker_fetches_what_the_decode_worker_has(start: Start, alone: Engine) -> None:
    d, p = start("decode"), start("prefill")
    prompt = list(range(3, 100))
    held_by(d, prompt)
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    w = work([*prompt, *range(150, 210)])
    to_d.send(Reserve(w, "t", 5.0, local_prefill_max=16, holder=None))
    ticket = to_d.next(Ticketed).ticket
    assert ticket.first_block == 6
    to_p.send(Prefill(w, ticket, holder_of(d, 6)))
    done = to_p.next(PrefillDone)
    assert done.cached_tokens == 96, "not computed again"
    assert done.transfer_bytes == 4 * d.info.layout.block_bytes
    assert to_d.tokens(w.request_id) == alone.generate([w.prompt], w.sampling)[0].tokens
    until(lambda: at_rest(d) and at_rest(p))


def test_a_holder_that_is_gone_or_holds_nothing_only_costs_the_computing(start: Start, alone: Engine) -> None:
    first, second = start("decode"), start("decode")
    gone = PrefixHolder("decode-9", 1, 6, [KvEndpoint("tcp", "127.0.0.1:1")])
    restarted = PrefixHolder(first.info.worker_id, 7, 6, first.info.endpoints)
    client = Client(second.info.address)
    for number, holder in enumerate((gone, restarted, holder_of(first, 6))):
        w = work([number + 1, *range(3, 100)])
        client.send(Reserve(w, f"t{number}", 5.0, local_prefill_max=10**6, holder=holder))
        assert client.next(Accepted).cached_tokens == 0
        assert client.tokens(w.request_id) == alone.generate([w.prompt], w.sampling)[0].tokens
    until(lambda: at_rest(first) and at_rest(second))


def test_workers_that_do_not_fit_each_other_say_how(start: Start) -> None:
    d, p = start("decode"), start("prefill", block_size=8)
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    w = work(list(range(3, 60)))
    to_d.send(remote(w))
    to_p.send(Prefill(w, to_d.next(Ticketed).ticket))
    failed = to_p.next(Failed)
    assert failed.code == "transfer_failed"
    assert "block size is 8 here and 16 on decode-0" in failed.message

    until(lambda: at_rest(p))


def test_a_prefill_worker_too_small_for_the_prompt_is_no_fault_of_the_client(start: Start) -> None:
    d, p = start("decode"), start("prefill", num_blocks=3)
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    w = work(list(range(3, 60)))
    to_d.send(remote(w))
    to_p.send(Prefill(w, to_d.next(Ticketed).ticket))
    failed = to_p.next(Failed)
    assert failed.code == "transfer_failed"
    assert "48 tokens that this worker can hold" in failed.message


def test_a_context_that_the_model_has_not_is_refused(start: Start) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 1000, but the model goes up to 512"):
        start(max_model_len=1000)


def test_a_ticket_for_another_prompt_is_refused(start: Start) -> None:
    d, p = start("decode"), start("prefill")
    to_d, to_p = Client(d.info.address), Client(p.info.address)
    w = work(list(range(3, 60)))
    to_d.send(remote(w))
    ticket = to_d.next(Ticketed).ticket
    to_p.send(Prefill(msgspec.structs.replace(w, prompt=[1] * 100), ticket))
    assert "the prompt has 7" in to_p.next(Failed).message
    gone = msgspec.structs.replace(ticket, endpoints=[KvEndpoint("tcp", "127.0.0.1:1")])
    to_p.send(Prefill(w, gone))
    failed = to_p.next(Failed)
    assert "no channel to decode-0" in failed.message
    until(lambda: at_rest(p))


def test_lease_without_progress_ends_aloud(start: Start) -> None:
    worker = start()
    client = Client(worker.info.address)
    w = work(list(range(3, 60)))
    client.send(remote(w, lease_s=0.3))
    client.next(Ticketed)
    failed = client.next(Failed)
    assert (failed.code, failed.request_id) == ("lease_expired", w.request_id)
    until(lambda: at_rest(worker))


def test_busy_and_then_room(start: Start) -> None:
    worker = start(num_blocks=8)
    client = Client(worker.info.address)
    first, second = work([3] * 80), work([4] * 80)
    client.send(remote(first))
    client.next(Ticketed)
    for message in (remote(second), local(second)):
        client.send(message)
        failed = client.next(Failed)
        assert failed.code == "busy"
        assert "5 blocks wanted, 3 of 8 are free" in failed.message
    client.send(Cancel(first.request_id))
    while client.next(Heartbeat).load.free_blocks < 8:
        pass
    client.send(local(second))
    client.next(Accepted)
    client.tokens(second.request_id)
    until(lambda: at_rest(worker))


class Owner:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def send(self, message: Any) -> None:
        self.got.append(message)

    def answers(self, kind: type) -> list[Any]:
        return [message for message in self.got if isinstance(message, kind)]


def test_who_was_refused_for_the_queue_hears_of_its_first_step(start: Start) -> None:
    """Not at the end of a request only, and once however many steps follow."""
    worker = start(max_num_batched_tokens=16, max_num_seqs=16, max_queued_tokens=32)
    serving, owner, told = worker.serving, Owner(), []
    serving._on_room = lambda: told.append(serving.load())
    with worker.engine.lock:  # no step is taken meanwhile
        for number in range(5):
            serving.reserve(owner, local(work([10 + number] * 12, max_tokens=60)))
        assert not told
        assert len(owner.answers(Accepted)) == 3
        (refused, _) = owner.answers(Failed)
        assert refused.code == "busy"
        assert refused.lacks == Room(tokens=1)
        assert "36 prompt tokens wait" in refused.message
    until(lambda: at_rest(worker))
    assert len(told) == 1
    assert told[0].running, "nobody had ended"
    assert told[0].room.covers(refused.lacks)


def test_a_router_that_leaves_takes_its_requests_with_it(start: Start) -> None:
    worker = start()
    leaving, staying = Client(worker.info.address), Client(worker.info.address)
    kept = work(max_tokens=200)
    staying.send(local(kept))
    staying.next(Accepted)
    leaving.send(local(work(max_tokens=400)))
    leaving.send(remote(work(list(range(3, 60)))))
    leaving.next(Accepted, Ticketed)
    leaving.next(Accepted, Ticketed, Tokens)
    leaving.close()
    assert len(staying.tokens(kept.request_id)) == 200
    until(lambda: at_rest(worker))


def test_a_silent_router_is_cut_off(start: Start) -> None:
    worker = start(timeout_s=0.5)
    client = Client(worker.info.address)
    client.send(remote(work(list(range(3, 60)))))
    client.next(Ticketed)
    for _ in range(8):
        time.sleep(0.1)
        client.send(Ping(0.0))
    assert worker.serving.num_requests() == 1, "pings keep it"
    until(lambda: at_rest(worker))


def test_bad_peers_do_not_disturb_others(start: Start) -> None:
    worker = start()
    client = Client(worker.info.address)
    with pytest.raises(ProtocolError, match="wrong cluster secret"):
        Client(worker.info.address, "another secret of 16+")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x05\0\0\0\xc1\xc1\xc1\xc1\xc1"):
        host, port = worker.info.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            sock.sendall(garbage)
            sock.settimeout(10)
            while sock.recv(4096):
                pass
    spoiled = Client(worker.info.address)
    spoiled.sock.sendall(b"\x01\0\0\0\xc1")
    w = work()
    client.send(local(w))
    client.next(Accepted)
    assert len(client.tokens(w.request_id)) == 8


def test_the_same_request_twice_is_refused_and_the_first_goes_on(start: Start) -> None:
    client = Client(start().info.address)
    count = 400
    w = work(max_tokens=count)
    client.send(local(w))
    client.next(Accepted)
    client.send(local(w))
    tokens = 0
    failed = None
    while tokens < count or failed is None:
        message = client.next(Failed, Tokens)
        if isinstance(message, Failed):
            failed = message
        else:
            tokens += sum(len(d.tokens) for d in message.deltas)
    assert "already here" in failed.message


def test_a_step_that_fails_takes_down_its_requests_and_nothing_else(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    client = Client(worker.info.address)
    run = worker.engine.runner.run

    def broken(step: Any) -> Any:
        monkeypatch.setattr(worker.engine.runner, "run", run)
        raise MemoryError("no memory left on the device")

    monkeypatch.setattr(worker.engine.runner, "run", broken)
    client.send(local(work()))
    client.next(Accepted)
    failed = client.next(Failed)
    assert failed.code == "internal"
    assert "no memory left on the device" in failed.message
    until(lambda: at_rest(worker))
    w = work()
    client.send(local(w))
    client.next(Accepted)
    assert len(client.tokens(w.request_id)) == 8


def test_status_tells_hashes_and_metrics(start: Start) -> None:
    worker = start()
    client = Client(worker.info.address)
    w = work([7] * 40)
    client.send(local(w))
    client.next(Accepted)
    client.tokens(w.request_id)
    reply = client.status(want_hashes=True, want_metrics=True)
    assert set(reply.hashes) == {h for h, _ in worker.engine.pool.cached_hashes()}
    assert len(reply.hashes) == 2
    families = {f.name: f for f in text_string_to_metric_families(reply.metrics.decode())}
    [sample] = families["headrace_kv_blocks"].samples
    assert sample.labels == {"worker": "decode-0", "role": "decode", "model_name": "tiny"}
    assert sample.value == 64
    assert families["headrace_output_tokens"].samples[0].value == 8
    outcomes = {
        s.labels["outcome"]: s.value
        for s in families["headrace_worker_requests"].samples
        if s.name.endswith("_total")
    }
    assert outcomes == {"length": 1}


def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has(start: Start, alone: Engine) -> None:
    worker = start()
    client = Client(worker.info.address)
    running = work(max_tokens=400)
    client.send(local(running))
    client.next(Accepted)
    first = client.next(Tokens).deltas
    with ThreadPoolExecutor() as pool:
        drained = pool.submit(worker.drain, 30.0)
        until(lambda: worker.serving._draining)
        late = Client(worker.info.address)
        late.send(local(work()))
        assert late.next(Failed).code == "draining"
        tokens = [token for delta in first for token in delta.tokens]
        while len(tokens) < 400:
            tokens += [token for delta in client.next(Tokens).deltas for token in delta.tokens]
        assert drained.result() is True
    assert tokens == alone.generate([running.prompt], running.sampling)[0].tokens
    assert at_rest(worker)


def test_a_drain_waits_for_tickets_and_says_when_its_time_is_over(start: Start) -> None:
    worker = start()
    client = Client(worker.info.address)
    held = work(list(range(3, 60)))
    client.send(remote(held, lease_s=30.0))
    client.next(Ticketed)
    assert worker.drain(0.3) is False
    client.send(Cancel(held.request_id))
    assert worker.drain(10.0) is True

"""The life of a request, against fake workers that fail at every stage."""

from __future__ import annotations

import asyncio
import random

import pytest

from router.config import AdmissionConfig, PolicyConfig
from router.generation import Generation, InvalidRequest, Overloaded, Unavailable
from router.policy import PREFILL_EVERYTHING
from tests.router.fake_cluster import FakeCluster, generation, until
from tests.router.fake_worker import expected_output
from workers.protocol.messages import Sampling


def once(stage: str, order: str, after: int = 0):
    """A hook that gives `order` at the stage's occurrence number `after`, and nothing ever after."""
    left = [after]

    def hook(at: str, work) -> str | None:
        if at != stage or left[0] < 0:
            return None
        left[0] -= 1
        return order if left[0] < 0 else None

    return hook


async def test_prefill_on_p_decode_on_d(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        await cluster.check(generation())
        assert "Prefill" in cluster["p0"].seen
        assert "Reserve" in cluster["d0"].seen
        assert "Cancel" not in cluster["d0"].seen + cluster["p0"].seen  # nothing was left to free
        assert cluster["d0"].reserves[0].local_prefill_max == 64
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == 1
        assert cluster.metric("headrace_dispatch_prefills_total", where="remote") == 1
        await cluster.at_rest()


async def test_the_last_chunk_tells_how_it_ended(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        wanted = expected_output(generation().prompt, Sampling(max_tokens=20, seed=7))
        request = generation(stop_token_ids=(wanted[9],))
        chunks = [chunk async for chunk in cluster.dispatcher.generate(request)]
        assert [t for chunk in chunks for t in chunk.tokens] == wanted[:10]
        assert (chunks[-1].finish_reason, chunks[-1].stop_token) == ("stop", wanted[9])
        await cluster.at_rest()


async def test_a_reader_that_stops_at_the_last_chunk(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        stream = cluster.dispatcher.generate(generation())
        async for chunk in stream:
            if chunk.finish_reason is not None:
                break
        await stream.aclose()
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == 1
        assert "Cancel" not in cluster["d0"].seen
        await cluster.at_rest()


async def test_a_short_prompt_is_prefilled_by_d(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        await cluster.check(generation(prompt=40))
        assert "Prefill" not in cluster["p0"].seen
        assert cluster.metric("headrace_dispatch_prefills_total", where="local") == 1
        await cluster.at_rest()


async def test_without_prefill_workers_d_does_it_all(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(prefills=0)
        await cluster.check(generation())
        assert cluster["d0"].reserves[0].local_prefill_max == PREFILL_EVERYTHING
        await cluster.at_rest()


async def test_the_second_request_goes_where_its_prefix_is(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=4, prefills=2)
        await cluster.check(generation())
        first = next(w for w in cluster.workers if w.role == "decode" and w.reserves)
        await until(lambda: cluster.dispatcher.index.num_blocks(first.worker_id) == 13)
        for number in range(5):
            await cluster.check(generation(max_tokens=25 + number))
        assert len(first.reserves) == 6
        assert cluster.metric("headrace_dispatch_prefills_total", where="local") == 5
        await cluster.at_rest()


async def test_the_index_is_wrong_and_d_wants_blocks_after_all(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        info = cluster["d0"].info
        request = generation()
        await cluster.check(request)
        await until(lambda: cluster.dispatcher.index.num_blocks("d0") == 13)
        cluster["d0"].cache.clear()  # and nothing was said about it
        await cluster.check(request)
        assert cluster["d0"].seen.count("Reserve") == 2
        assert cluster["p0"].seen.count("Prefill") == 2
        assert cluster.dispatcher.index.position("d0", info.epoch) is not None
        await cluster.at_rest()


async def test_busy_workers_make_the_request_wait_and_room_wakes_it(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(num_blocks=15)  # one request at a time
        requests = [generation(n, max_tokens=10) for n in range(6)]
        await asyncio.gather(*(cluster.check(r) for r in requests))
        await cluster.at_rest()
        assert cluster.metric("headrace_dispatch_placements_total", outcome="busy") >= 1
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == 6


async def test_a_worker_that_refused_says_when_there_is_room(valkey):
    async with FakeCluster(valkey.url, timeout_s=120) as cluster:
        await cluster.start(num_blocks=15, heartbeat_s=60)  # no heartbeat comes before the queue's time-out
        await asyncio.gather(*(cluster.check(generation(n, max_tokens=5)) for n in range(4)))
        await cluster.at_rest()


async def test_who_needs_less_than_was_refused_is_still_sent_there(valkey):
    """A large prompt waits for most of the only worker's blocks; what needs few of them has run meanwhile."""
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=1, prefills=1, num_blocks=60)
        holding = asyncio.create_task(cluster.check(generation(1, prompt=400, max_tokens=300)))
        await until(lambda: cluster["d0"].used_blocks > 0)
        link = cluster.dispatcher.fleet.link("d0")
        large = asyncio.create_task(cluster.generate(generation(2, prompt=700)))
        await until(lambda: link.busy)
        assert link.may_take(20)
        assert not link.may_take(44)
        large.cancel()
        await asyncio.wait([large])
        await cluster.check(generation(3, prompt=100))
        assert not holding.done()
        await holding
        await until(lambda: not link.busy)
        await cluster.at_rest()


@pytest.mark.parametrize("prefills", [0, 2])
async def test_at_overload_few_more_decisions_are_made_than_requests(valkey, prefills, monkeypatch):
    """Those who wait are not woken to be refused: one refusal, and one decision, for each time that there is room."""
    admission = AdmissionConfig(queue_timeout_s=60, max_queue=1000)
    async with FakeCluster(valkey.url, admission=admission) as cluster:
        # Two or three at a time on each, and many heartbeats in the time that one takes.
        await cluster.start(decodes=6, prefills=prefills, num_blocks=40, step_s=0.01, heartbeat_s=0.01)
        policy, decisions = cluster.dispatcher._policy, 0
        choose = policy.choose

        def counted(*args, **kwargs):
            nonlocal decisions
            decisions += 1
            return choose(*args, **kwargs)

        monkeypatch.setattr(policy, "choose", counted)
        requests = [generation(n, prompt=150 + 10 * (n % 11), max_tokens=8) for n in range(150)]
        await asyncio.gather(*(cluster.check(r) for r in requests))
        await cluster.at_rest()
        assert decisions <= 4 * len(requests)


async def test_a_full_queue_is_429_and_a_long_wait_503(valkey):
    admission = AdmissionConfig(max_queue=1, queue_timeout_s=0.3)
    async with FakeCluster(valkey.url, admission=admission) as cluster:
        await cluster.start(hook=lambda stage, work: "busy" if stage == "reserve" else None)
        waits = asyncio.create_task(cluster.generate(generation(1)))
        await until(lambda: cluster.dispatcher.admission.waiting == 1)
        with pytest.raises(Overloaded) as overloaded:
            await cluster.generate(generation(2))
        assert overloaded.value.retry_after_s >= 1
        with pytest.raises(Unavailable):
            await waits
        await cluster.at_rest()


async def test_invalid_is_the_clients_error(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(hook=once("reserve", "invalid"))
        with pytest.raises(InvalidRequest, match="told to be invalid"):
            await cluster.generate(generation())
        await cluster.at_rest()


DEATHS_OF_D = [
    ("reserve", 0),  # before it answers
    ("ticketed", 0),  # after the ticket
    ("commit", 0),  # when the blocks have arrived
    ("token", 0),
    ("token", 7),  # mid-stream
    ("token", 19),  # before the last token
]


@pytest.mark.parametrize(("stage", "after"), DEATHS_OF_D)
@pytest.mark.parametrize("order", ["die", "stall"])
async def test_d_dies_and_the_stream_goes_on_elsewhere(valkey, stage, after, order):
    async with FakeCluster(valkey.url, timeout_s=0.4) as cluster:
        await cluster.start(decodes=2, prefills=1, hook=once(stage, order, after))
        await cluster.check(generation())
        lost = [
            cluster.metric("headrace_dispatch_placements_total", outcome=outcome)
            for outcome in ("link_lost", "transfer_failed")  # whoever of D's link and P tells first
        ]
        assert sum(lost) == 1
        last = max((w.reserves[-1] for w in cluster.workers if w.reserves), key=lambda r: r.work.request_id)
        sent = after if stage == "token" else 0
        assert len(last.work.output) == sent  # it went on, it did not start again
        await cluster.at_rest()


@pytest.mark.parametrize("stage", ["prefill", "prefilled"])
@pytest.mark.parametrize("order", ["die", "stall", "internal", "drop"])
async def test_p_dies_and_the_request_starts_again(valkey, stage, order):
    # Where the link tells, the lease is so long that it can't be first, however busy the machine is.
    lease_s = 0.5 if order == "drop" else 60.0
    async with FakeCluster(valkey.url, timeout_s=0.4, lease_s=lease_s) as cluster:
        await cluster.start(decodes=1, prefills=2)
        for worker in cluster.workers:
            if worker.role == "prefill":
                worker.hook = hook = once(stage, order)
        cluster["p0"].hook = hook  # one failure in all
        await cluster.check(generation())
        outcome = {"internal": "internal", "drop": "lease_expired"}.get(order, "link_lost")
        assert cluster.metric("headrace_dispatch_placements_total", outcome=outcome) == 1
        assert "Cancel" in cluster["d0"].seen or order == "drop"
        await cluster.at_rest()


async def test_p_dies_after_it_was_done_and_nobody_notices(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        cluster["p0"].hook = once("done", "die")
        await cluster.check(generation(max_tokens=100))
        assert cluster["d0"].seen.count("Reserve") == 1
        await cluster.at_rest()


async def test_all_prefill_workers_die_and_d_prefills(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(prefills=2)
        for n in range(2):
            cluster[f"p{n}"].hook = once("prefill", "die")
        await cluster.check(generation())
        assert cluster["d0"].reserves[-1].local_prefill_max == PREFILL_EVERYTHING
        await cluster.at_rest()


@pytest.mark.parametrize("code", ["internal", "draining", "stale_epoch", "transfer_failed", "lease_expired"])
async def test_failures_of_d_lead_to_another_placement(valkey, code):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2, hook=once("ticketed", code))
        await cluster.check(generation())
        assert cluster.metric("headrace_dispatch_placements_total", outcome=code) == 1
        await cluster.at_rest()


@pytest.mark.parametrize("decodes", [1, 2])
async def test_a_broken_hand_over_avoids_both_ends_where_it_can(valkey, decodes, monkeypatch):
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 60.0)  # nobody waits for an exclusion to end
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=decodes, prefills=1)
        cluster["p0"].hook = once("prefill", "transfer_failed")
        await cluster.check(generation())
        decodes_used = [w for w in cluster.workers if w.role == "decode" and w.reserves]
        assert len(decodes_used) == decodes
        assert decodes_used[-1].reserves[-1].local_prefill_max == PREFILL_EVERYTHING or decodes == 2
        assert cluster["p0"].seen.count("Prefill") == 1
        await cluster.at_rest()


async def test_one_worker_that_fails_is_tried_again_after_a_moment(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=1, hook=once("token", "internal"))
        cluster["d0"].hook = once("reserve", "internal")
        await cluster.check(generation())
        assert cluster["d0"].seen.count("Reserve") == 2
        await cluster.at_rest()


async def test_one_request_that_fails_everywhere_does_not_hold_up_the_others(valkey, monkeypatch):
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 60.0)  # longer than anybody may wait
    async with FakeCluster(valkey.url) as cluster:
        poison = generation(1)
        await cluster.start(
            hook=lambda stage, work: (
                "internal" if stage == "accepted" and work.prompt == poison.prompt else None
            ),
            prefills=0,
        )
        task = asyncio.create_task(cluster.generate(poison))
        await until(lambda: cluster.metric("headrace_dispatch_placements_total", outcome="internal") == 1)
        for n in range(2, 8):
            await cluster.check(generation(n, max_tokens=3))
        assert not task.done()
        assert cluster.metric("headrace_dispatch_placements_total", outcome="internal") == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.at_rest()


async def test_too_many_failures_are_unavailable(valkey, monkeypatch):
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 0.01)
    admission = AdmissionConfig(max_attempts=3)
    async with FakeCluster(valkey.url, admission=admission) as cluster:
        await cluster.start(hook=lambda stage, work: "internal" if stage == "reserve" else None)
        with pytest.raises(Unavailable, match="3 placements"):
            await cluster.generate(generation())
        assert cluster["d0"].seen.count("Reserve") == 3
        await cluster.at_rest()


async def test_a_worker_that_takes_a_request_and_forgets_it(valkey):
    async with FakeCluster(valkey.url, admission=AdmissionConfig(stall_timeout_s=0.2)) as cluster:
        await cluster.start(decodes=2, prefills=0, step_s=0.01)
        forgot = once("accepted", "forget")

        def hook(worker):
            def forget(stage, work):
                if forgot(stage, work):
                    worker.held.pop(work.request_id)
                return

            return forget

        for worker in cluster.workers:
            worker.hook = hook(worker)
        await cluster.check(generation())
        assert cluster.metric("headrace_dispatch_placements_total", outcome="stalled") == 1
        await cluster.at_rest()


async def test_repeated_tokens_are_dropped_and_missing_ones_are_noticed(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=2)
        for worker in cluster.workers:
            worker.hook = lambda stage, work: "duplicate" if stage == "token" else None
        await cluster.check(generation(1))
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == 1
        assert cluster.metric("headrace_dispatch_placements_total", outcome="token_gap") == 0
        hook = once("token", "gap", after=5)
        for worker in cluster.workers:
            worker.hook = hook
        await cluster.check(generation(2))
        assert cluster.metric("headrace_dispatch_placements_total", outcome="token_gap") == 1
        await cluster.at_rest()


@pytest.mark.parametrize("stage", ["reserve", "ticketed", "prefill", "prefilled", "token"])
@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_the_client_leaves_at_any_stage_and_nothing_stays(valkey, stage, how):
    async with FakeCluster(valkey.url) as cluster:
        reached = asyncio.Event()

        def hook(at, work):
            if at != stage:
                return None
            reached.set()
            return None if at == "token" else "drop"  # it would hang here for ever

        await cluster.start(hook=hook, step_s=0.01)
        stream = cluster.dispatcher.generate(generation(max_tokens=2000))

        async def read():
            async for _ in stream:
                pass

        if how == "close" and stage == "token":
            assert (await anext(stream)).tokens
            await stream.aclose()
        else:
            task = asyncio.create_task(read())
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await cluster.at_rest()


async def test_the_client_leaves_while_p_computes(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(prefill_s=60)
        task = asyncio.create_task(cluster.generate(generation()))
        await until(lambda: len(cluster["p0"].prefills) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.at_rest()


async def test_the_client_leaves_while_it_waits_for_room(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(hook=lambda stage, work: "busy" if stage == "reserve" else None)
        task = asyncio.create_task(cluster.generate(generation()))
        await until(lambda: cluster.dispatcher.admission.waiting == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.at_rest()


async def test_a_request_waits_for_the_first_worker(valkey):
    async with FakeCluster(valkey.url) as cluster:
        assert cluster.dispatcher.model() is None
        assert not cluster.dispatcher.ready()
        task = asyncio.create_task(cluster.check(generation()))
        await asyncio.sleep(0.05)
        await cluster.start()
        await asyncio.wait_for(task, 5)
        assert cluster.dispatcher.ready()
        assert cluster.dispatcher.model().max_model_len == 8192
        await cluster.at_rest()


async def test_same_request_id_twice_at_once(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start()
        await asyncio.gather(*(cluster.check(generation()) for _ in range(5)))
        await cluster.at_rest()


async def test_stop_ends_open_streams(valkey):
    cluster = FakeCluster(valkey.url)
    async with cluster:
        await cluster.start(step_s=0.01)
        running = asyncio.create_task(cluster.generate(generation(max_tokens=2000)))
        await until(lambda: cluster["d0"].num_held == 1)
        await cluster.dispatcher.stop()
        with pytest.raises(Unavailable, match="stopping"):
            await running
        await cluster.at_rest()


async def test_status_and_metrics(valkey):
    async with FakeCluster(valkey.url) as cluster:
        await cluster.start(decodes=1, prefills=1, step_s=0.01)
        running = asyncio.create_task(cluster.check(generation(max_tokens=30)))
        await until(lambda: cluster["d0"].num_held == 1)
        await until(
            lambda: cluster.dispatcher.book.recent_requests("d0") > 0.001
        )  # as many digits as are shown
        status = await cluster.dispatcher.status()
        assert status["model"] == {"name": "fake", "max_model_len": 8192, "vocab_size": 50_000}
        assert (status["redis"], status["in_flight"], status["queue"]) == ("ok", 1, 0)
        d0, p0 = status["workers"]
        assert (d0["worker_id"], d0["role"], d0["state"]) == ("d0", "decode", "up")
        assert d0["booked"] == {"requests": 1, "prefill_tokens": 0, "decode_blocks": 13}
        assert 0 < d0["recent_requests"] < 1
        assert p0["role"] == "prefill"
        metrics = await cluster.dispatcher.worker_metrics()
        assert sorted(metrics) == [b'fake_worker_up{worker="d0"} 1\n', b'fake_worker_up{worker="p0"} 1\n']
        cluster["p0"].stalled = True
        cluster.dispatcher.fleet.link("p0")._timeout_s = 60
        assert await cluster.dispatcher.worker_metrics() == [b'fake_worker_up{worker="d0"} 1\n']
        await running


async def test_a_storm_of_deaths(valkey, monkeypatch):
    """200 requests while workers die and come back: every stream is right, nothing is left anywhere."""
    monkeypatch.setattr("router.dispatch._EXCLUDED_S", 0.05)
    rng = random.Random(5)
    deaths = [0]

    def hook(stage, work):
        if rng.random() < (0.0015 if stage == "token" else 0.02) and deaths[0] < 40:
            deaths[0] += 1
            return rng.choice(["die", "die", "die", "internal" if stage != "token" else "die", "stall"])
        return None

    admission = AdmissionConfig(queue_timeout_s=30, max_attempts=50)
    async with FakeCluster(
        valkey.url, admission=admission, policy=PolicyConfig(local_prefill_max=64), timeout_s=0.5
    ) as cluster:
        cluster.restart_after_s = 0.05
        await cluster.start(decodes=3, prefills=2, hook=hook, num_blocks=300, step_s=0.004)

        async def replace_stalled():
            while True:
                await asyncio.sleep(0.1)
                for worker in list(cluster.peers.values()):
                    if worker.stalled:
                        await asyncio.sleep(0.6)  # the router must notice by itself first
                        worker.die()

        supervisor = asyncio.create_task(replace_stalled())
        requests = [
            Generation(
                request_id=f"s{n}",
                prompt=[rng.randrange(50_000) for _ in range(rng.choice([20, 100, 300]))],
                sampling=Sampling(max_tokens=rng.randrange(1, 40), seed=n),
                priority=rng.randrange(3),
            )
            for n in range(200)
        ]
        await asyncio.gather(*(cluster.check(request) for request in requests))
        supervisor.cancel()
        assert deaths[0] >= 20
        assert cluster.metric("headrace_dispatch_placements_total", outcome="finished") == 200
        await cluster.at_rest()

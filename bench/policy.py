"""What one routing decision costs, by policy and number of workers: `python -m bench.policy`.

Half of the workers prefill, half decode, all on a roster as in a router. Cases: nobody holds the prefix, four workers
do, every worker does; loads differ or all are idle. Each decision is booked, and the oldest of 4 bookings for each
worker is released, so that the roster is sorted in again as in a running router.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque

from router.config import PolicyConfig
from router.load import LoadBook
from router.policies import POLICIES, open_policy
from router.policy import Demand, Policy
from router.prefix_index import CachedPrefix
from router.roster import Roster, Sorts
from workers.protocol.messages import KvLayout, Load, WorkerInfo

_LAYOUT = KvLayout(32, 8, 128, 16, "bfloat16", "f" * 16)
_ROOT = b"r" * 16
_PROMPT = 2000  # tokens


def workers(count: int) -> list[WorkerInfo]:
    return [
        WorkerInfo(
            worker_id=f"w{n}",
            epoch=1,
            role="decode" if n % 2 else "prefill",
            address=f"10.0.{n // 8}.1:7000",  # 8 on each host
            model="m",
            layout=_LAYOUT,
            hash_root=_ROOT,
            num_blocks=10_000,
            max_model_len=8192,
            max_num_seqs=256,
            vocab_size=50_000,
            device="cpu",
            pid=0,
        )
        for n in range(count)
    ]


def measure(policy: Policy, infos: list[WorkerInfo], holders: int, busy: bool, rounds: int) -> list[float]:
    """Seconds of CPU for each decision; of booking and releasing, which sorts workers in again, too."""
    rng = random.Random(1)
    book = LoadBook()
    roster = Roster(book, policy.standing if isinstance(policy, Sorts) else None)
    for info in infos:
        roster.enlist(info)
        load = Load(prefill_token_s=5e-5, decode_step_s=0.01)
        if busy:
            queued = rng.randrange(4000) if info.role == "prefill" else 0
            load = Load(queued_prefill_tokens=queued, active_blocks=rng.randrange(4000), prefill_token_s=5e-5)
        book.report(info.worker_id, load)
    usable = {info.worker_id for info in infos}.__contains__
    bookings: deque = deque()
    seconds = []
    for _ in range(rounds):
        holding = rng.sample(infos, min(holders, len(infos)))
        cached = {info.worker_id: CachedPrefix(rng.choice((60, 100))) for info in holding}
        demand = Demand(_PROMPT, 16, cached, token_bytes=_LAYOUT.block_bytes // 16)
        began = time.thread_time()
        choice = policy.choose(demand, roster.views(_ROOT, usable))
        assert choice is not None
        bookings.append(book.book(choice.decode.worker_id, decode_blocks=126))
        if choice.prefill is not None:
            bookings.append(
                book.book(choice.prefill.worker_id, prefill_tokens=choice.prefill.uncached_tokens)
            )
        while len(bookings) > 4 * len(infos):
            bookings.popleft().release()
        seconds.append(time.thread_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="16,256,1000")
    parser.add_argument("--policies", default="cost", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    print(f"{'policy':14}{'workers':>8}  {'prefix held by':15}{'load':8}{'p50 µs':>8}{'p99 µs':>8}")
    for name in args.policies.split(","):
        for count in map(int, args.workers.split(",")):
            for holders, held in ((0, "nobody"), (4, "4"), (count, "everybody")):
                for busy in (False, True):
                    policy = open_policy(PolicyConfig(name=name), random.Random(2))
                    times = sorted(measure(policy, workers(count), holders, busy, args.rounds))
                    p50, p99 = statistics.median(times), times[int(0.99 * len(times))]
                    print(
                        f"{name:14}{count:8}  {held:15}{'mixed' if busy else 'alike':8}{p50 * 1e6:8.0f}{p99 * 1e6:8.0f}"
                    )


if __name__ == "__main__":
    main()

"""What one routing decision costs, by policy, number of workers and length of the prompt: `python -m bench.policy`.

All of it: the hashes of the prompt's blocks, their look-up in the index, the choice, and booking it. Half of the workers
prefill, half decode, all on a roster as in a router. Cases: nobody holds the prefix, four workers do, every worker does
(48% or 80% of the prompt); loads differ or all are idle. The oldest of 4 bookings for each worker is released after each
decision, so that the roster is sorted in again as in a running router. Times are CPU time of the thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass
from itertools import product

from router.config import PolicyConfig
from router.load import Booking, LoadBook
from router.policies import POLICIES, open_policy
from router.policy import Demand, Policy
from router.prefix_index import PrefixIndex
from router.roster import Roster, Sorts
from workers.protocol.hashes import block_hashes
from workers.protocol.messages import KvLayout, Load, WorkerInfo
from workers.protocol.tiers import DEVICE

_BLOCK = 16  # tokens
_LAYOUT = KvLayout(32, 8, 128, _BLOCK, "bfloat16", "f" * 16)
_ROOT = b"r" * 16
_PROMPTS = 16  # that come again and again


def workers(count: int) -> list[WorkerInfo]:
    return [
        WorkerInfo(
            worker_id=f"w{n}",
            epoch=1,
            role="prefill" if n % 2 else "decode",
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


@dataclass(frozen=True)
class Case:
    workers: int
    tokens: int  # of a prompt
    holders: int  # of each prompt's prefix
    busy: bool


def filled(case: Case, infos: list[WorkerInfo], rng: random.Random) -> tuple[PrefixIndex, list[list[int]]]:
    """An index, and the prompts whose prefixes are in it."""
    prompts = [[rng.randrange(50_000) for _ in range(case.tokens)] for _ in range(_PROMPTS)]
    held: dict[str, list[bytes]] = {info.worker_id: [] for info in infos}
    for prompt in prompts:
        hashes = block_hashes(prompt, _BLOCK, _ROOT)
        for info in rng.sample(infos, min(case.holders, len(infos))):
            held[info.worker_id] += hashes[: int(len(hashes) * rng.choice((0.48, 0.8)))]
    index = PrefixIndex()
    for worker_id, hashes in held.items():
        index.load_snapshot(worker_id, 1, 0, [(block_hash, DEVICE) for block_hash in hashes])
    return index, prompts


def measure(policy: Policy, case: Case, rounds: int) -> list[float]:
    """Seconds of CPU for each decision."""
    rng, infos = random.Random(1), workers(case.workers)
    book = LoadBook()
    roster = Roster(book, policy.standing if isinstance(policy, Sorts) else None)
    for info in infos:
        roster.enlist(info)
        load = Load(prefill_token_s=5e-5, decode_step_s=0.01)
        if case.busy:
            queued = rng.randrange(4000) if info.role == "prefill" else 0
            load = Load(queued_prefill_tokens=queued, active_blocks=rng.randrange(4000), prefill_token_s=5e-5)
        book.report(info.worker_id, load)
    index, prompts = filled(case, infos, rng)
    usable = {info.worker_id for info in infos}.__contains__
    bookings: deque[Booking] = deque()
    seconds = []
    for number in range(rounds):
        prompt = prompts[number % _PROMPTS]
        began = time.thread_time()
        cached = index.match(block_hashes(prompt, _BLOCK, _ROOT))
        demand = Demand(len(prompt), _BLOCK, cached, token_bytes=_LAYOUT.block_bytes // _BLOCK)
        choice = policy.choose(demand, roster.views(_ROOT, usable))
        assert choice is not None
        bookings.append(book.book(choice.decode.worker_id, decode_blocks=len(prompt) // _BLOCK))
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
    parser.add_argument("--workers", default="1,16,64,256,1000,4096")
    parser.add_argument("--tokens", default="1024,8192", help="of a prompt")
    parser.add_argument("--policies", default="cost", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    print(
        f"{'policy':14}{'tokens':>7}{'workers':>8}  {'prefix held by':15}{'load':8}{'p50 µs':>8}{'p99 µs':>8}"
    )
    for name, tokens, count in product(
        args.policies.split(","), map(int, args.tokens.split(",")), map(int, args.workers.split(","))
    ):
        for (holders, held), busy in product(((0, "nobody"), (4, "4"), (count, "everybody")), (False, True)):
            policy = open_policy(PolicyConfig(name=name), random.Random(2))
            times = sorted(measure(policy, Case(count, tokens, holders, busy), args.rounds))
            p50, p99 = statistics.median(times), times[int(0.99 * len(times))]
            load = "mixed" if busy else "alike"
            print(f"{name:14}{tokens:7}{count:8}  {held:15}{load:8}{p50 * 1e6:8.0f}{p99 * 1e6:8.0f}")


if __name__ == "__main__":
    main()

"""CPU time of the engine's own part of a decode step, without a device: python -m bench.engine.host

Streams are scheduled, their steps built, handed to a runner that computes nothing, and updated; with `overlap` two steps
are in flight, as on a GPU. Means of a step in microseconds, of the stepping thread alone. The runner's part comes on top.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.engine.host_profile import Profile
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.pending import Ready
from workers.engine.plan import Sampled
from workers.engine.request import Request
from workers.engine.step_input import StepInput
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling, Work

BLOCK_SIZE = 16
WARM_STEPS = 20


@dataclass
class IdleRunner:
    """Every step has run when it is submitted, and says the same token."""

    overlaps: bool

    def watch_next(self) -> None:
        return None

    def submit(self, step: StepInput) -> Ready:
        return Ready([Sampled(7, None)] * len(step.samples))


def measure(batch: int, context: int, steps: int, *, overlap: bool) -> dict[str, float]:
    """Microseconds of CPU time of a step with `batch` streams, by part."""
    engine = _decoding_engine(batch, context, steps)
    engine.runner = IdleRunner(overlap)  # type: ignore[assignment]
    for _ in range(WARM_STEPS):
        engine.step()
    gc.collect()
    gc.freeze()  # as a worker does when it has started
    profile = Profile()
    profile.wrap(engine, "step", "step")
    profile.wrap(engine.scheduler, "schedule", "schedule")
    profile.wrap(engine.scheduler, "update", "update")
    for _ in range(steps):
        engine.step()
    gc.unfreeze()
    parts = {part: seconds / steps * 1e6 for part, seconds in profile.cpu_s.items()}
    parts["input"] = parts["step"] - parts["schedule"] - parts["update"]
    return parts


def _decoding_engine(batch: int, context: int, steps: int) -> Engine:
    """Its streams' contexts are taken as if a prefill worker had sent them, and end at different places of a block."""
    rng = random.Random(0)
    longest = context + BLOCK_SIZE + WARM_STEPS + steps + 8
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder), {"max_position_embeddings": longest}, seed=1)
        model = prepare_model(str(path))
        config = EngineConfig(
            device="cpu",
            num_threads=1,
            block_size=BLOCK_SIZE,
            num_blocks=batch * -(-longest // BLOCK_SIZE),
            max_num_seqs=batch,
            max_num_batched_tokens=max(batch, 512),
        )
        engine = Engine(config, model)
    sampling = Sampling(max_tokens=WARM_STEPS + steps + 8, seed=0, temperature=0.0, ignore_eos=True)
    for number in range(batch):
        prompt = rng.choices(range(engine.vocab_size), k=context + number % BLOCK_SIZE)
        request = Request(Work(f"host-{number}", prompt, sampling))
        if engine.scheduler.reserve(request) is None:
            raise ValueError(f"no room for {batch} streams")
        engine.scheduler.commit(request, rng.randrange(engine.vocab_size), None, 0)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.engine.host"
    )
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64, 256]
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    columns = ("schedule", "input", "update", "step")
    print(f"{'batch':>6} {'overlap':>8} " + " ".join(f"{column:>9}" for column in columns))
    for batch in given.batches:
        for overlap in (False, True):
            parts = measure(batch, given.context, given.steps, overlap=overlap)
            figures = " ".join(f"{parts[column]:9.1f}" for column in columns)
            print(f"{batch:6} {'yes' if overlap else 'no':>8} {figures}")


if __name__ == "__main__":
    main()

"""One engine in one process behind a minimal HTTP server: what the engine gives without the cluster around it.

    python -m bench.single --port 8001 --config int8 [--set max_num_seqs=16] [--model NAME]

For benchmarks only; users are served by `headrace serve`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import threading
from typing import Any

import yaml

from bench.completions_app import Answer, completions_app, serve
from bench.configurations import check_in_force, engine_config
from workers.engine.engine import Engine, StepFailed
from workers.engine.plan import StepResult
from workers.engine.request import Request
from workers.models.catalog import prepare_model
from workers.protocol.messages import Sampling, Work


class EngineWriter:
    """Steps the engine in a thread of its own. A step's tokens reach the event loop in one call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers: dict[str, Answer] = {}
        self._names = map(str, itertools.count())
        self._work = threading.Event()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, prompt: list[int], answer: Answer) -> None:
        name = next(self._names)
        sampling = Sampling(max_tokens=answer.max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        work = Work(request_id=name, prompt=prompt, sampling=sampling)
        self._engine.check(work)
        with self._engine.lock:
            self._answers[name] = answer
            self._engine.scheduler.add(Request(work))
        self._work.set()

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            while self._engine.scheduler.has_work:
                try:
                    self._engine.step(self._deliver)
                except StepFailed as failed:
                    for request in failed.requests:
                        self._engine.scheduler.cancel(request.request_id)
                        self._answers.pop(request.request_id).put_from_thread(None)

    def _deliver(self, result: StepResult) -> None:
        batch = []
        for new in result.tokens:
            name = new.request.request_id
            batch.append((self._answers[name], [new.token]))
            if new.request.finish_reason is not None:
                del self._answers[name]
        if batch:
            batch[0][0].loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[Answer, list[int]]]) -> None:
    for answer, token_ids in batch:
        answer.put(token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--config", default="default", help="a name of bench/configurations.py")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of EngineConfig")
    given = parser.parse_args()
    model = prepare_model(given.model, say=print)
    settings: dict[str, Any] = {"num_threads": os.cpu_count(), "kv_cache_memory": "2GiB"}
    settings |= {
        name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.set)
    }
    engine = Engine(engine_config(given.config, **settings), model)
    check_in_force(given.config, engine)
    serve(completions_app(EngineWriter(engine), model.path, model.served_name), given.port)


if __name__ == "__main__":
    main()

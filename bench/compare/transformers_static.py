"""transformers' own `generate` in static batches, behind the same minimal HTTP server as the engine alone.

    python -m bench.compare.transformers_static MODEL_DIRECTORY --port 8001 --batch 16

Up to `batch` waiting requests are padded to the longest, run to the end of the longest together, and streamed as they
are written; what comes meanwhile waits for the next batch. Runs in an environment that has transformers and nothing of
Headrace's but its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import queue
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from bench.completions_app import Answer, completions_app, serve

GATHER_S = 0.02  # requests sent at once arrive this far apart


class StaticBatches:
    def __init__(self, model_path: Path, batch: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self._batch = batch
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        self._model = model.eval()
        self._waiting: queue.Queue[tuple[list[int], Answer]] = queue.Queue()
        threading.Thread(target=self._run, name="generate", daemon=True).start()

    def submit(self, prompt: list[int], answer: Answer) -> None:
        self._waiting.put((prompt, answer))

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            time.sleep(GATHER_S if self._batch > 1 else 0)
            while len(taken) < self._batch and not self._waiting.empty():
                taken.append(self._waiting.get())
            try:
                self._generate(taken)
            except Exception:  # noqa: BLE001, the next batch may fit
                traceback.print_exc()
                for _, answer in taken:
                    answer.put_from_thread(None)

    def _generate(self, taken: list[tuple[list[int], Answer]]) -> None:
        import torch

        longest = max(len(prompt) for prompt, _ in taken)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in taken])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in taken])
        tokens = max(answer.max_tokens for _, answer in taken)
        self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=_Streamer([answer for _, answer in taken]),
        )


class _Streamer:
    """What `generate` calls with the prompt, then with one token of each row at a time."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._written = -1  # the prompt comes first

    def put(self, value: Any) -> None:
        self._written += 1
        if self._written:
            for answer, token in zip(self._answers, value.tolist(), strict=True):
                if self._written <= answer.max_tokens:
                    answer.put_from_thread([token])

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    serve(completions_app(StaticBatches(given.model, given.batch), given.model, "static"), given.port)


if __name__ == "__main__":
    main()

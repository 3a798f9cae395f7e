"""The same requests over the same weights through transformers: its continuous batching, and generate in static batches.

python -m bench.gpu.peers [--parts continuous,static] [--model DIRECTORY] [--json FILE]

Each has its own best settings as far as it chooses them itself: memory for its cache, tokens in a batch, CUDA graphs. A
part whose time is up counts the tokens that were written by then, which spares static batches part of their end: they go
on for the longest answer alone, and only tokens that were asked for count.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu import model, workload
from bench.gpu.rows import Rows, parser

PARTS = ("continuous", "static")


def load(path: Path, rehearse: bool) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if rehearse else torch.bfloat16
    found: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    return found.eval().to("cpu" if rehearse else "cuda")


def continuous(peer: Any, load: workload.Workload, seconds: float) -> dict[str, Any]:
    """Output tokens of all requests and how long they took; those of `seconds` where that is not enough."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    wanted: dict[str, Any] = {"max_requests_per_batch": load.concurrency, "allow_block_sharing": False}
    if peer.device.type == "cpu":
        wanted |= {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 32}
    config = ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})
    greedy = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=load.output_tokens[1]
    )
    with peer.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=config, timeout=5
    ) as manager:
        _drain(manager, load.asks(peer.config.vocab_size, seed=1)[: load.concurrency // 4], 60.0)
        asks = load.asks(peer.config.vocab_size)
        began = time.perf_counter()
        finished, tokens = _drain(manager, asks, seconds)
        tokens += 0 if finished == len(asks) else _unfinished(manager)
        return _row(asks, finished, tokens, time.perf_counter() - began, implementation=_implementation(peer))


def _drain(manager: Any, asks: list[workload.Ask], seconds: float) -> tuple[int, int]:
    """(requests, tokens) that are finished when all are, or the time is up."""
    for ask in asks:
        manager.add_request(ask.prompt, max_new_tokens=ask.max_tokens)
    finished = tokens = 0
    until = time.monotonic() + seconds
    while finished < len(asks) and time.monotonic() < until:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if getattr(result, "error", None):
                raise RuntimeError(f"transformers: {result.error}")
            finished += 1
            tokens += len(result.generated_tokens)
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching ended by itself")
    return finished, tokens


def _unfinished(manager: Any) -> int:
    """Tokens of requests that still run, as far as this version of transformers shows them."""
    scheduler = getattr(getattr(manager, "batch_processor", None), "scheduler", None)
    active = dict(getattr(scheduler, "active_requests", None) or {})
    tokens = sum(len(state.generated_tokens) for state in active.values())
    for name in active:
        manager.cancel_request(name)
    return tokens


def _implementation(peer: Any) -> str:
    return str(peer.config._attn_implementation)


def static(peer: Any, load: workload.Workload, seconds: float) -> dict[str, Any]:
    """Batches of as many requests as run at a time elsewhere, in the order in which they come; of half as many where
    they find no memory."""
    peer.set_attn_implementation("sdpa")  # which continuous batching has replaced by its own
    asks, size = load.asks(peer.config.vocab_size), load.concurrency
    while True:
        try:
            return _static(peer, asks, size, seconds)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _static(peer: Any, asks: list[workload.Ask], size: int, seconds: float) -> dict[str, Any]:
    _generate(peer, asks[: min(size, 8)], 4, seconds)
    began, done, finished, tokens = time.perf_counter(), 0, 0, 0
    while done < len(asks) and (left := seconds - (time.perf_counter() - began)) > 0:
        batch = asks[done : done + size]
        written = _generate(peer, batch, max(ask.max_tokens for ask in batch), left)
        tokens += sum(min(ask.max_tokens, written) for ask in batch)
        finished += sum(ask.max_tokens <= written for ask in batch)
        done += len(batch)
    found = _row(asks, finished, tokens, time.perf_counter() - began, implementation=_implementation(peer))
    return found | {"batch": size}


def _generate(peer: Any, asks: list[workload.Ask], tokens: int, seconds: float) -> int:
    """How many tokens each was given when all had theirs, or the time was up."""
    width = max(len(ask.prompt) for ask in asks)
    ids = torch.tensor([[0] * (width - len(ask.prompt)) + ask.prompt for ask in asks])
    mask = torch.tensor([[0] * (width - len(ask.prompt)) + [1] * len(ask.prompt) for ask in asks])
    made = peer.generate(
        ids.to(peer.device),
        attention_mask=mask.to(peer.device),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        max_time=seconds,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    if made.is_cuda:
        torch.cuda.synchronize()
    return int(made.shape[1]) - width


def _row(
    asks: list[workload.Ask], finished: int, tokens: int, seconds: float, implementation: str
) -> dict[str, Any]:
    return {
        "requests": len(asks),
        "finished": finished,
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "attention": implementation,
    }


def main() -> None:
    given = parser("bench.gpu.peers", __doc__)
    given.add_argument("--parts", default=",".join(PARTS), help="those to measure, with commas between")
    given.add_argument("--each", type=float, default=60.0, help="seconds of each part at most (60)")
    options = given.parse_args()
    rows = Rows(options.json, options.seconds)
    if not options.rehearse and not torch.cuda.is_available():
        rows.note(skipped="torch sees no GPU")
        rows.end()
        return
    sizes = workload.TINY if options.rehearse else workload.FULL
    with model.model_at(options.model, model.TINY if options.rehearse else model.LLAMA_8B) as path:
        peer = load(path, options.rehearse)
        for part in options.parts.split(","):
            with rows.part(part) as time_left:
                if time_left:
                    found = (continuous if part == "continuous" else static)(peer, sizes, options.each)
                    if options.rehearse:
                        found |= {"seconds": None, "tokens_per_s": None}
                    gc.collect()
                    torch.cuda.empty_cache()
                    rows.add(**{"case": f"transformers, {part}", "batch": sizes.concurrency} | found)
    rows.end()


if __name__ == "__main__":
    main()

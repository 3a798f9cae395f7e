"""A worker's profile, measured: the engine of this configuration, run for a short while in this process."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cluster.planner.profile import Profile, ProfileError, fit_decode
from workers.config import EngineConfig
from workers.models.cache import default_cache_dir

if TYPE_CHECKING:
    from workers.engine.engine import Engine
    from workers.engine.request import Request
    from workers.models.catalog import PreparedModel

PROMPTS = (64, 256, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 512, 2048)
_WARM_STEPS = 2
_STEPS = 5
_REPEATS = 3
_COPY_BYTES = 64 << 20
_A_STEP_TOO_LONG_S = 10.0  # larger prompts and batches than one that takes this long are left out

_KV_BYTE = 0x3C  # a finite, normal number in every KV format

_names = (f"profile-{number}" for number in itertools.count())


def cached_profile(config: EngineConfig, model: PreparedModel) -> Path:
    """Where the profile of this engine, model and machine is kept."""
    key = json.dumps([config.model_dump(mode="json"), model.fingerprint, os.uname().machine, _processor()])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return default_cache_dir() / "profiles" / f"{model.served_name.replace('/', '-')}-{name}.json"


def measure(config: EngineConfig, model: PreparedModel, say: Callable[[str], None]) -> Profile:
    """Takes seconds to minutes and the memory of one worker. Raises ProfileError where it has no room for anything."""
    from workers.engine.engine import Engine

    engine = Engine(config.model_copy(update={"prefix_caching": False}), model)
    _fill(engine)
    longest = min(engine.max_model_len, engine.num_blocks * config.block_size) - _WARM_STEPS - _STEPS - 2
    prompts = _prompts(engine, longest, say)
    steps = list(_decode(engine, longest, say))
    if not prompts or not steps:
        raise ProfileError(
            f"the KV cache of {engine.num_blocks} blocks holds {longest} tokens: too few to measure anything"
        )
    decode, context_s = fit_decode(steps)
    layout = engine.layout
    return Profile(
        source=f"measured: {model.served_name}, {engine.device} ({engine.runner.kernels}), "
        f"{config.num_threads or 'all'} threads",
        prefill=tuple(prompts),
        decode=decode,
        context_s=context_s,
        kv_tokens=engine.num_blocks * layout.block_size,
        max_num_seqs=engine.max_num_seqs,
        chunk_tokens=engine.scheduler.max_num_batched_tokens,
        kv_bytes_per_token=layout.block_bytes // layout.block_size,
        transfer_bytes_per_s=_copy_rate(),
        transfer_latency_s=0.0,
    )


def _prompts(engine: Engine, longest: int, say: Callable[[str], None]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for tokens in _sizes(PROMPTS, longest):
        times = []
        for _ in range(_REPEATS):
            request = _request(engine, tokens, 1)
            with engine.lock:
                engine.scheduler.add(request)
            began = time.perf_counter()
            while engine.scheduler.has_work:
                engine.step()
            times.append(time.perf_counter() - began)
            if times[-1] > _A_STEP_TOO_LONG_S:
                break
        found.append((float(tokens), median(times)))
        say(f"prefill of {tokens} tokens: {found[-1][1] * 1e3:.1f} ms")
        if found[-1][1] > _A_STEP_TOO_LONG_S:
            break
    return found


def _decode(engine: Engine, longest: int, say: Callable[[str], None]) -> Iterator[tuple[int, int, float]]:
    """(batch, context, seconds of a step). Contexts come as if a prefill worker had sent them: nothing is computed."""
    for batch in BATCHES:
        if batch > engine.max_num_seqs:
            return
        for context in _sizes(CONTEXTS, longest):
            seconds = _steps(engine, batch, context)
            if seconds is None:
                continue
            yield batch, context, seconds
            say(f"decode of {batch} with {context} tokens of context: {seconds * 1e3:.1f} ms a step")
            if seconds > _A_STEP_TOO_LONG_S:
                return


def _steps(engine: Engine, batch: int, context: int) -> float | None:
    """None: no room for so many."""
    block_size = engine.layout.block_size
    each = -(-(context + _WARM_STEPS + _STEPS + 2) // block_size)
    if batch * each > engine.num_blocks:
        return None  # it would preempt, and compute anew
    requests: list[Request] = []
    try:
        with engine.lock:
            for _ in range(batch):
                request = _request(engine, context, _WARM_STEPS + _STEPS + 2)
                if engine.scheduler.reserve(request) is None:
                    return None
                requests.append(request)
            for request in requests:
                engine.scheduler.commit(request, 1, None, 0)
        times = []
        for _ in range(_WARM_STEPS + _STEPS):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        return median(times[_WARM_STEPS:])
    finally:
        with engine.lock:
            for request in requests:
                engine.scheduler.cancel(request.request_id)
        while engine.scheduler.has_work:  # a step may have been scheduled ahead
            engine.step()


def _fill(engine: Engine) -> None:
    """Pages that nobody wrote are all the same page of zeros, and would be read from the processor's cache."""
    import torch

    engine.runner.kv_cache.view(torch.uint8).fill_(_KV_BYTE)


def _sizes(wanted: tuple[int, ...], longest: int) -> list[int]:
    """Those that fit; the longest itself where even the first does not."""
    return [size for size in wanted if size <= longest] or ([longest] if longest > 0 else [])


def _request(engine: Engine, context: int, max_tokens: int) -> Request:
    from workers.engine.request import Request
    from workers.protocol.messages import Sampling, Work

    prompt = random.Random(0).choices(range(engine.vocab_size), k=context)
    sampling = Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
    work = Work(request_id=next(_names), prompt=prompt, sampling=sampling)
    engine.check(work)
    return Request(work)


def _copy_rate() -> float:
    """Bytes per second of one core's copy: the limit of a hand-over within a host. Other roads are slower."""
    import torch

    source, target = (torch.zeros(_COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return _COPY_BYTES / median(times[1:])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")

"""What one worker can do, as measured: the planner's only knowledge of model and hardware. Pure."""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

Points = tuple[tuple[float, float], ...]


class ProfileError(ValueError):
    """Not a profile, or not one of a worker that could exist."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Times in seconds, one worker, whatever it is made of (a GPU, four, or a core).

    A decode step of a batch takes `decode(batch) + context_s · (tokens of context of the whole batch)`: weights and
    launches are paid per step, the KV cache per token read.
    """

    source: str
    prefill: Points  # (prompt tokens, seconds to read them with nothing cached), ascending
    decode: Points  # (batch, seconds of a step with no context), ascending
    context_s: float  # seconds that a token of context adds to a step
    kv_tokens: int  # that the KV cache holds
    max_num_seqs: int = 64  # requests in one step
    chunk_tokens: int = 512  # tokens in one step
    kv_bytes_per_token: int = 0
    transfer_bytes_per_s: float = math.inf  # from one prefill worker
    transfer_latency_s: float = 0.0  # of a hand-over, besides its bytes

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            points: Points = getattr(self, name)
            if not points:
                raise ProfileError(f"profile: {name} is empty; wanted are pairs of (amount, seconds)")
            if any(later[0] <= earlier[0] for earlier, later in pairwise(points)):
                raise ProfileError(f"profile: {name} must have ascending amounts")
            if any(not (amount > 0 and 0 < seconds < math.inf) for amount, seconds in points):
                raise ProfileError(f"profile: {name} has an amount or time that is not above 0")
        for name in ("kv_tokens", "max_num_seqs", "chunk_tokens", "transfer_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ProfileError(f"profile: {name} is {getattr(self, name):g}, it must be above 0")
        for name in ("context_s", "kv_bytes_per_token", "transfer_latency_s"):
            if not getattr(self, name) >= 0:
                raise ProfileError(f"profile: {name} is {getattr(self, name):g}, it must be at least 0")

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """To read `new_tokens` behind `cached_tokens` that are in the KV cache already."""
        if new_tokens <= 0:
            new_tokens = 1  # the last token is always computed: its logits are the first answer
        alone = self._alone_s(new_tokens)
        if not cached_tokens:
            return alone
        return max(alone, self._alone_s(new_tokens + cached_tokens) - self._alone_s(cached_tokens))

    def _alone_s(self, tokens: float) -> float:
        return max(between(((0.0, 0.0), *self.prefill), tokens), self.decode[0][1])

    def step_s(self, batch: float, context_tokens: float) -> float:
        """One decode step of `batch` requests with `context_tokens` each on the average."""
        return between(self.decode, max(batch, 1.0)) + self.context_s * max(batch, 1.0) * context_tokens

    def handover_s(self, tokens: int, prefill_s: float) -> float:
        """What handing `tokens` over adds after the prefill: blocks leave by chunk, while the next is computed."""
        whole = tokens * self.kv_bytes_per_token / self.transfer_bytes_per_s
        last = min(tokens, self.chunk_tokens) * self.kv_bytes_per_token / self.transfer_bytes_per_s
        return self.transfer_latency_s + max(last, whole - prefill_s)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Raises ProfileError that names the field."""
        try:
            found: Any = json.loads(text)
        except ValueError as error:
            raise ProfileError(f"{where}: not JSON: {error}") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or (unknown := found.keys() - known):
            raise ProfileError(
                f"{where}: {sorted(unknown)[0] if isinstance(found, dict) else 'this'} is no field of a profile; "
                f"there are {', '.join(sorted(known))}"
            )
        if missing := {"prefill", "decode", "context_s", "kv_tokens"} - found.keys():
            raise ProfileError(f"{where}: {sorted(missing)[0]} is missing")
        try:
            for name in ("prefill", "decode"):
                found[name] = tuple((float(amount), float(seconds)) for amount, seconds in found[name])
            given: dict[str, Any] = {"source": where} | found
            return cls(**given)
        except ProfileError as error:
            raise ProfileError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{where}: {error}") from None


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between the points and on beyond the last; before the first, its value."""
    if at <= points[0][0] or len(points) == 1:
        return points[0][1]
    index = min(bisect_right(points, at, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def fit_decode(steps: Iterable[tuple[int, int, float]]) -> tuple[Points, float]:
    """(`decode`, `context_s`) out of measured (batch, context, seconds).

    The slope over the context is one least-squares line through all batches, each about its own mean.
    """
    by_batch: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for batch, context, seconds in steps:
        by_batch[batch].append((context, seconds))
    over = under = 0.0
    for batch, measured in by_batch.items():
        mean_context = fmean(context for context, _ in measured)
        mean_s = fmean(seconds for _, seconds in measured)
        for context, seconds in measured:
            read = batch * (context - mean_context)
            over += read * (seconds - mean_s)
            under += read * read
    slope = max(over / under, 0.0) if under else 0.0
    points, floor = [], 0.0
    for batch, measured in sorted(by_batch.items()):
        own = fmean(seconds - slope * batch * context for context, seconds in measured)
        # Noise must not make a larger batch faster, or the reading of KV explain all of a step.
        floor = max(floor, own, 0.05 * min(seconds for _, seconds in measured))
        points.append((float(batch), floor))
    return tuple(points), slope


def splitwise(
    path: Path, model: str, hardware: str, tensor_parallel: int, limits: Mapping[str, Any]
) -> Profile:
    """From perf_model.csv of splitwise-sim (times in milliseconds). `limits`: what that table does not tell.

    Its larger batches were measured at one prompt length only: the slope over the context comes from batch 1.
    Raises ProfileError.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} can't be read: {error}") from error
    wanted = (model, hardware, tensor_parallel)
    prompts: dict[int, list[float]] = defaultdict(list)
    steps: dict[tuple[int, int], list[float]] = defaultdict(list)
    names = set()
    try:
        for row in rows:
            name = (row["model"], row["hardware"], int(row["tensor_parallel"]))
            names.add(name)
            if name != wanted:
                continue
            prompt, batch = int(row["prompt_size"]), int(row["batch_size"])
            if batch == 1:
                prompts[prompt].append(float(row["prompt_time"]) / 1e3)
            context = prompt + int(row["token_size"]) // 2
            steps[batch, context].append(float(row["token_time"]) / 1e3)
    except (KeyError, ValueError, TypeError) as error:
        raise ProfileError(f"{path} is no table of splitwise-sim: {type(error).__name__} {error}") from None
    if not prompts:
        have = "; ".join(f"{m} {h} {tp}" for m, h, tp in sorted(names))
        raise ProfileError(f"{path} has no {model} on {hardware} with {tensor_parallel} GPUs; it has {have}")
    decode, slope = fit_decode((batch, context, median(times)) for (batch, context), times in steps.items())
    return Profile(
        source=f"splitwise {model} {hardware} × {tensor_parallel}",
        prefill=tuple((float(tokens), median(times)) for tokens, times in sorted(prompts.items())),
        decode=decode,
        context_s=slope,
        **limits,
    )

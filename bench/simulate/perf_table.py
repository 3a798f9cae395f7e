"""A cost model out of a table of measured prompt and token times (Splitwise, ISCA'24: perf_model.csv).

Rows give the time of a whole prompt batch and of one decode step by prompt size and batch. What a prompt of n tokens
takes is interpolated between the measured sizes; how much of it is attention shows where the same number of tokens was
measured as one prompt and as a batch of short ones. Decode is fitted by least squares.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from bench.simulate.cost import CostError, StepCost, non_decreasing
from bench.simulate.least_squares import fit_positive

# 2 (K and V) x layers x KV heads x head size x 2 bytes (bfloat16), of the models in the table.
KV_TOKEN_BYTES = {"llama2-70b": 2 * 80 * 8 * 128 * 2, "bloom-176b": 2 * 70 * 112 * 128 * 2}
_COLUMNS = (
    "model",
    "hardware",
    "tensor_parallel",
    "prompt_size",
    "batch_size",
    "token_size",
    "prompt_time",
    "token_time",
)


def read_table(path: Path, model: str, hardware: str, tensor_parallel: int) -> StepCost:
    """Raises CostError when the table can't be read or holds nothing of this kind."""
    prompts: dict[tuple[int, int], list[float]] = {}
    tokens: dict[tuple[int, float], list[float]] = {}
    kinds: set[str] = set()
    try:
        with path.open(newline="") as lines:
            rows = csv.DictReader(lines)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise CostError(f"{path}: column {missing[0]} is missing")
            for row in rows:
                kinds.add(f"{row['model']}/{row['hardware']}/{row['tensor_parallel']}")
                if (row["model"], row["hardware"], row["tensor_parallel"]) != (
                    model,
                    hardware,
                    str(tensor_parallel),
                ):
                    continue
                size, batch = int(row["prompt_size"]), int(row["batch_size"])
                prompts.setdefault((size, batch), []).append(float(row["prompt_time"]) / 1e3)
                # A step in the middle of the answer stands for all.
                context = batch * (size + int(row["token_size"]) / 2)
                tokens.setdefault((batch, context), []).append(float(row["token_time"]) / 1e3)
    except OSError as error:
        raise CostError(f"{path}: {error.strerror}; give the table with --table") from None
    except ValueError as error:
        raise CostError(f"{path}: {error}") from None
    if not prompts:
        raise CostError(
            f"{path} holds nothing of {model}/{hardware}/{tensor_parallel} (model/hardware/tensor parallel); "
            f"there are {', '.join(sorted(kinds))}"
        )
    if model not in KV_TOKEN_BYTES:
        raise CostError(
            f"the size of the KV cache of {model} is not known; known are {', '.join(KV_TOKEN_BYTES)}"
        )
    pair_s = _attention(prompts)
    linear: dict[int, list[float]] = {}
    for (size, batch), seconds in prompts.items():
        attention_s = pair_s * batch * size * size / 2
        linear.setdefault(size * batch, []).append(statistics.median(seconds) - attention_s)
    points = non_decreasing([(float(n), statistics.fmean(s)) for n, s in linear.items()])
    cases = [(batch, context, statistics.median(seconds)) for (batch, context), seconds in tokens.items()]
    base_s, sequence_s, context_s = fit_positive(
        [(1.0, float(batch), context) for batch, context, _ in cases], [seconds for _, _, seconds in cases]
    )
    return StepCost(
        prompt=points,
        pair_s=pair_s,
        decode_base_s=base_s,
        sequence_s=sequence_s,
        context_s=context_s,
        kv_token_bytes=float(KV_TOKEN_BYTES[model]),
        source=f"{model}, {hardware}, tensor parallel {tensor_parallel} ({path.name})",
    )


def _attention(prompts: dict[tuple[int, int], list[float]]) -> float:
    """Seconds per pair: what one prompt takes longer than a batch of shorter ones with as many tokens."""
    by_total: dict[int, list[tuple[float, float]]] = {}
    for (size, batch), seconds in prompts.items():
        by_total.setdefault(size * batch, []).append((batch * size * size / 2, statistics.median(seconds)))
    more = pairs = 0.0
    for cases in by_total.values():
        (least, low_s), (most, high_s) = min(cases), max(cases)
        more += (high_s - low_s) * (most - least)
        pairs += (most - least) ** 2
    return max(more / pairs, 0.0) if pairs else 0.0

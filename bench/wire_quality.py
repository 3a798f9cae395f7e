"""What compressing KV blocks on the wire costs in quality: the error of the values, and what becomes of the next tokens.

python -m bench.wire_quality
python -m bench.wire_quality --tokens 4096 --dtype float32

The first half of a text is a prompt that one worker has computed. Its keys and values go through the wire's form and
back, as between two workers, and the second half is computed on them: its next-token distributions are compared with
those on the untouched keys and values. Weights, text and arithmetic are the same on both sides, so what differs comes
from the wire alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.quality import BLOCK_SIZE, text_windows
from kernels.attention_step import AttentionStep
from kernels.cache_view import CacheView
from kernels.cpu.relayout import Dtype, Wire, compress_blocks, restore_blocks, wire_block_bytes
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import read_json
from workers.models.decoder import Decoder
from workers.models.scheme import choose_scheme
from workers.models.spec import DecoderSpec
from workers.models.weights import load_weights

FORMS = ("none", "int8", "fp8")


@dataclass(frozen=True)
class WireQuality:
    bytes_ratio: float  # of the wire to the cache
    max_error: float  # of a value, as a part of the largest of its row
    kl: float  # nats per token
    max_kl: float  # of one token
    same_best: float  # share of the tokens whose most likely one stays the same


class Halves:
    """A model that reads a text in two halves, with something done to its cache in between."""

    def __init__(self, model: PreparedModel, dtype: torch.dtype, window: int) -> None:
        spec = DecoderSpec.from_config(read_json(model.path / "config.json"))
        weights = load_weights(
            model.path, spec, dtype, torch.device("cpu"), choose_scheme("none", model.path)
        )
        self._decoder = Decoder(spec, weights, max_positions=window)
        self._blocks = torch.arange(-(-window // BLOCK_SIZE))[None]
        self.cache = self._decoder.new_kv_cache(self._blocks.numel(), BLOCK_SIZE)
        self._dtype = str(dtype).removeprefix("torch.")

    def read(self, token_ids: Sequence[int], start: int) -> Tensor:
        """Compute tokens from `start` on, upon what the cache holds before: their hidden states."""
        end = len(token_ids)
        positions = torch.arange(start, end)
        step = AttentionStep.of([0, end - start], [end], self._blocks, positions)
        return self._decoder.forward(torch.tensor(list(token_ids[start:])), positions, self.cache, step)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden).float().log_softmax(-1)

    def through_the_wire(self, num_blocks: int, form: str) -> tuple[float, float]:
        """The first blocks of the cache, there and back; the ratio of bytes, and the largest error."""
        _, layers, _, heads, tokens, dim = self.cache.shape
        row = dim * self.cache.element_size()
        before = self.cache[:num_blocks].float()
        if form != "none":
            wire, dtype, blocks = cast(Wire, form), cast(Dtype, self._dtype), range(num_blocks)
            view = CacheView.canonical(self.cache.data_ptr(), len(self.cache), layers, heads, tokens, row)
            packed = np.empty(num_blocks * wire_block_bytes(layers, heads, tokens, dim), np.uint8)
            compress_blocks(packed, view, blocks, dtype=dtype, wire=wire)
            restore_blocks(view, blocks, packed, dtype=dtype, wire=wire)
        amax = before.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        error = ((self.cache[:num_blocks].float() - before).abs() / amax).max().item()
        ratio = 1.0 if form == "none" else (dim + 4) / row
        return ratio, error


def measure(model: PreparedModel, windows: list[list[int]], dtype: torch.dtype) -> dict[str, WireQuality]:
    halves = Halves(model, dtype, len(windows[0]))
    kls: dict[str, list[Tensor]] = {form: [] for form in FORMS}
    same: dict[str, list[Tensor]] = {form: [] for form in FORMS}
    errors = dict.fromkeys(FORMS, 0.0)
    ratios = dict.fromkeys(FORMS, 1.0)
    with torch.inference_mode():
        for token_ids in windows:
            middle = len(token_ids) // 2 // BLOCK_SIZE * BLOCK_SIZE
            halves.read(token_ids[:middle], 0)
            untouched = halves.cache.clone()
            exact = halves.log_probabilities(halves.read(token_ids, middle))
            for form in FORMS:
                halves.cache.copy_(untouched)
                ratios[form], error = halves.through_the_wire(middle // BLOCK_SIZE, form)
                errors[form] = max(errors[form], error)
                found = halves.log_probabilities(halves.read(token_ids, middle))
                kls[form].append(functional.kl_div(found, exact, log_target=True, reduction="none").sum(-1))
                same[form].append(found.argmax(-1) == exact.argmax(-1))
    return {
        form: WireQuality(
            bytes_ratio=ratios[form],
            max_error=errors[form],
            kl=torch.cat(kls[form]).mean().item(),
            max_kl=torch.cat(kls[form]).max().item(),
            same_best=torch.cat(same[form]).float().mean().item(),
        )
        for form in FORMS
    }


def report(results: dict[str, WireQuality]) -> str:
    lines = [
        "| on the wire | bytes | largest error in a row | KL, nats per token | largest KL | same best token |",
        "|---|---|---|---|---|---|",
    ]
    for form, found in results.items():
        lines.append(
            f"| {form} | {found.bytes_ratio:.0%} | {found.max_error:.2%} of its largest value | {found.kl:.5f} "
            f"| {found.max_kl:.3f} | {found.same_best:.2%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.wire_quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024, help="half of it is prompt, half is compared")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    options = parser.parse_args(arguments)

    model = prepare_model(options.model, say=print)
    windows = text_windows(model, options.tokens, options.window)
    began = time.perf_counter()
    results = measure(model, windows, getattr(torch, options.dtype))
    print(
        f"{model.served_name}, KV cache in {options.dtype}: {len(windows)} windows of {options.window} tokens of "
        f"pydoc_data.topics (Python {platform.python_version()}), {time.perf_counter() - began:.0f} s\n\n"
        f"{report(results)}"
    )
    if options.json:
        options.json.write_text(json.dumps({form: asdict(q) for form, q in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()

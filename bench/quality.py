"""What a weight or KV format costs in quality: perplexity, and divergence from the float32 model, on real text.

python -m bench.quality                       every format, through torch and, where they are, the native kernels
python -m bench.quality --formats int8,int4 --tokens 4096

The reference is transformers in float32 on the same weights. The text is Python's own documentation of its language,
which every installation carries (`pydoc_data.topics`): prose with code in it, in windows that know nothing of each
other. KL is in nats per token; its mean hides no sign, so it tells formats apart long before perplexity does.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention_step import AttentionStep
from kernels.quantized_matrix import Weight
from kernels.reference_matmul import RowFormat, quantize_rows
from kernels.reference_relayout import Wire
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import read_json
from workers.models.decoder import Decoder
from workers.models.linear import Linear, make_linear
from workers.models.ops import Ops, torch_ops
from workers.models.scheme import Scheme, choose_scheme
from workers.models.spec import DecoderSpec
from workers.models.weights import load_weights

BLOCK_SIZE = 16
_HEAD_ROWS = 32768  # no other matrix of a model that fits here has as many outputs
_ROWS = 64  # of logits at a time, so that they stay near the core


class Logits(Protocol):
    """A model as a function of a text."""

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """float32 [T, vocab]: after each token, from an empty context. Valid until the next call."""


class TransformersLogits:
    def __init__(self, model: PreparedModel) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._model(torch.tensor([list(token_ids)])).logits[0]
        return logits


class TorchLogits:
    """Weights rounded as `scheme` says; activations in `dtype`, not rounded to integers as native kernels do, but to
    `rows` by row where given, before every product but the head's: as a GPU's units for such numbers want them."""

    def __init__(
        self,
        model: PreparedModel,
        scheme: Scheme,
        dtype: torch.dtype,
        window: int,
        kv_wire: Wire | None = None,
        rows: RowFormat | None = None,
    ) -> None:
        spec = DecoderSpec.from_config(read_json(model.path / "config.json"))
        weights = load_weights(model.path, spec, dtype, torch.device("cpu"), scheme)
        self._decoder = Decoder(spec, weights, max_positions=window, ops=_ops(rows), kv_wire=kv_wire)
        self._cache = self._decoder.new_kv_cache(-(-window // BLOCK_SIZE), BLOCK_SIZE)

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        length = len(token_ids)
        positions = torch.arange(length)
        blocks = torch.arange(-(-length // BLOCK_SIZE))[None]
        step = AttentionStep.of([0, length], [length], blocks, positions)
        hidden = self._decoder.forward(torch.tensor(list(token_ids)), positions, self._cache, step)
        return self._decoder.logits(hidden)


def _ops(rows: RowFormat | None) -> Ops:
    ops: Any = torch_ops()
    if rows is None:
        return ops  # type: ignore[no-any-return]

    def linear(weight: Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Linear:
        product = make_linear(weight, bias, dtype)
        if weight.shape[0] > _HEAD_ROWS:
            return product

        def rounded(x: Tensor) -> Tensor:
            q, scale = quantize_rows(x, rows)
            return product((q.float() * scale).to(x.dtype))

        return rounded

    ops.linear = linear
    return ops  # type: ignore[no-any-return]


class NativeLogits:
    """The engine's own CPU path, all of a window in one step."""

    def __init__(self, model: PreparedModel, quantization: str, kv_cache_dtype: str, window: int) -> None:
        from workers.config import EngineConfig
        from workers.engine.native_runner import NativeBackend

        config = EngineConfig.model_validate(
            {
                "quantization": quantization,
                "kv_cache_dtype": kv_cache_dtype,
                "block_size": BLOCK_SIZE,
                "max_num_batched_tokens": max(window, 64),
            }
        )
        self._blocks = -(-window // BLOCK_SIZE)
        self._runner = NativeBackend(config, model).runner(self._blocks)

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        from kernels.cpu.decoder import StepArrays

        length = len(token_ids)
        every = np.arange(length, dtype=np.int32)
        step = StepArrays(
            token_ids=np.array(token_ids, np.int32),
            positions=every,
            slots=every.astype(np.int64),
            query_start=np.array([0, length], np.int32),
            lengths=np.array([length], np.int32),
            blocks=np.arange(self._blocks, dtype=np.int32),
            block_start=np.zeros(1, np.int32),
            rows=every,
        )
        return self._runner.logits(step)


@dataclass(frozen=True)
class Quality:
    perplexity: float
    against_reference: float  # perplexity's ratio - 1
    standard_error: float  # of that ratio, from the spread over windows
    kl: float  # nats per token, of the reference's distribution from this one
    same_best: float  # share of positions whose most likely token is the reference's


class Tally:
    """Sums of one format over windows."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._excess: list[float] = []  # over the reference's loss, by window
        self._kl: list[float] = []
        self._same: list[float] = []

    def add(self, reference: Tensor, logits: Tensor, token_ids: Sequence[int]) -> None:
        """reference: float32 log-probabilities [T, vocab]."""
        sums = np.zeros(4)
        targets = torch.tensor([*token_ids[1:], 0])  # nothing is known to follow the last
        for first in range(0, len(token_ids), _ROWS):
            rows = torch.arange(first, min(first + _ROWS, len(token_ids)))
            exact, other = reference[rows], logits[rows].float().log_softmax(-1)
            known = rows < len(token_ids) - 1
            target = targets[rows][known, None]
            sums += [
                -other[known].gather(-1, target).sum().item(),
                -exact[known].gather(-1, target).sum().item(),
                functional.kl_div(other, exact, log_target=True, reduction="sum").item(),
                (other.argmax(-1) == exact.argmax(-1)).sum().item(),
            ]
        loss, reference_loss = sums[:2] / (len(token_ids) - 1)
        self._losses.append(loss)
        self._excess.append(loss - reference_loss)
        self._kl.append(sums[2] / len(token_ids))
        self._same.append(sums[3] / len(token_ids))

    def quality(self) -> Quality:
        excess = np.array(self._excess)
        spread = excess.std(ddof=1) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
        return Quality(
            perplexity=math.exp(np.mean(self._losses)),
            against_reference=math.exp(excess.mean()) - 1,
            standard_error=math.exp(excess.mean()) * float(spread),
            kl=float(np.mean(self._kl)),
            same_best=float(np.mean(self._same)),
        )


def formats(model: PreparedModel, window: int) -> dict[str, Callable[[], Logits]]:
    """What can be measured, by name; each is loaded when called."""

    def torch_format(
        quantization: str,
        dtype: torch.dtype = torch.bfloat16,
        kv_wire: Wire | None = None,
        rows: RowFormat | None = None,
    ) -> Callable[[], Logits]:
        scheme = choose_scheme(quantization, model.path)
        return lambda: TorchLogits(model, scheme, dtype, window, kv_wire, rows)

    def native_format(quantization: str, kv: str = "auto") -> Callable[[], Logits]:
        return lambda: NativeLogits(model, quantization, kv, window)

    found = {"torch fp32": torch_format("none", torch.float32), "torch bf16": torch_format("none")}
    wires: tuple[Wire, ...] = ("int8", "fp8")
    found |= {f"torch bf16, {wire} KV": torch_format("none", kv_wire=wire) for wire in wires}
    found |= {f"torch {name}": torch_format(name) for name in ("int8", "int4", "fp8")}
    found["torch fp8, rounded rows"] = torch_format("fp8", rows="fp8")
    if choose_scheme("stored", model.path).name == "stored":
        found["torch stored"] = torch_format("stored")
        found["native stored"] = native_format("stored")
    found |= {"native bf16": native_format("none")}
    found |= {f"native {name}": native_format(name) for name in ("int8", "int4")}
    found["native bf16, int8 KV"] = native_format("none", "int8")
    found["native int8, int8 KV"] = native_format("int8", "int8")
    return found


def measure(reference: Logits, others: dict[str, Logits], windows: list[list[int]]) -> dict[str, Quality]:
    """Window by window, so that one window's logits are in memory and not the text's."""
    tallies = {name: Tally() for name in others}
    with torch.inference_mode():
        for token_ids in windows:
            exact = reference(token_ids).float().log_softmax(-1)
            for name, logits in others.items():
                tallies[name].add(exact, logits(token_ids), token_ids)
    return {name: tally.quality() for name, tally in tallies.items()}


def text_windows(model: PreparedModel, tokens: int, window: int) -> list[list[int]]:
    """The beginning of the text, in whole windows. Raises ValueError when it is shorter."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    ids: list[int] = []
    for name in sorted(topics):
        ids += tokenizer.encode(topics[name], add_special_tokens=False).ids
        if len(ids) >= tokens:
            break
    if len(ids) < tokens or tokens < window:
        raise ValueError(f"{tokens} tokens in windows of {window} cannot be had from a text of {len(ids)}")
    return [ids[first : first + window] for first in range(0, tokens - window + 1, window)]


def report(results: dict[str, Quality]) -> str:
    lines = [
        "| format | perplexity | against fp32 | KL, nats per token | same best token |",
        "|---|---|---|---|---|",
    ]
    for name, quality in results.items():
        change = f"{quality.against_reference:+.2%} ± {quality.standard_error:.2%}"
        lines.append(
            f"| {name} | {quality.perplexity:.3f} | {change} | {quality.kl:.5f} | {quality.same_best:.2%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--formats", help="names or parts of names, with commas between; default: all")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024, help="tokens of context at most")
    parser.add_argument("--threads", type=int, help="of torch; on a busy machine 1 is quickest")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    options = parser.parse_args(arguments)

    model = prepare_model(options.model, say=print)
    windows = text_windows(model, options.tokens, options.window)
    wanted = (options.formats or "").split(",")
    chosen = {
        name: make
        for name, make in formats(model, options.window).items()
        if any(part.strip() in name for part in wanted)
    }
    if not chosen:
        parser.error(f"--formats {options.formats}: known are {', '.join(formats(model, options.window))}")
    began = time.perf_counter()
    # The native engine sets torch to one thread when it is loaded; the reference needs all of them.
    threads = options.threads or torch.get_num_threads()
    others = {name: make() for name, make in chosen.items()}
    torch.set_num_threads(threads)
    results = measure(TransformersLogits(model), others, windows)
    print(
        f"{model.served_name}: {len(windows)} windows of {options.window} tokens of pydoc_data.topics "
        f"(Python {platform.python_version()}), {time.perf_counter() - began:.0f} s\n\n{report(results)}"
    )
    if options.json:
        options.json.write_text(json.dumps({name: asdict(q) for name, q in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()

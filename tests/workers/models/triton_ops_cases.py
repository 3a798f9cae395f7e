"""What test_triton_ops.py runs in a process of its own, under Triton's interpreter or on the GPU: whole models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from triton.runtime import interpreter

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference_relayout import Wire
from kernels.triton import moe
from tests.workers.models.tiny_fallback import write_fallback_model
from workers.models import choose_ops as choose_ops_module
from workers.models import triton_ops
from workers.models.choose_ops import choose_ops
from workers.models.decoder import load_decoder
from workers.models.fallback import load_fallback
from workers.models.fallback_spec import FallbackSpec, read_spec
from workers.models.ops import torch_ops
from workers.models.random_model import write_random_model
from workers.models.scheme import Scheme, SchemeName

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 12
TABLES = torch.tensor([[3, 7, 1, 9, 0, 0], [5, 2, 11, 4, 0, 0]], device=DEVICE)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "mistral_window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mixtral": {"model_type": "mixtral"},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "olmoe": {"model_type": "olmoe"},
    "deepseek_v2": {"model_type": "deepseek_v2"},
    "deepseek_v3": {"model_type": "deepseek_v3"},
    "gpt_oss": {"model_type": "gpt_oss", "sliding_window": 5},
}
ALWAYS = ("deepseek_v3", "gpt_oss")  # between them they take almost every way through the ops
each_family = pytest.mark.parametrize(
    "family", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


@dataclass
class Run:
    """Two sequences through a decoder: what is fed of each in a step, and their logits."""

    decoder: Any  # Decoder or FallbackModel
    token_ids: Tensor  # [2, length]
    done: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.kv_cache = self.decoder.new_kv_cache(NUM_BLOCKS, BLOCK_SIZE)
        self.logits: list[list[Tensor]] = [[], []]

    def step(self, counts: dict[int, int], fill: int = 0) -> None:
        """`counts` tokens of each sequence; behind them `fill` sequences of one token that only fill up."""
        ids, positions, slots, starts, lengths = [], [], [], [0], []
        for sequence, count in counts.items():
            position = torch.arange(self.done[sequence], self.done[sequence] + count, device=DEVICE)
            ids.append(self.token_ids[sequence, position])
            positions.append(position)
            slots.append(TABLES[sequence, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            self.done[sequence] += count
            starts.append(starts[-1] + count)
            lengths.append(self.done[sequence])
        none = torch.zeros(fill, dtype=torch.int64, device=DEVICE)
        starts += [starts[-1] + 1 + i for i in range(fill)]
        tables = torch.cat((TABLES[list(counts)], none[:, None].expand(-1, TABLES.shape[1])))
        step = AttentionStep.of(starts, lengths + [1] * fill, tables, torch.cat((*slots, none - 1)))
        with without_the_host():
            hidden = self.decoder.forward(
                torch.cat((*ids, none)), torch.cat((*positions, none)), self.kv_cache, step,
                torch.arange(starts[-1], device=DEVICE),
            )  # fmt: skip
            logits = self.decoder.logits(hidden)
        for row, (sequence, count) in enumerate(counts.items()):
            self.logits[sequence].append(logits[starts[row] : starts[row] + count])

    def whole(self) -> Tensor:
        """[2, length, vocab]."""
        return torch.stack([torch.cat(logits) for logits in self.logits])


class _NoSizesFromData(TorchDispatchMode):
    """Refuses what waits for the device, or makes a shape of what lies on it."""

    refused = (
        "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "bincount", "unique", "_unique2", "equal",
        "repeat_interleave",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.refused, f"{name} makes the host wait"
        if name in ("index", "index_put_", "index_put"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


_refuse = False


@contextmanager
def without_the_host() -> Iterator[None]:
    """Where Triton's ops run: what would make the host wait for the device fails."""
    if not _refuse:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, _NoSizesFromData():
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):

            def refuse(self: Tensor, *_: Any, name: str = name, **__: Any) -> Any:
                raise AssertionError(f"{name} makes the host wait")

            patch.setattr(Tensor, name, refuse)
        yield


@each_family
def test_says_what_torch_and_transformers_say(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, both kinds in one step, and decode in a launch with room for more; the host waits for nothing."""
    write_random_model(tmp_path, FAMILIES[family], seed=5)
    token_ids = torch.randint(0, 259, (2, 10), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    runs = []
    for ops in (torch_ops(), choose_ops("triton", DEVICE, torch.float32)):
        monkeypatch.setattr(f"{__name__}._refuse", ops.name == "triton")
        decoder = load_decoder(tmp_path, torch.float32, DEVICE, ops=ops)
        run = Run(decoder, token_ids)
        run.step({0: 8})
        run.step({1: 9, 0: 1})
        run.step({0: 1, 1: 1}, fill=2 if ops.name == "triton" else 0)
        runs.append(run)
    plain, triton = runs
    torch.testing.assert_close(triton.whole(), plain.whole(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(triton.kv_cache, plain.kv_cache, rtol=1e-4, atol=1e-4)
    assert torch.equal(triton.decoder.expert_counts(), plain.decoder.expert_counts())
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.to(DEVICE).eval()(token_ids).logits
    torch.testing.assert_close(triton.whole(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(triton.whole().argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("qwen2", "int4"),
        pytest.param("qwen3_moe", "int4", marks=pytest.mark.slow),
        pytest.param("llama_biases", "int8", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fp8", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "int8", marks=pytest.mark.slow),
    ],
)
def test_quantized_weights_say_what_the_same_values_say_as_floats(
    tmp_path: Path, family: str, scheme: SchemeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path, FAMILIES[family], seed=5)
    token_ids = torch.randint(0, 259, (2, 10), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    runs = []
    for ops in (torch_ops(), choose_ops("triton", DEVICE, torch.float32)):
        keeps = ops.name == "triton"
        monkeypatch.setattr(f"{__name__}._refuse", keeps)
        decoder = load_decoder(
            tmp_path, torch.float32, DEVICE, ops=ops, scheme=Scheme(scheme), keep_quantized=keeps
        )
        run = Run(decoder, token_ids)
        run.step({0: 8})
        run.step({1: 9, 0: 1})
        run.step({0: 1, 1: 1}, fill=2 if keeps else 0)
        runs.append(run)
    torch.testing.assert_close(runs[1].whole(), runs[0].whole(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "wire"),
    [
        ("qwen3", "fp8"),
        pytest.param("qwen3", "int8", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fp8", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "int8", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "fp8", marks=pytest.mark.slow),
    ],
)
def test_quantized_caches_hold_and_say_what_torch_has_there(
    tmp_path: Path, family: str, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a last bit made a value round to the next step."""
    write_random_model(tmp_path, FAMILIES[family], seed=5)
    token_ids = torch.randint(0, 259, (2, 10), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    runs = []
    for ops in (torch_ops(), choose_ops("triton", DEVICE, torch.float32)):
        monkeypatch.setattr(f"{__name__}._refuse", ops.name == "triton")
        run = Run(load_decoder(tmp_path, torch.float32, DEVICE, ops=ops, kv_wire=wire), token_ids)
        run.step({0: 9})
        run.step({1: 10, 0: 1}, fill=1)
        runs.append(run)
    plain, triton = runs
    held = [PagedKv.held_in(run.kv_cache, run.decoder.spec.head_dim, wire).values() for run in runs]
    assert torch.isclose(*held, rtol=1e-4, atol=1e-5).float().mean() > 0.995
    torch.testing.assert_close(*held, rtol=0.13, atol=2e-2)
    torch.testing.assert_close(triton.whole(), plain.whole(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("family", "wire"),
    [
        ("gemma2", None),
        pytest.param("gemma2", "fp8", marks=pytest.mark.slow),
        pytest.param("stablelm", None, marks=pytest.mark.slow),
    ],
)
def test_models_of_transformers_attend_through_triton(
    tmp_path: Path, family: str, wire: Wire | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_fallback_model(tmp_path / family, family)
    spec = read_spec(path)
    assert isinstance(spec, FallbackSpec)
    token_ids = torch.randint(0, 259, (2, 10), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    runs = []
    for ops in (torch_ops(), choose_ops("triton", DEVICE, torch.float32)):
        monkeypatch.setattr(f"{__name__}._refuse", ops.name == "triton")
        run = Run(load_fallback(path, spec, torch.float32, DEVICE, ops, wire), token_ids)
        run.step({0: 8})
        run.step({1: 9, 0: 1})
        run.step({0: 1, 1: 1}, fill=2 if ops.name == "triton" else 0)
        runs.append(run)
    bound = 1e-4 if wire is None else 2e-2
    torch.testing.assert_close(runs[1].whole(), runs[0].whole(), rtol=bound, atol=bound)
    if wire is None:
        expected = torch.stack([runs[1].decoder.own_logits(one) for one in token_ids])
        torch.testing.assert_close(runs[1].whole(), expected, rtol=1e-4, atol=1e-4)


def test_waiting_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(write_random_model(tmp_path, "mixtral"), torch.float32, DEVICE, ops=torch_ops())
    monkeypatch.setattr(f"{__name__}._refuse", True)
    with pytest.raises(AssertionError, match="tolist makes the host wait"):
        Run(decoder, torch.zeros((2, 4), dtype=torch.int64, device=DEVICE)).step({0: 1})


def test_ops_that_cannot_be_had_are_said(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with pytest.raises(ValueError, match="avx512, which is for CPUs"):
        choose_ops("avx512", DEVICE, torch.float32)
    assert choose_ops("torch", DEVICE, torch.float32).name == "torch"
    right = moe.fused_experts
    monkeypatch.setattr(triton_ops, "fused_experts", lambda *given: right(*given) * 1.01)
    found = choose_ops_module._tried.__wrapped__(DEVICE, torch.float32)
    assert isinstance(found, str)
    monkeypatch.setattr(choose_ops_module, "_tried", lambda *_: found)
    with pytest.raises(ValueError, match="is triton, which cannot be used"):
        choose_ops("triton", DEVICE, torch.float32)
    assert choose_ops("auto", torch.device("cuda"), torch.float32).name == "torch"
    assert "torch computes what Triton's kernels would" in caplog.text


_NO_LAUNCH = (
    "view",
    "flatten",
    "empty",
    "select.int",
    "slice",
    "transpose",
    "detach",
    "lift_fresh",
    "expand",
    "unbind",
)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts what the interpreter is asked for")
@pytest.mark.parametrize(
    ("family", "number"), [("llama", 9), pytest.param("mixtral", 13, marks=pytest.mark.slow)]
)
def test_launches_of_a_layer(
    tmp_path: Path, family: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a decoding step, with a context in parts. On a GPU each costs a microsecond or two, whatever it does."""
    launched: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            launched.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            right(executor, *args, **kwargs)
        launched.append(executor.fn.__name__)

    right = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    numbers = []
    for layers in (1, 2):
        path = write_random_model(tmp_path / str(layers), {"model_type": family, "num_hidden_layers": layers})
        ops = choose_ops("triton", DEVICE, torch.float32)
        decoder = load_decoder(path, torch.float32, DEVICE, ops=ops)
        tables = torch.arange(80)[None]
        step = AttentionStep.of([0, 1], [300], tables, torch.tensor([299]), DEVICE)
        token_ids, positions = torch.tensor([7], device=DEVICE), torch.tensor([299], device=DEVICE)
        cache = decoder.new_kv_cache(80, BLOCK_SIZE)
        decoder.forward(token_ids, positions, cache, step)  # what is made once
        launched.clear()
        with Noting():  # type: ignore[no-untyped-call]
            decoder.forward(token_ids, positions, cache, step)
        numbers.append(sum(not any(name in one for name in _NO_LAUNCH) for one in launched))
    assert numbers[1] - numbers[0] == number, launched

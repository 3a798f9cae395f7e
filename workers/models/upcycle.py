"""A dense model into a mixture of experts that says the same: real text through expert-parallel code on any machine.

The neurons of each MLP are permuted and cut into S slices, once for each of R groups, so that every group of S experts
is the whole MLP and no two experts are alike. The router has one row per group, which its S experts share; a token takes
S experts, those of the group it likes best, each with weight 1 / S, and the down projections are scaled by S. Whichever
group a token goes to, its output is the dense model's; an expert of another group in its place is another MLP.

Router rows are random and orthogonal. With `noise` their lengths are log-normal with that standard deviation: a longer
row wins more tokens, so that some groups are hotter than others. (Sparse up-cycling: Komatsuzaki et al. 2023; slicing:
Dai et al. 2024, section 3.1.)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from workers.models.checkpoint import read_headers, read_json
from workers.models.errors import ModelError
from workers.models.expert_form import ExpertForm, expert_form
from workers.models.shard_writer import ShardWriter
from workers.models.spec import DecoderSpec

Say = Callable[[str], None]
Dtype = Literal["source", "float32", "bfloat16", "float16"]

# dense model_type -> what its up-cycled form is, with the keys by which a sparse config says it.
_SPARSE_FORMS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    "mistral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    "qwen3": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
}
_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Upcycling:
    groups: int  # R
    slices: int  # S, experts of a group, and experts that a token takes
    noise: float = 0.0
    seed: int = 0
    dtype: Dtype = "source"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.slices < 1:
            raise ModelError(
                f"groups and slices must be at least 1, not {self.groups} groups of {self.slices} slices"
            )
        if not 0 <= self.noise < math.inf:
            raise ModelError(f"noise must be a number of at least 0, not {self.noise}")
        if self.dtype not in get_args(Dtype):
            raise ModelError(f"dtype {self.dtype!r} is not known; allowed are {', '.join(get_args(Dtype))}")

    @property
    def num_experts(self) -> int:
        return self.groups * self.slices


def upcycle(source: Path, target: Path, how: Upcycling, say: Say = lambda message: None) -> Path:
    """Write the model directory `source` as a mixture of experts to `target`, which must be absent or empty.

    Raises ModelError. Memory holds one layer's MLP and a file's worth of what is written. The result is deterministic;
    in 16 bits the output equals the dense model's up to rounding, less so where `slices` is no power of two.
    """
    config = read_json(source / "config.json")
    dense = DecoderSpec.from_config(config)
    sparse_config = _sparse_config(config, dense, how)
    spec = DecoderSpec.from_config(sparse_config)
    headers = read_headers(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists already; name a directory that does not, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    try:
        making.chmod(0o755)
        _copy_tokenizer(source, making)
        form, random = expert_form(spec), torch.Generator().manual_seed(how.seed)
        dtype = None if how.dtype == "source" else getattr(torch, how.dtype)
        with ShardWriter(making) as writer:
            tensors = _Tensors({name: header.file for name, header in headers.items()}, dtype)
            for name in headers:
                if ".mlp." not in name:
                    writer.add(name, tensors.read(name))
            for layer in range(dense.num_layers):
                if layer % 10 == 0:
                    say(f"up-cycling layer {layer + 1} of {dense.num_layers} ...")
                for name, tensor in _layer(tensors, layer, spec, form, how, random):
                    writer.add(name, tensor)
        sparse_config["dtype"] = str(tensors.dtype).removeprefix("torch.")
        (making / "config.json").write_text(json.dumps(sparse_config, indent=2) + "\n")
        os.replace(making, target)  # an empty directory there is replaced
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target


def _sparse_config(config: dict[str, Any], dense: DecoderSpec, how: Upcycling) -> dict[str, Any]:
    form = _SPARSE_FORMS.get(dense.architecture)
    if form is None:
        raise ModelError(
            f"a {dense.architecture} model cannot be up-cycled; those of {', '.join(_SPARSE_FORMS)} can"
        )
    if config.get("quantization_config"):
        raise ModelError("a quantized checkpoint cannot be up-cycled; use the model's unquantized weights")
    if dense.mlp_bias or (dense.architecture == "llama" and dense.qkv_bias):
        raise ModelError("a model with biases cannot be up-cycled: its sparse form has none")
    inner = dense.intermediate_size
    if inner % how.slices:
        raise ModelError(f"an MLP of {inner} neurons cannot be cut into {how.slices} equal slices")
    window = next((window for window in dense.windows if window is not None), None)
    if len(set(dense.windows)) > 1:
        raise ModelError(
            "a model with windows in some layers only cannot be up-cycled: its sparse form has them in all"
        )
    left_out = ("mlp_bias", "attention_bias", "pretraining_tp", "layer_types", "max_window_layers")
    return {
        **{key: value for key, value in config.items() if key not in left_out},
        **form,
        "num_key_value_heads": dense.num_kv_heads,
        "head_dim": dense.head_dim,
        "rms_norm_eps": dense.norm_eps,
        "max_position_embeddings": dense.max_position,
        "tie_word_embeddings": dense.tied_embeddings,
        # Written out, because the two architectures may differ in what they take where it is absent.
        **({} if _names_theta(config) else {"rope_theta": dense.rope.theta}),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "intermediate_size": inner // how.slices,
        "moe_intermediate_size": inner // how.slices,
        "num_local_experts": how.num_experts,
        "num_experts_per_tok": how.slices,
    }


def _names_theta(config: dict[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return "rope_theta" in config or "rope_theta" in rope


class _Tensors:
    """Of the source, in the asked dtype; `dtype` is then that of what was read."""

    def __init__(self, files: dict[str, Path], dtype: torch.dtype | None) -> None:
        self._files, self._wanted = files, dtype
        self.dtype = dtype

    def read(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(f"the checkpoint misses tensor {name}")
        with safe_open(self._files[name], framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        if not value.is_floating_point():
            raise ModelError(f"{name} holds {value.dtype}; only unquantized weights can be up-cycled")
        self.dtype = self._wanted or value.dtype
        return value.to(self.dtype)


def _layer(
    tensors: _Tensors,
    layer: int,
    spec: DecoderSpec,
    form: ExpertForm,
    how: Upcycling,
    random: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}."
    gate, up, down = (tensors.read(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    block = prefix + form.block
    router = _router_rows(how, spec.hidden_size, random).to(gate.dtype)
    yield f"{block}.{form.router}.weight", router.repeat_interleave(how.slices, 0)
    for group in range(how.groups):
        slices = torch.randperm(len(gate), generator=random).view(how.slices, -1)
        for index, neurons in enumerate(slices):
            expert = f"{block}.experts.{group * how.slices + index}"
            yield f"{expert}.{form.gate}.weight", gate[neurons]
            yield f"{expert}.{form.up}.weight", up[neurons]
            yield f"{expert}.{form.down}.weight", (down[:, neurons] * how.slices).contiguous()


def _router_rows(how: Upcycling, hidden: int, random: torch.Generator) -> Tensor:
    """One per group, float32 [groups, hidden]: orthogonal in batches of as many as there can be."""
    rows = torch.randn(how.groups, hidden, generator=random)
    directions = torch.cat([torch.linalg.qr(part.T)[0].T for part in torch.split(rows, hidden)])
    lengths = torch.exp(how.noise * torch.randn(how.groups, 1, generator=random))
    return directions * lengths


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, target / file.name)

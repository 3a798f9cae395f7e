"""How checkpoints name and store the tensors of experts. No torch here.

Files on the hub, and what transformers 5 writes, have three matrices for each expert. transformers' own modules hold
all experts of a layer in one tensor, and files written from those are read too. GPT-OSS has such tensors with the rows
of gate and up interleaved: as floats with the matrices transposed, or as MXFP4, which is how it is published.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from workers.models.spec import DecoderSpec, MoeSpec

Storage = Literal["each", "fused", "transposed", "mxfp4"]

MXFP4_GROUP = 32
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExpertForm:
    storage: Storage
    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"

    def sparse_shapes(self, spec: DecoderSpec, moe: MoeSpec) -> Shapes:
        """Of a sparse layer's MLP, by the end of the name after `model.layers.{i}.`."""
        hidden = spec.hidden_size
        router = f"{self.block}.{self.router}"
        shapes: Shapes = {f"{router}.weight": (moe.num_experts, hidden)}
        if moe.router_bias:
            shapes[f"{router}.bias"] = (moe.num_experts,)
        if moe.correction_bias:
            shapes[f"{router}.e_score_correction_bias"] = (moe.num_experts,)
        if moe.shared_intermediate_size:
            shapes |= mlp_shapes(f"{self.block}.{self.shared}", hidden, moe.shared_intermediate_size)
        if moe.shared_gate:
            shapes[f"{self.block}.{self.shared}_gate.weight"] = (1, hidden)
        return shapes | self._expert_shapes(hidden, moe)

    def _expert_shapes(self, hidden: int, moe: MoeSpec) -> Shapes:
        number, inner, prefix = moe.num_experts, moe.intermediate_size, f"{self.block}.experts"
        if self.storage == "each":
            names = (self.gate, self.up, self.down)
            return {
                name: shape
                for expert in range(number)
                for name, shape in mlp_shapes(f"{prefix}.{expert}", hidden, inner, names).items()
            }
        if self.storage == "fused":
            return {
                f"{prefix}.gate_up_proj": (number, 2 * inner, hidden),
                f"{prefix}.down_proj": (number, hidden, inner),
            }
        shapes: Shapes = {}
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            shapes[f"{prefix}.{name}_bias"] = (number, rows)
            if self.storage == "transposed":
                shapes[f"{prefix}.{name}"] = (number, columns, rows)
                continue
            groups = columns // MXFP4_GROUP
            shapes[f"{prefix}.{name}_blocks"] = (number, rows, groups, MXFP4_GROUP // 2)
            shapes[f"{prefix}.{name}_scales"] = (number, rows, groups)
        return shapes


def mlp_shapes(
    prefix: str,
    hidden: int,
    inner: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
) -> Shapes:
    gate, up, down = names
    shapes: Shapes = {}
    for name, rows, columns in ((gate, inner, hidden), (up, inner, hidden), (down, hidden, inner)):
        shapes[f"{prefix}.{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes


def expert_form(spec: DecoderSpec, tensors: Container[str] = ()) -> ExpertForm:
    """Of a checkpoint with `tensors`; the published one of the architecture where they leave it open."""
    sparse = [] if spec.moe is None else [layer for layer, found in enumerate(spec.moe.layers) if found]
    first = f"model.layers.{sparse[0]}.mlp.experts." if sparse else ""
    if spec.architecture == "gpt_oss":
        packed = f"{first}gate_up_proj_blocks" in tensors
        return ExpertForm("mxfp4" if packed else "transposed", router="router")
    shared = "shared_expert" if spec.architecture == "qwen2_moe" else "shared_experts"
    if f"{first}gate_up_proj" in tensors:
        return ExpertForm("fused", shared=shared)
    if spec.architecture == "mixtral":
        return ExpertForm("each", block="block_sparse_moe", gate="w1", up="w3", down="w2")
    return ExpertForm("each", shared=shared)

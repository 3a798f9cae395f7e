"""Whether the tensors of a checkpoint are those that a spec wants, by name, shape and dtype. From headers alone."""

from __future__ import annotations

from collections.abc import Iterable

from workers.models.checkpoint import TensorHeader
from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec
from workers.models.stored_form import StoredForm
from workers.models.tensor_shapes import EMBEDDING

_FLOAT_DTYPES = {"F16", "BF16", "F32", "F64"}
_MXFP4_DTYPES = {"U8"}
_MXFP4_ENDS = ("_proj_blocks", "_proj_scales")


def quantized_modules(
    headers: dict[str, TensorHeader], shapes: dict[str, tuple[int, ...]], form: StoredForm | None
) -> set[str]:
    """The layers that `form` stores. The embedding is looked up by rows and stays as it is in every format."""
    if form is None:
        return set()
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2} - {
        EMBEDDING
    }
    return {module for module in matrices if f"{module}.{form.marker}" in headers}


def check_tensors(
    headers: dict[str, TensorHeader],
    spec: DecoderSpec,
    shapes: dict[str, tuple[int, ...]],
    quantized: set[str],
    form: StoredForm | None,
) -> None:
    """Raises ModelError naming the tensors that are missing, unexpected, wrongly shaped or of another type."""
    floats = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in quantized}
    wanted = dict(floats)
    ignored = {name for name in headers if name.endswith("rotary_emb.inv_freq")}  # buffers of old checkpoints
    if form is not None:
        for module in sorted(quantized):
            n, k = shapes[module + ".weight"]
            wanted |= {f"{module}.{end}": shape for end, shape in form.shapes(n, k).items()}
            ignored |= {f"{module}.{end}" for end in form.optional}
    if spec.tied_embeddings:
        ignored.add("lm_head.weight")
    # Layers behind the last predict further tokens (DeepSeek-V3's MTP); they are not run.
    ignored |= {name for name in headers if _layer_of(name) >= spec.num_layers and spec.mla is not None}
    _refuse("misses", wanted.keys() - headers.keys(), spec)
    _refuse("has unexpected", headers.keys() - wanted.keys() - ignored, spec)
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if headers[name].shape != shape
    ]
    _refuse("has wrongly shaped", wrong, spec)
    dtypes = [
        f"{name} is {headers[name].dtype}"
        for name in floats
        if headers[name].dtype not in (_MXFP4_DTYPES if name.endswith(_MXFP4_ENDS) else _FLOAT_DTYPES)
    ]
    _refuse("has quantized", dtypes, spec)


def _layer_of(name: str) -> int:
    """-1: of none."""
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _refuse(what: str, names: Iterable[str], spec: DecoderSpec) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ModelError(f"the {spec.architecture} checkpoint {what} tensors: {'; '.join(listed[:8])}{more}")

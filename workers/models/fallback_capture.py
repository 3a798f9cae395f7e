"""Whether a model of transformers can be captured in a CUDA graph: looked for in what a pass asks of torch.

A pass that has the host wait for the device, sends it something from the host, or makes a shape of what lies there would
break the capture, or replay what held when it was captured. Seen on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from workers.models.fallback import FallbackModel
from workers.models.fallback_attention import Scores

_WAITS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "unique_consecutive",
    "unique_dim", "_unique", "_unique2",
}  # fmt: skip
_INDEXED = {
    "index",
    "index_put",
    "index_put_",
    "_unsafe_index",
    "_index_put_impl_",
}  # masks become lists there


def trial_pass(model: FallbackModel) -> Callable[[], None]:
    """A pass of a few tokens of two sequences, over tensors that stay. Attention is left out."""
    tokens = torch.arange(4, device=model.device)
    positions = torch.tensor([0, 1, 2, 9], device=model.device)
    nothing, rows = _Nothing(model), tokens[2:]

    def run() -> None:
        model.run(nothing, tokens, positions, rows)

    return run


@torch.no_grad()  # in inference mode composite operations would not be taken apart
def first_wait(model: FallbackModel) -> str | None:
    """The first operation of a pass that could not be captured; None: it can be."""
    run = trial_pass(model)
    try:
        with _Watched():  # type: ignore[no-untyped-call]
            run()
    except _Waits as found:
        return str(found)
    return None


class _Waits(Exception):
    pass


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _WAITS or counted:
            raise _Waits(str(func))
        if name in _INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1]):
            raise _Waits(f"{func} by a mask")
        found = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and found.device != args[name == "copy_"].device:
            raise _Waits(f"{func} between {args[name == 'copy_'].device} and {found.device}")
        return found


class _Nothing:
    """What is attended to."""

    def __init__(self, model: FallbackModel) -> None:
        self._layers = model.layers

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scores: Scores
    ) -> Tensor:
        return q.new_zeros(*q.shape[:2], self._layers[module].value_dim)

"""transformers' attention interface, served by our paged attention.

A model whose attention implementation is `NAME` calls `_attend` in every layer, with the heads of one flattened batch.
What attends in this pass lies in the model's `Slot`, for not every family (StableLM) hands a keyword argument of the model's
caller down to its attention.

The window of a layer is what its mask hides, for that is what transformers' own eager attention heeds: `Trial` looks at the
masks once, at the start, and refuses those that are neither causal nor a causal window. Only `TRIAL_NAME` has masks:
transformers makes none for an implementation that has no function for them, nor does it then ask the device whether
sequences are packed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.errors import ModelError
from workers.models.ops import Attention

NAME = "headrace_paged"
TRIAL_NAME = "headrace_trial"
_SLOT = "headrace_slot"  # attribute of the model's modules

# Further arguments with which models change the scores or the mask in ways of their own.
_CHANGES_SCORES = ("position_bias", "alibi", "attention_bias", "relative_position", "head_mask")


@dataclass(frozen=True)
class Mask:
    """What stands in for a mask on its way through the model: how it would have been made."""

    hides: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> may be seen
    size: int | None  # of what is near, where it says so
    own: bool  # the model has added to it


@dataclass(frozen=True)
class Scores:
    """How a layer makes its scores, from what it hands to the attention function."""

    scale: float
    softcap: float | None
    sinks: Tensor | None  # [num_heads]


class Paged(Protocol):
    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scores: Scores
    ) -> Tensor:
        """q [T, num_heads, D], k [T, num_kv_heads, D], v [T, num_kv_heads, V] -> [T, num_heads, V]."""


class Slot:
    """Of one model: what attends in the pass that runs. `install` makes it."""

    def __init__(self) -> None:
        self._paged: Paged | None = None

    @contextlib.contextmanager
    def holding(self, paged: Paged | None) -> Iterator[None]:
        self._paged = paged
        try:
            yield
        finally:
            self._paged = None

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scores: Scores
    ) -> Tensor:
        assert self._paged is not None, f"{type(module).__name__} attends outside of a step"
        return self._paged.attend(module, q, k, v, mask, scores)


@dataclass(frozen=True)
class Layer:
    index: int  # in the KV cache
    window: int | None  # tokens
    num_kv_heads: int
    key_dim: int
    value_dim: int


def register() -> None:
    """Make both names known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(TRIAL_NAME, _attend)
    AttentionMaskInterface.register(TRIAL_NAME, _mask)


def install(model: nn.Module) -> Slot:
    """A slot that all modules of the model know."""
    slot = Slot()
    for module in model.modules():
        setattr(module, _SLOT, slot)
    return slot


def _mask(*, mask_function: Any, use_vmap: bool = False, local_size: int | None = None, **_: Any) -> Mask:
    return Mask(mask_function, local_size, use_vmap)


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' signature -> [1, T, num_heads, V]."""
    if changed := [name for name in _CHANGES_SCORES if others.get(name) is not None]:
        raise ModelError(f"{type(module).__name__} changes scores by {', '.join(changed)}")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    slot: Slot = getattr(module, _SLOT)
    return slot.attend(module, q, k, v, attention_mask, Scores(scale, softcap, s_aux))[None], None


class Trial:
    """Attends to nothing and writes down what the layers are. Its output is zeros."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, Layer] = {}

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scores: Scores
    ) -> Tensor:
        if module in self.layers:
            raise ModelError(f"one {type(module).__name__} attends for several layers")
        heads = k.shape[1]
        if v.shape[:2] != k.shape[:2] or len(k) != len(q):
            raise ModelError(f"{type(module).__name__} attends to tokens other than those of its queries")
        if q.shape[1] % heads:
            raise ModelError(f"{q.shape[1]} query heads cannot share {heads} KV heads evenly")
        self.layers[module] = Layer(len(self.layers), _window(mask), heads, k.shape[2], v.shape[2])
        return q.new_zeros(*q.shape[:2], v.shape[2])


def _window(mask: object) -> int | None:
    """Raises ModelError for a mask that is no causal one, with or without a window."""
    if not isinstance(mask, Mask):
        made = "no mask" if mask is None else f"a mask of its own ({type(mask).__name__})"
        raise ModelError(f"it gives {made} to attention, where only causal masks and windows are computed")
    if mask.own:
        raise ModelError("it adds a condition of its own to the causal mask")
    last = 2 * (mask.size or 32) + 3
    near = mask.size or 1
    queries = torch.tensor([0, 1, near - 1, near, near + 1, last - near, last])[:, None]
    keys = torch.arange(last + 1)[None]
    zero = torch.zeros((), dtype=torch.int64)
    seen = mask.hides(zero, zero, queries, keys)
    expected = keys <= queries
    if mask.size is not None:
        expected = expected & (keys > queries - mask.size)
    if not torch.equal(torch.as_tensor(seen).expand(expected.shape), expected):
        raise ModelError("its masks are neither causal nor a causal window")
    return mask.size


class Step:
    """Attention of one step over the KV cache."""

    def __init__(
        self, layers: Mapping[nn.Module, Layer], attention: Attention, head_dim: int, dtype: torch.dtype
    ) -> None:
        """`head_dim`: of the cache; `dtype`: of what goes there, in floats."""
        self._layers, self._attention = layers, attention
        self._head_dim, self._dtype = head_dim, dtype

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scores: Scores
    ) -> Tensor:
        layer = self._layers[module]
        self._attention.write(self._rows(k), self._rows(v), layer.index)
        sinks = None if scores.sinks is None else scores.sinks.to(self._dtype)
        seen = self._attention.attend(
            self._rows(q).contiguous(), layer.index, scores.scale, layer.window, sinks, scores.softcap
        )
        return seen[..., : layer.value_dim].to(q.dtype)

    def _rows(self, heads: Tensor) -> Tensor:
        """As the cache has them: in its dtype, narrow heads filled up with zeros, which add nothing to a product."""
        missing = self._head_dim - heads.shape[-1]
        return (functional.pad(heads, (0, missing)) if missing else heads).to(self._dtype)

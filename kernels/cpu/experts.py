"""The physical experts of a decoder: which slot holds what, and how often it was asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.packed import PackedExpert, PackedMoe, address
from kernels.cpu.structures import Expert, Gate, GateKind, GroupScore, Moe, Scoring
from kernels.cpu.structures import Routing as RoutingStruct

if TYPE_CHECKING:
    from kernels.reference_moe import Routing


class ExpertTable:
    """All layers with experts, numbered from 0 (which other layers the model has does not count).

    Changes are made between two steps only, by the thread that makes the steps. The counts grow during steps and may be
    read at any time by anybody:

        routed int64 [layers, experts]    choices of this rank's own tokens, by logical expert
        computed int64 [layers, slots]    rows that a slot of this rank has computed, whoever's tokens
    """

    def __init__(self, layers: Sequence[PackedMoe], slots: int | None = None) -> None:
        """`slots`: of each layer, empty at first. None: every layer has all of its experts, each in its own slot.

        Raises ValueError: layers whose experts are not alike.
        """
        self._layers = layers
        self._alike()
        experts = len(layers[0].experts) if layers else 0
        self.slots = experts if slots is None else slots
        self.routed = np.zeros((len(layers), experts), np.int64)
        self.computed = np.zeros((len(layers), self.slots), np.int64)
        self.slot_of = np.full((len(layers), experts), -1, np.int32)  # where steps without an exchange look
        self._experts: list[list[PackedExpert | None]] = [[None] * self.slots for _ in layers]  # kept alive
        self._tables = [(Expert * self.slots)() for _ in layers]
        self._shared = [None if moe.shared is None else moe.shared.struct() for moe in layers]
        self.structs = [self._struct(index) for index in range(len(layers))]
        if slots is None:
            for index, moe in enumerate(layers):
                for expert, packed in enumerate(moe.experts):
                    self.set_expert(index, expert, packed)
                self.slot_of[index] = np.arange(experts)

    def __len__(self) -> int:
        """Layers."""
        return len(self._layers)

    def expert(self, layer: int, slot: int) -> PackedExpert | None:
        """What is there."""
        return self._experts[layer][slot]

    def logical(self, layer: int, expert: int) -> PackedExpert:
        """A logical expert as the model's packed file has it. Reading it is what costs memory."""
        return self._layers[layer].experts[expert]

    def set_expert(self, layer: int, slot: int, expert: PackedExpert | None) -> None:
        """Put an expert in a slot, or empty it. Its arrays are held until the slot is given to another.

        Raises ValueError where the expert's form is not that of the layer's own, IndexError for an unknown place.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of layer {layer}: there are slots 0 to {self.slots - 1}")
        if expert is not None and not expert.same_form(self._layers[layer].experts[0]):
            raise ValueError(f"slot {slot} of layer {layer}: an expert of another form than the model's")
        self._experts[layer][slot] = expert
        self._tables[layer][slot] = Expert() if expert is None else expert.struct()

    def set_places(self, layer: int, slots: NDArray[np.int32]) -> None:
        """Where each logical expert [experts] is for steps that are made without an exchange; -1: nowhere."""
        self.slot_of[layer] = slots

    def _alike(self) -> None:
        for index, moe in enumerate(self._layers):
            first = self._layers[0]
            alike = len(moe.experts) == len(first.experts) and _same_form(moe.shared, first.shared)
            if not alike or not all(expert.same_form(first.experts[0]) for expert in moe.experts):
                raise ValueError(f"layer {index}: experts of another number or form than those of layer 0")
            if moe.shared is not None and moe.shared.gate_up.format != first.experts[0].gate_up.format:
                raise ValueError(f"layer {index}: a shared expert of another format than the routed ones")

    def _struct(self, index: int) -> Moe:
        moe = self._layers[index]
        like = moe.experts[0].struct()
        for matrix in (like.gate_up, like.down):
            matrix.data = matrix.scale = matrix.bias = None
        shared = self._shared[index]
        return Moe(
            routing=routing_struct(moe.routing, len(moe.experts)),
            gate=_gate(moe.clamped),
            num_slots=self.slots,
            shared_gated=moe.shared_gated,
            index=index,
            router=moe.router.struct(),
            correction_bias=address(moe.correction_bias),
            like=like,
            slots=self._tables[index],
            slot_of=address(self.slot_of[index]),
            shared=None if shared is None else ctypes.pointer(shared),
            expert_counts=address(self.routed[index]),
            slot_counts=address(self.computed[index]),
        )


def routing_struct(routing: Routing, num_experts: int) -> RoutingStruct:
    """Raises ValueError where so many experts cannot be routed so."""
    routing.validate(num_experts)
    scoring = Scoring.SOFTMAX if routing.scoring == "softmax" else Scoring.SIGMOID
    return RoutingStruct(
        num_experts=num_experts,
        top_k=routing.top_k,
        scoring=Scoring.SOFTMAX_AFTER_TOP_K if routing.softmax_after_topk else scoring,
        group_score=GroupScore.MAX if routing.group_score == "max" else GroupScore.TOP2_SUM,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        normalize=routing.normalize,
        scale=routing.scale,
    )


def _same_form(a: PackedExpert | None, b: PackedExpert | None) -> bool:
    return a is b if a is None or b is None else a.same_form(b)


def _gate(clamped: tuple[float, float] | None) -> Gate:
    if clamped is None:
        return Gate(kind=GateKind.SILU)
    alpha, limit = clamped
    return Gate(kind=GateKind.CLAMPED_SWIGLU, alpha=alpha, limit=limit)

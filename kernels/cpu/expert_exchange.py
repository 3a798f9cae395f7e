"""How a native step asks for the experts of other ranks: four calls at each layer with experts.

`Exchange` in kernels/cpu/src/moe.h is the C form; a caller in C can be given to hr_step without passing here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.structures import EXCHANGE_CALL, Exchange, ExchangeHook, Phase, StepResult, StepStatus

Addresses = NDArray[np.uint64]  # of rows: they may lie anywhere, in other processes' shared memory too


class MissingExpert(RuntimeError):
    """A token was to go to an expert that is in no slot here."""


@dataclass(frozen=True, slots=True)
class Routed:
    """This rank's T tokens at one layer: views of the step's memory, which hold until `collect` returns."""

    layer: int  # among those that have experts
    rows: NDArray[
        Any
    ]  # [T, hidden] after the norm: float32, or uint16 (bfloat16 bits) where the experts are bfloat16
    experts: NDArray[np.int32]  # [T, k] logical
    weights: NDArray[np.float32]  # [T, k]


@dataclass(frozen=True, slots=True)
class Received:
    """A rows for this rank's experts, own tokens among them; the memory must hold until `give_back` returns."""

    rows: Addresses  # [A] of rows [hidden] in the form of `Routed.rows`; one may be there several times
    slots: NDArray[np.int32]  # [A]
    outputs: Addresses  # [A] of rows float32 [hidden] to be written


class ExpertExchange(Protocol):
    """The calls of one layer, in this order, by the thread that called `CpuDecoder.step`. Any of them may raise."""

    def send(self, routed: Routed) -> None:
        """Send tokens on their way. The shared expert, where there is one, is computed before `receive`."""

    def receive(self) -> Received: ...

    def give_back(self) -> None:
        """The outputs are written."""

    def collect(self) -> Addresses:
        """[T * k] of rows float32 [hidden]: what each token's experts answered, in the order of `Routed.experts`.

        Must hold until the next layer's `send`, or the end of the step.
        """


def row_addresses(rows: NDArray[Any]) -> Addresses:
    """[n] of the rows of an array [n, ...]."""
    return np.uint64(rows.ctypes.data) + np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0])


class Hook:
    """An exchange as a step calls it. It must outlive the step."""

    def __init__(self, exchange: ExpertExchange | None) -> None:
        self.error: BaseException | None = None
        self._exchange = exchange
        self._held: Any = ()  # what the step reads
        self._call = None if exchange is None else EXCHANGE_CALL(self._called)
        call = None if self._call is None else ctypes.cast(self._call, ctypes.c_void_p)
        self.struct = ExchangeHook(call=call)

    def _called(self, _context: int, phase: int, pointer: Any) -> int:
        # An exception cannot pass through the step: it is kept, and raised when the step has ended.
        try:
            self._phase(Phase(phase), pointer.contents)
        except BaseException as error:  # noqa: BLE001
            self.error = error
            return 1
        return 0

    def _phase(self, phase: Phase, step: Exchange) -> None:
        assert self._exchange is not None
        if phase == Phase.SEND:
            self._exchange.send(_routed(step))
        elif phase == Phase.RECEIVE:
            received = self._exchange.receive()
            self._held = rows, slots, outputs = (
                np.ascontiguousarray(received.rows, np.uint64),
                np.ascontiguousarray(received.slots, np.int32),
                np.ascontiguousarray(received.outputs, np.uint64),
            )
            assert len(rows) == len(slots) == len(outputs), (
                f"{len(rows)} rows, {len(slots)} slots, {len(outputs)} outputs"
            )
            step.num_received = len(rows)
            step.received, step.slots, step.outputs = (array.ctypes.data for array in self._held)
        elif phase == Phase.RETURN:
            self._exchange.give_back()
        else:
            self._held = returned = np.ascontiguousarray(self._exchange.collect(), np.uint64)
            assert len(returned) == step.num_rows * step.top_k, (
                f"{len(returned)} results for {step.num_rows} tokens"
            )
            step.returned = returned.ctypes.data


def check(result: StepResult, hook: Hook) -> None:
    """Raises what ended a step early."""
    if result.status == StepStatus.DONE:
        return
    if result.status == StepStatus.EXCHANGE_FAILED:
        assert hook.error is not None
        raise hook.error
    expert = result.expert
    what = f"logical expert {-1 - expert} is in no slot" if expert < 0 else f"slot {expert} has no expert"
    raise MissingExpert(f"layer {result.layer}: {what}")


def _routed(step: Exchange) -> Routed:
    tokens, k = step.num_rows, step.top_k
    kind: type[Any] = ctypes.c_uint16 if step.rows_bf16 else ctypes.c_float
    rows = _view(kind, step.rows, (tokens, step.row_stride))
    return Routed(
        layer=step.layer,
        rows=rows[:, : step.hidden],
        experts=_view(ctypes.c_int32, step.experts, (tokens, k)),
        weights=_view(ctypes.c_float, step.weights, (tokens, k)),
    )


def _view(kind: type[Any], at: int, shape: tuple[int, int]) -> NDArray[Any]:
    values = (kind * (shape[0] * shape[1])).from_address(at)
    return (
        np.frombuffer(values, np.dtype(kind)).reshape(shape) if shape[0] else np.empty(shape, np.dtype(kind))
    )

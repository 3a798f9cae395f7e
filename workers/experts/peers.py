"""Weights from another rank that holds them, for hosts that would have to read them from a slow disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.experts.holdings import Source
from workers.experts.link import Link, call
from workers.experts.messages import Fetch, Weights
from workers.experts.parallel import Compute
from workers.protocol.frames import ProtocolError, recv_exactly

logger = logging.getLogger(__name__)


class Portable(Source, Protocol):
    """A source whose weights can be sent."""

    def arrays(self, weights: Any) -> Sequence[NDArray[np.uint8]]:
        """The bytes of an expert, part after part."""

    def from_bytes(self, data: NDArray[np.uint8]) -> Any:
        """What `arrays` gave, one after the other [num_bytes]."""


def send_weights(link: Link, source: Portable, weights: Any | None) -> None:
    """The answer to a Fetch. Raises OSError."""
    parts = [] if weights is None else source.arrays(weights)
    link.send(Weights(sum(part.nbytes for part in parts)))
    for part in parts:
        link.sock.sendall(part.data)


class PeerSource:
    """Asks the ranks that hold an expert; reads it from the checkpoint where none of them answers."""

    def __init__(self, own: Portable, secret: bytes, peer_id: str, timeout_s: float) -> None:
        self._own, self._secret, self._peer_id, self._timeout_s = own, secret, peer_id, timeout_s
        self.holders: Callable[[int, int], list[str]] = lambda layer, expert: []  # addresses
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()  # one expert at a time

    def load(self, layer: int, expert: int) -> Any:
        with self._lock:
            for address in self.holders(layer, expert):
                try:
                    weights = self._fetch(address, layer, expert)
                except (OSError, ProtocolError) as error:
                    logger.info(
                        "expert %d of layer %d does not come from %s: %s", expert, layer, address, error
                    )
                    self._links.pop(address).close() if address in self._links else None
                    continue
                if weights is not None:
                    return weights
        return self._own.load(layer, expert)

    def num_bytes(self) -> int:
        return self._own.num_bytes()

    def install(self, layer: int, weights: Sequence[Any]) -> Compute:
        return self._own.install(layer, weights)

    def _fetch(self, address: str, layer: int, expert: int) -> Any | None:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = call(address, self._secret, self._peer_id, self._timeout_s)
        link.send(Fetch(layer, expert))
        answer = link.receive()
        if not isinstance(answer, Weights):
            raise ProtocolError(f"{type(answer).__name__} where weights were due")
        if answer.num_bytes == 0:
            return None
        if answer.num_bytes != self._own.num_bytes():
            raise ProtocolError(f"an expert of {answer.num_bytes} bytes, ours have {self._own.num_bytes()}")
        data = np.empty(answer.num_bytes, np.uint8)
        recv_exactly(link.sock, data.data)
        return self._own.from_bytes(data)

"""What the ranks of a replica say to each other, besides what torch.distributed carries: frames of workers/protocol after
its handshake, over a unix socket on which rank 0 listens.
"""

from __future__ import annotations

from msgspec import Struct

from workers.protocol.frames import Codec
from workers.protocol.messages import Challenge, Hello, Refused, Welcome

# --- from rank 0 -----------------------------------------------------------------------------------------------------


class Meet(Struct, frozen=True, tag="meet"):
    """All ranks are here; they find each other in torch's store."""

    at: str  # "host port"


class Begin(Struct, frozen=True, tag="begin"):
    """Make a KV cache of so many blocks: then steps come."""

    num_blocks: int


class Step(Struct, frozen=True, tag="step"):
    """The fields of `kernels.cpu.decoder.StepArrays`, as little-endian bytes, and what of StepInput they don't say."""

    token_ids: bytes
    positions: bytes
    slots: bytes
    query_start: bytes
    lengths: bytes
    blocks: bytes
    block_start: bytes
    rows: bytes
    carried: list[tuple[int, int]] = []


class Stop(Struct, frozen=True, tag="stop"):
    """In order: nothing is amiss."""


# --- from the others -------------------------------------------------------------------------------------------------


class Fits(Struct, frozen=True, tag="fits"):
    """This rank's part of the model is loaded, and so many KV blocks have room beside it."""

    num_blocks: int


class Ready(Struct, frozen=True, tag="ready"):
    """This rank's KV cache, which rank 0 reads and writes too: on a CPU a descriptor of its memory comes beside it."""

    num_bytes: int
    handle: bytes = b""  # on a GPU: by which other processes of the host open it


class Beat(Struct, frozen=True, tag="beat"):
    """A sign of life."""


class Broken(Struct, frozen=True, tag="broken"):
    """This rank can't go on."""

    reason: str


from_leader: Codec[Challenge | Welcome | Refused | Meet | Begin | Step | Stop] = Codec(
    Challenge | Welcome | Refused | Meet | Begin | Step | Stop
)
from_follower: Codec[Hello | Fits | Ready | Beat | Broken] = Codec(Hello | Fits | Ready | Beat | Broken)

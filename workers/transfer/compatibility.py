"""Whether the blocks of two workers mean the same. Asked before the first byte."""

from __future__ import annotations

from workers.protocol.messages import KvLayout

_WHAT = {
    "model_fingerprint": "model",
    "dtype": "KV cache dtype",
    "block_size": "block size",
    "num_layers": "number of layers",
    "num_kv_heads": "number of KV heads",
    "head_dim": "head size",
    "planes": "number of planes in a layer",
}


def mismatch(ours: KvLayout, theirs: KvLayout, peer: str) -> str | None:
    """Why blocks can't be exchanged, every difference with both values; None when they can."""
    found = [
        f"{what} is {getattr(ours, name)} here and {getattr(theirs, name)} on {peer}"
        for name, what in _WHAT.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    return f"the KV blocks of the two workers differ: {'; '.join(found)}" if found else None

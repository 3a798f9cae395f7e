"""A decoder's matrices cut among tensor-parallel ranks: which heads, neurons and rows a rank has. No torch here."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec
from workers.parallel.shard import Shard
from workers.protocol.messages import KvLayout
from workers.transfer.shards import heads_of


class Cuts:
    """Of the whole model's matrices. A range is None where nothing is cut: then all of it is read."""

    def __init__(self, spec: DecoderSpec, shard: Shard) -> None:
        """Raises ModelError when the model can't be shared out among so many."""
        check_shardable(spec, shard.size)
        self._spec, self._shard = spec, shard

    @property
    def adds_bias(self) -> bool:
        """Of a projection whose outputs the ranks sum: one of them adds it."""
        return self._shard.first

    def query_rows(self, dim: int) -> range | None:
        """Of query heads, `dim` rows (or columns) each."""
        return self._rows(self._shard.equal_part(self._spec.num_heads), dim)

    def kv_rows(self, dim: int) -> range | None:
        """Of KV heads. With more ranks than heads, several ranks have the same one."""
        return self._rows(heads_of(self._shard.rank, self._shard.size, self._spec.num_kv_heads), dim)

    def neurons(self, count: int) -> range | None:
        """Of an MLP of `count` neurons."""
        return self._rows(self._shard.equal_part(count), 1)

    def vocabulary(self) -> range | None:
        return None if self._shard.whole else self._shard.rows_of(self._spec.vocab_size)

    def _rows(self, part: range, dim: int) -> range | None:
        return None if self._shard.whole else range(part.start * dim, part.stop * dim)


def sharded(spec: DecoderSpec, shard: Shard) -> DecoderSpec:
    """What a rank computes: its heads and neurons. The vocabulary stays the model's. Raises ModelError."""
    check_shardable(spec, shard.size)
    if shard.whole:
        return spec
    moe = spec.moe
    if moe is not None:
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // shard.size,
            shared_intermediate_size=moe.shared_intermediate_size // shard.size,
        )
    return replace(
        spec,
        num_heads=spec.num_heads // shard.size,
        num_kv_heads=len(heads_of(shard.rank, shard.size, spec.num_kv_heads)),
        intermediate_size=spec.intermediate_size // shard.size,
        moe=moe,
    )


def rank_layout(layout: KvLayout, shard: Shard) -> KvLayout:
    """Of the KV heads that one rank holds; its `block_bytes` is what a block takes there."""
    heads = heads_of(shard.rank, shard.size, layout.num_kv_heads)
    return msgspec.structs.replace(layout, num_kv_heads=len(heads))


def check_shardable(spec: DecoderSpec, ranks: int) -> None:
    """Raises ModelError that says what of the model can't be shared out evenly among `ranks`."""
    if ranks == 1:
        return
    moe = spec.moe
    counts = {"query heads": spec.num_heads}
    if moe is None or not all(moe.layers):
        counts["neurons of an MLP (intermediate_size)"] = spec.intermediate_size
    if moe is not None:
        counts["neurons of an expert (moe_intermediate_size)"] = moe.intermediate_size
        counts["neurons of the shared experts"] = moe.shared_intermediate_size
    for what, count in counts.items():
        if count % ranks:
            raise ModelError(
                f"{spec.architecture} with {count} {what} cannot be shared out evenly among {ranks} tensor-parallel "
                f"ranks; tensor_parallel must divide {count}"
            )
    if spec.vocab_size <= (ranks - 1) * -(-spec.vocab_size // ranks):
        raise ModelError(
            f"{spec.architecture}: {ranks} ranks have no rows of a vocabulary of {spec.vocab_size}"
        )
    if spec.num_kv_heads % ranks and ranks % spec.num_kv_heads:
        raise ModelError(
            f"{spec.architecture} with {spec.num_kv_heads} KV heads cannot be shared out evenly among {ranks} "
            "tensor-parallel ranks; one of the two numbers must divide the other"
        )
    if spec.qk_norm_whole:
        raise ModelError(
            f"{spec.architecture} norms the queries of all heads together, which tensor-parallel ranks cannot; "
            "set tensor_parallel to 1"
        )

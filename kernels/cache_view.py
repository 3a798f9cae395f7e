"""Where the bytes of KV blocks lie: what a copy between two caches of different layouts has to know of each."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CacheView:
    """Row (block, layer, kv, head, token), kv 0 for keys and 1 for values, begins at `address` plus each index times
    its stride, and has `row_bytes` bytes. Strides are in bytes, of any sign.

    Rows are opaque. In an int8 cache the scales stand behind all the values of a tile (the tokens of one layer, k|v and
    head): it is described with num_tokens 1 and row_bytes the bytes of a tile.

    The view holds no reference to the memory.
    """

    address: int
    num_blocks: int
    num_layers: int
    num_heads: int
    num_tokens: int
    row_bytes: int
    block_stride: int
    layer_stride: int
    kv_stride: int
    head_stride: int
    token_stride: int

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_layers, self.num_heads, self.num_tokens, self.row_bytes) < 1:
            raise ValueError(f"a cache view has at least one of everything: {self}")

    @classmethod
    def canonical(
        cls, address: int, num_blocks: int, num_layers: int, num_heads: int, num_tokens: int, row_bytes: int
    ) -> CacheView:
        """C order, as on the wire: [block, layer, k|v, head, token, row]."""
        head = num_tokens * row_bytes
        kv = num_heads * head
        return cls(
            address,
            num_blocks,
            num_layers,
            num_heads,
            num_tokens,
            row_bytes,
            block_stride=num_layers * 2 * kv,
            layer_stride=2 * kv,
            kv_stride=kv,
            head_stride=head,
            token_stride=row_bytes,
        )

    def cut(self, *, layers: range | None = None, heads: range | None = None) -> CacheView:
        """The same blocks with fewer layers or heads. Raises ValueError for what is no contiguous part of the view."""
        layers = _part(layers, self.num_layers, "layers")
        heads = _part(heads, self.num_heads, "heads")
        return replace(
            self,
            address=self.address + layers.start * self.layer_stride + heads.start * self.head_stride,
            num_layers=len(layers),
            num_heads=len(heads),
        )

    @property
    def block_bytes(self) -> int:
        """Of one block's rows, without what may lie between them."""
        return self.num_layers * 2 * self.num_heads * self.num_tokens * self.row_bytes

    @property
    def is_canonical(self) -> bool:
        """Every block is one run of bytes in canonical order; there may be gaps between blocks."""
        run = self.row_bytes
        for count, stride in (
            (self.num_tokens, self.token_stride),
            (self.num_heads, self.head_stride),
            (2, self.kv_stride),
            (self.num_layers, self.layer_stride),
        ):
            if count > 1 and stride != run:
                return False
            run *= count
        return self.num_blocks == 1 or abs(self.block_stride) >= run


def _part(part: range | None, whole: int, name: str) -> range:
    if part is None:
        return range(whole)
    if part.step != 1 or not 0 <= part.start < part.stop <= whole:
        raise ValueError(
            f"{name} {part} of a cache that has {whole}; wanted is a range of some of them, step 1"
        )
    return part

"""What has arrived of one transfer. Pure.

A transfer is a table of cells: for each part (a rank of the sender and a rank of the receiver), block and layer. Each
cell comes exactly once, in any order: parts and pieces travel on several connections.
"""

from __future__ import annotations

from workers.transfer.shards import Part, parts


class Arrivals:
    def __init__(
        self, first_block: int, num_blocks: int, num_layers: int, num_kv_heads: int, ranks: int
    ) -> None:
        """Blocks [first_block, num_blocks) are wanted, by `ranks` ranks."""
        self._first, self._end = first_block, num_blocks
        self._num_layers, self._num_kv_heads, self._ranks = num_layers, num_kv_heads, ranks
        self._source_ranks = 0  # not known before the first piece
        self._claimed: dict[Part, bytearray] = {}
        self._missing = 0  # cells that have not arrived

    def claim(self, source_ranks: int, part: Part, blocks: range, layers: range) -> None:
        """These cells are about to be written. Raises ValueError when they are not wanted, or were claimed before."""
        if not self._source_ranks:
            self._source_ranks = source_ranks
            each = (self._end - self._first) * self._num_layers
            expected = parts(source_ranks, self._ranks, self._num_kv_heads)
            self._claimed = {one: bytearray(each) for one in expected}
            self._missing = each * len(expected)
        if source_ranks != self._source_ranks:
            raise ValueError(f"pieces of {source_ranks} and of {self._source_ranks} ranks for one ticket")
        cells = self._claimed.get(part)
        if cells is None:
            raise ValueError(f"rank {part.destination} wants nothing of rank {part.source}")
        if not blocks or blocks.start < self._first or blocks.stop > self._end:
            raise ValueError(
                f"blocks {blocks.start}..{blocks.stop} were announced, {self._first}..{self._end} are wanted"
            )
        if not layers or layers.start < 0 or layers.stop > self._num_layers:
            raise ValueError(
                f"layers {layers.start}..{layers.stop} were announced of {self._num_layers} there are"
            )
        width = len(layers)
        first = (blocks.start - self._first) * self._num_layers
        if width == self._num_layers:
            runs = [(first, len(blocks) * width)]
        else:
            runs = [(first + i * self._num_layers + layers.start, width) for i in range(len(blocks))]
        if any(cells.find(1, start, start + length) >= 0 for start, length in runs):
            raise ValueError(f"blocks {blocks.start}..{blocks.stop} were announced twice")
        for start, length in runs:
            cells[start : start + length] = b"\1" * length

    def arrived(self, blocks: range, layers: range) -> None:
        """What was claimed has been written."""
        self._missing -= len(blocks) * len(layers)

    def complete(self, num_blocks: int | None = None) -> bool:
        """Whether the first `num_blocks` that are wanted (None: all) have arrived, and nothing else."""
        wanted = self._end - self._first
        if num_blocks is None:
            num_blocks = wanted
        if not self._source_ranks:
            return num_blocks == 0
        if self._missing != (wanted - num_blocks) * self._num_layers * len(self._claimed):
            return False
        first_unwanted = num_blocks * self._num_layers
        return all(cells.find(1, first_unwanted) < 0 for cells in self._claimed.values())

    @property
    def progress(self) -> str:
        """For people: how far it has come."""
        if not self._source_ranks:
            return f"0 of {self._end - self._first} blocks"
        cells = self._num_layers * len(self._claimed)
        done = cells * (self._end - self._first) - self._missing
        return f"{done / cells:g} of {self._end - self._first} blocks"

"""What one step needs, handed to the runner whole."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.sampler import SampleInput
from workers.engine.scheduler import Plan


@dataclass(frozen=True, slots=True)
class StepInput:
    """S sequences with T tokens in all. Plain Python: the runner makes tensors of it on its own device."""

    token_ids: list[int]  # [T]
    positions: list[int]  # [T]
    slots: list[int]  # [T] block_id * block_size + offset, where K and V of the token are written
    query_start: list[int]  # [S + 1]
    seq_lens: list[int]  # [S] tokens of context, those of this step included
    block_tables: list[list[int]]  # [S] blocks that hold the context
    sample_rows: list[int]  # rows of [T] whose logits are wanted
    samples: list[SampleInput]  # beside sample_rows

    @staticmethod
    def of(plan: Plan, block_size: int) -> StepInput:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        seq_lens: list[int] = []
        block_tables: list[list[int]] = []
        sample_rows: list[int] = []
        samples: list[SampleInput] = []
        for item in plan.items:
            request = item.request
            end = item.start + item.count
            token_ids += request.token_ids[item.start : end]
            positions += range(item.start, end)
            table = request.block_table
            slots += [table[p // block_size] * block_size + p % block_size for p in range(item.start, end)]
            query_start.append(len(token_ids))
            seq_lens.append(end)
            block_tables.append(table[: -(-end // block_size)])
            if item.samples:
                sample_rows.append(len(token_ids) - 1)
                samples.append(SampleInput(request, request.num_output_tokens))
        return StepInput(
            token_ids, positions, slots, query_start, seq_lens, block_tables, sample_rows, samples
        )

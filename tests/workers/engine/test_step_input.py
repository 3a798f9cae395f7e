"""A step's arrays, held against each token's place worked out one by one."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.plan import Plan, Scheduled
from workers.engine.request import Request
from workers.engine.sampler import SampleInput
from workers.engine.step_input import StepBuilder, StepInput
from workers.protocol.messages import Sampling, Work

BLOCK = 4


@st.composite
def scheduled(draw: st.DrawFn) -> Scheduled:
    prompt = draw(st.lists(st.integers(0, 90), min_size=1, max_size=20))
    output = draw(st.lists(st.integers(0, 90), max_size=6))
    request = Request(Work("r", prompt, Sampling(max_tokens=50, seed=0), output=output))
    known = request.num_tokens
    if draw(st.booleans()) and output:
        item = Scheduled(request, known, 1, samples=True, carried=True)
    else:
        start = draw(st.integers(0, known - 1))
        count = draw(st.integers(1, known - start))
        samples = start + count == known
        draft = draw(st.lists(st.integers(0, 90), max_size=3)) if samples else []
        item = Scheduled(request, start, count, samples, draft=tuple(draft))
    num_blocks = -(-(item.start + item.num_tokens) // BLOCK) + draw(st.integers(0, 2))
    request.block_table = array("i", draw(st.permutations(range(60)))[:num_blocks])
    return item


@settings(max_examples=60, deadline=None)
@given(st.lists(scheduled(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_token_has_its_place(items: list[Scheduled], shuffle: object) -> None:
    order = [item.request for item in items]
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    before = StepInput(StepBuilder(BLOCK).arrays(), [SampleInput(request, 0) for request in order])
    step = StepInput.of(Plan(tuple(items)), BLOCK, before)
    arrays = step.arrays
    tokens, positions, slots, rows, samples, carried = [], [], [], [], [], []
    for number, item in enumerate(items):
        request = item.request
        assert arrays.query_start[number] == len(tokens)
        first = arrays.block_start[number]
        table = arrays.blocks[first : first + len(request.block_table)].tolist()
        assert table == request.block_table.tolist()
        text = [*request.token_ids, *item.draft]
        for position in range(item.start, item.start + item.num_tokens):
            if item.carried:
                carried.append((len(tokens), order.index(request)))
            if item.samples and position >= item.start + item.count - 1:
                rows.append(len(tokens))
                guessed = item.draft[: position - (item.start + item.count - 1)]
                samples.append(SampleInput(request, position + 1 - request.num_prompt_tokens, guessed))
            tokens.append(0 if item.carried else text[position])
            positions.append(position)
            slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
        assert arrays.lengths[number] == item.start + item.num_tokens
        assert arrays.query_start[number + 1] == len(tokens)
    assert arrays.token_ids.tolist() == tokens
    assert arrays.positions.tolist() == positions
    assert arrays.slots.tolist() == slots
    assert arrays.rows.tolist() == rows
    assert step.samples == samples
    assert list(step.carried) == carried
    kinds = {name: getattr(arrays, name).dtype.name for name in arrays.__slots__}
    assert kinds == {name: "int64" if name == "slots" else "int32" for name in kinds}
    assert all(getattr(arrays, name).flags.c_contiguous for name in kinds)

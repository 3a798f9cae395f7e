from __future__ import annotations

from typing import Any

import msgspec
import pytest

from workers.protocol.messages import KvLayout
from workers.transfer.compatibility import mismatch

OURS = KvLayout(2, 4, 8, 16, "bfloat16", "aaaa")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("num_layers", 3, "number of layers"),
        ("num_kv_heads", 2, "number of KV heads"),
        ("head_dim", 16, "head size"),
        ("block_size", 32, "block size"),
        ("dtype", "float32", "KV cache dtype"),
        ("model_fingerprint", "bbbb", "model"),
    ],
)
def test_each_difference_is_named_with_both_values(field: str, value: Any, what: str) -> None:
    said = mismatch(OURS, msgspec.structs.replace(OURS, **{field: value}), "d7")
    assert said is not None
    assert f"{what} is {getattr(OURS, field)} here and {value} on d7" in said


def test_all_differences_are_told_at_once_and_equals_match() -> None:
    other = msgspec.structs.replace(OURS, dtype="float16", block_size=4)
    said = mismatch(OURS, other, "d7")
    assert said is not None
    assert said.count(" here and ") == 2
    assert mismatch(OURS, msgspec.structs.replace(OURS), "d7") is None


def test_no_field_of_a_layout_is_forgotten() -> None:
    for field in KvLayout.__struct_fields__:
        changed = "x" if isinstance(getattr(OURS, field), str) else getattr(OURS, field) + 1
        assert mismatch(OURS, msgspec.structs.replace(OURS, **{field: changed}), "d7"), field

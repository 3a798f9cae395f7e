from __future__ import annotations

from pathlib import Path

import pytest

from workers.models.errors import ModelError
from workers.models.gguf_blocks import write_blocks
from workers.models.random_model import write_random_model
from workers.models.scheme import FLOATS, Scheme, choose_scheme, weights_fingerprint


def test_what_is_asked_for_is_chosen(tmp_path: Path) -> None:
    model = write_random_model(tmp_path)
    chosen = {wanted: choose_scheme(wanted, model).name for wanted in ("auto", "none", "int8", "int4", "fp8")}
    assert chosen == {"auto": "none", "none": "none", "int8": "int8", "int4": "int4", "fp8": "fp8"}


def test_a_gguf_is_served_as_stored_when_asked(tmp_path: Path) -> None:
    model = write_random_model(tmp_path)
    write_blocks(model, [], {})
    assert choose_scheme("stored", model) == Scheme("stored")
    assert choose_scheme("auto", model) == Scheme("none")
    assert choose_scheme("none", model) == FLOATS


def test_refusals_say_what_is_allowed(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, {"intermediate_size": 72})
    with pytest.raises(ModelError, match=r"intermediate_size is 72; use int8 or none"):
        choose_scheme("int4", model)
    with pytest.raises(
        ModelError, match="'int2' is not known; allowed are auto, none, stored, int8, int4, fp8"
    ):
        choose_scheme("int2", model)


def test_fingerprints_differ_by_scheme_and_not_by_machine() -> None:
    names = ("none", "stored", "int8", "int4", "fp8")
    prints = [weights_fingerprint("ab" * 32, Scheme(name)) for name in names]  # type: ignore[arg-type]
    assert prints[0] == "ab" * 32  # floats keep the model's own
    assert len(set(prints)) == 5
    # A test vector: prefixes cached under int8 are named by this.
    assert prints[2] == "280e5b3a6c5b9dddab02a102d2c0956248e174b60708478a1ff5523452f8e325"

"""What is exported for llama.cpp is, read back, the model that went in."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from bench.compare.gguf_export import export_gguf
from tests.workers.models.tiny_gguf import write_gguf
from workers.models.gguf_import import import_gguf
from workers.models.random_model import write_random_model


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file in 8 bits and the bfloat16 directory made from it."""
    directory = tmp_path_factory.mktemp("origin")
    model = write_random_model(directory / "random")
    file = write_gguf(model, directory / "m.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    return file, imported(file, directory / "imported")


def imported(file: Path, target: Path) -> Path:
    target.mkdir()
    import_gguf(file, target, lambda message: None)
    return target


def test_bf16_comes_back_bit_by_bit(origin: tuple[Path, Path], tmp_path: Path) -> None:
    file, model = origin
    export_gguf(file, model, tmp_path / "m.gguf", "BF16")
    back = imported(tmp_path / "m.gguf", tmp_path / "back")
    before, after = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (back / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_0", 0.15), ("Q4_1", 0.15)])
def test_quantized_files_hold_the_same_model(
    origin: tuple[Path, Path], tmp_path: Path, kind: str, error: float
) -> None:
    file, model = origin
    export_gguf(file, model, tmp_path / "m.gguf", kind)  # type: ignore[arg-type]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kind
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    back = imported(tmp_path / "m.gguf", tmp_path / "back")
    before, after = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    for name, value in before.items():
        distance = (value.float() - after[name].float()).norm() / value.float().norm()
        assert distance < error, name


def test_an_unknown_kind_is_refused(origin: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'Q3_K'.*possible are BF16"):
        export_gguf(*origin, tmp_path / "m.gguf", "Q3_K")  # type: ignore[arg-type]

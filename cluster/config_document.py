"""The configuration as text: what is in force, and every setting with its default and its meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig, EngineOverrides, SpeculationOverrides

_MASK = '"********"'
_UNITS = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_WIDTH = 44  # column of the comments
_HEAD = """\
# Every setting of Headrace, with its default. A file needs only what differs: `headrace serve --config FILE`.
# Any of them can be given on the command line too: `headrace serve --set router.http.port=8080`.
"""


def effective_yaml(config: ClusterConfig) -> str:
    """The settings in force, secrets masked."""
    return "\n".join(_section(config, 0, with_comments=False)) + "\n"


def example_yaml() -> str:
    """deploy/config.example.yaml."""
    return _HEAD + "\n" + "\n".join(_section(ClusterConfig(), 0, with_comments=True)) + "\n"


def _section(model: BaseModel, depth: int, with_comments: bool) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        comment = f"# {field.description}" if with_comments and field.description else ""
        if isinstance(value, BaseModel) and not isinstance(value, EngineOverrides):
            if with_comments and depth == 0 and lines:
                lines.append("")
            lines.append(f"{indent}{name}:  {comment}".rstrip())
            lines += _section(value, depth + 1, with_comments)
            continue
        setting = f"{indent}{name}: {_scalar(value, field)}"
        lines.append(f"{setting:<{_WIDTH}}  {comment}".rstrip())
    return lines


def _scalar(value: Any, field: FieldInfo | None = None) -> str:
    if field is not None and field.repr is False and value:
        return _MASK
    if isinstance(value, (EngineOverrides, SpeculationOverrides)):
        named = {name: getattr(value, name) for name in sorted(value.model_fields_set)}
        return "{" + ", ".join(f"{name}: {_scalar(inner)}" for name, inner in named.items()) + "}"
    if isinstance(value, BaseModel):  # one of a list: only what differs from the defaults
        fields = type(value).model_fields
        named = {name: getattr(value, name) for name in fields if name in value.model_fields_set}
        return (
            "{" + ", ".join(f"{name}: {_scalar(inner, fields[name])}" for name, inner in named.items()) + "}"
        )
    if isinstance(value, ByteSize):
        return next((f"{value // size}{unit}" for unit, size in _UNITS if value % size == 0), str(int(value)))
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(inner) for inner in value) + "]"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)  # JSON scalars are YAML scalars

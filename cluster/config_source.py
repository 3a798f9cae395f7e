"""Where settings come from: a YAML file with the line of each key, and dotted overrides from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config_errors import ConfigError

SettingPath = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Raw settings and, for messages, where each of them was written: `config.yaml:12` or `--set`."""

    data: dict[str, Any]
    places: dict[SettingPath, str]

    def where(self, path: SettingPath) -> str:
        """The place of a setting, or of the nearest section around it; empty when it is a default."""
        for end in range(len(path), 0, -1):
            if place := self.places.get(path[:end]):
                return place
        return ""


def read_source(path: Path) -> Source:
    """Raises ConfigError when the file can't be read, is no YAML, or names a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError([f"{path}: can't read the configuration: {reason}"]) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError([f"{path}{line}: not valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise ConfigError([f"{path}: not valid YAML: {error}"]) from None
    if root is None or data is None:
        return Source({}, {})
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([f"{path}: expected settings such as `model: {{name: ...}}`, got {data!r:.60}"])
    places: dict[SettingPath, str] = {}
    twice: list[str] = []
    _walk(root, (), str(path), places, twice)
    if twice:
        raise ConfigError(twice)
    return Source(data, places)


def _walk(
    node: yaml.MappingNode, prefix: SettingPath, file: str, places: dict[SettingPath, str], twice: list[str]
) -> None:
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        place = f"{file}:{key.start_mark.line + 1}"
        if name in seen:
            twice.append(f"{place}: {'.'.join((*prefix, name))}: written twice")
        seen.add(name)
        places[*prefix, name] = place
        if isinstance(value, yaml.MappingNode):
            _walk(value, (*prefix, name), file, places, twice)


def parse_setting(text: str) -> tuple[str, Any]:
    """`router.http.port=8080` as ("router.http.port", 8080); the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError([f"--set {text}: expected NAME=VALUE, e.g. --set router.http.port=8080"])
    try:
        return name.strip(), yaml.safe_load(value) if value.strip() else None
    except (yaml.YAMLError, ValueError):
        raise ConfigError([f"--set {text}: the value is not valid YAML; quote it if it is text"]) from None


def merge_overrides(source: Source, overrides: Mapping[str, Any]) -> Source:
    """A copy of `source` with dotted settings put over it."""
    data = _copy(source.data)
    places = dict(source.places)
    for name, value in overrides.items():
        path = tuple(name.split("."))
        section = data
        for depth, part in enumerate(path[:-1]):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                above = ".".join(path[: depth + 1])
                raise ConfigError([f"{name}: {above} is the value {inner!r:.40}, not a section"])
            section = inner
        section[path[-1]] = value
        places[path] = "command line"
    return Source(data, places)


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value

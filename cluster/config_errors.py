"""Mistakes in the configuration, told to the person who made them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


class ConfigError(Exception):
    """The configuration can't be used. The message is a readable list of everything wrong with it."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


def setting_names(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting of a tree, sections included, as paths."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, (*prefix, name))


def explain(
    error: ValidationError, root: type[BaseModel], where: Callable[[tuple[str, ...]], str]
) -> list[str]:
    """One line for each mistake: place, full name, what came, what is allowed."""
    names = [".".join(path) for path in setting_names(root)]
    lines: list[str] = []
    for mistake in error.errors(include_url=False):
        path = tuple(str(part) for part in mistake["loc"])
        place = where(path)
        came = "the value" if _is_secret(path, root) else f"{mistake['input']!r:.60}"
        line = _line(".".join(path), mistake, came, names)
        lines.append(f"{place}: {line}" if place else line)
    return lines


def _is_secret(path: tuple[str, ...], model: type[BaseModel]) -> bool:
    """What `headrace config` masks is not shown in messages either: they end up in logs."""
    for name in path:
        if name.isdecimal():
            continue  # the place in a list of sections
        field = model.model_fields.get(name)
        if field is None or field.repr is False:
            return field is not None
        inner = _section_of(field.annotation)
        if inner is None:
            return False
        model = inner
    return _holds_secrets(model)


def _section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a setting is, or that its list consists of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is list:
        return _section_of(get_args(annotation)[0])
    return None


def _holds_secrets(model: type[BaseModel]) -> bool:
    inner = (_section_of(field.annotation) for field in model.model_fields.values())
    return any(field.repr is False for field in model.model_fields.values()) or any(
        section is not None and _holds_secrets(section) for section in inner
    )


def _line(name: str, mistake: Any, came: str, names: list[str]) -> str:
    kind = mistake["type"]
    if kind == "extra_forbidden":
        nearest = nearest_name(name, names)
        return f"{name}: no such setting" + (f"; did you mean {nearest}?" if nearest else "")
    if kind == "value_error" and not name:  # a rule between settings names them itself
        return str(mistake["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"{name}: is a section, it takes settings below it, not {came}"
    if kind == "value_error":
        return f"{name}: {came} is not allowed: {mistake['ctx']['error']}"
    if kind.startswith("byte_size"):
        return f"{name}: {came} is not allowed: must be a number of bytes, e.g. 512MiB or 2GiB"
    allowed = mistake["msg"].partition(" should ")[2] or mistake["msg"]  # "String should have at least ..."
    return f"{name}: {came} is not allowed: must {allowed}"


def nearest_name(name: str, names: list[str]) -> str | None:
    """The allowed name that was most likely meant: a near spelling, or the same last part elsewhere."""
    parent, _, last = name.rpartition(".")
    siblings = [other for other in names if other.rpartition(".")[0] == parent]
    # By the last part: the section that both share would make short names alike.
    if close := difflib.get_close_matches(last, [other.rpartition(".")[2] for other in siblings], 1, 0.75):
        return f"{parent}.{close[0]}".lstrip(".")
    same_last = [other for other in names if other.rpartition(".")[2] == last]
    if same_last:
        return difflib.get_close_matches(name, same_last, n=1, cutoff=0.0)[0]
    elsewhere = [other for other in names if other not in siblings]
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        return close[0]
    close_last = difflib.get_close_matches(last, {other.rpartition(".")[2] for other in siblings}, n=1)
    return f"{parent}.{close_last[0]}".lstrip(".") if close_last else None

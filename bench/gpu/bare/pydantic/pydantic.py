"""In place of pydantic on a machine that lacks it (bench/gpu_check.sh puts this folder on the path): what Headrace's
settings use, without the checks of bounds: sections with defaults, sizes such as 2GiB, validators of a whole section.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, Self

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{prefix}ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgt")
}


class ValidationError(ValueError):
    pass


class ByteSize(int):
    def __new__(cls, value: int | str) -> Self:
        if isinstance(value, str):
            found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", value)
            if found is None or found[2].lower() not in _UNITS:
                raise ValidationError(f"{value!r} is no size")
            value = int(float(found[1]) * _UNITS[found[2].lower()])
        return super().__new__(cls, value)


class _Field:
    def __init__(
        self, default: Any = ..., default_factory: Callable[[], Any] | None = None, **bounds: Any
    ) -> None:
        self.default, self.default_factory = default, default_factory

    @property
    def required(self) -> bool:
        return self.default is ... and self.default_factory is None

    def value(self) -> Any:
        return self.default if self.default_factory is None else self.default_factory()


def Field(default: Any = ..., **more: Any) -> Any:
    return _Field(default, **more)


def ConfigDict(**settings: Any) -> dict[str, Any]:
    return settings


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function._validates = mode
        return function

    return mark


class BaseModel:
    _fields: typing.ClassVar[dict[str, _Field]] = {}
    _validators: typing.ClassVar[list[str]] = []

    def __init_subclass__(cls, **settings: Any) -> None:
        own = inspect.get_annotations(cls)
        given = {
            name: cls.__dict__.get(name, ...) for name in own if not name.startswith(("_", "model_config"))
        }
        cls._fields = cls._fields | {
            name: default if isinstance(default, _Field) else _Field(default)
            for name, default in given.items()
        }
        marked = [name for name, value in cls.__dict__.items() if getattr(value, "_validates", "") == "after"]
        cls._validators = cls._validators + marked

    def __init__(self, **values: Any) -> None:
        if unknown := values.keys() - self._fields.keys():
            raise ValidationError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        if lacking := [name for name, field in self._fields.items() if field.required and name not in values]:
            raise ValidationError(f"{type(self).__name__} lacks {', '.join(lacking)}")
        for name, field in self._fields.items():
            setattr(
                self,
                name,
                _converted(values[name], _hints(type(self))[name]) if name in values else field.value(),
            )
        for name in self._validators:
            getattr(self, name)()

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | (update or {}))
        return copy

    def model_dump(self, **how: Any) -> dict[str, Any]:
        return {name: _dumped(getattr(self, name)) for name in self._fields}


def _dumped(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _converted(value: Any, kind: Any) -> Any:
    if kind is ByteSize or ByteSize in typing.get_args(kind):
        return None if value is None else ByteSize(value)
    if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
        return kind(**value)
    return value

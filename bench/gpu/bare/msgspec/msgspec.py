"""In place of msgspec on a machine that lacks it (bench/gpu_check.sh puts this folder on the path): what Headrace uses.

Records and the same bytes of msgpack and JSON, decoded with the types checked, in plain Python: slower, and good enough
between processes of one benchmark. Served from only there; an installed msgspec is never hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json as _json
import types
import typing
from typing import Any

import msgpack as _packer

_MUTABLE = (list, dict, set)
_MISSING = dataclasses.MISSING


class MsgspecError(Exception):
    pass


class DecodeError(MsgspecError):
    pass


class ValidationError(DecodeError):
    pass


class Struct:
    """A dataclass; `tag` goes beside its fields as `type`, `array_like` has no names on the wire."""

    _tag: typing.ClassVar[str | None] = None
    _array_like: typing.ClassVar[bool] = False
    _omit: typing.ClassVar[bool] = False

    def __init_subclass__(
        cls,
        frozen: bool = False,
        tag: str | None = None,
        array_like: bool = False,
        omit_defaults: bool = False,
        order: bool = False,
        **more: Any,
    ) -> None:
        if more:
            raise NotImplementedError(f"the stand-in for msgspec knows nothing of {', '.join(more)}")
        cls._tag, cls._array_like, cls._omit = tag, array_like, omit_defaults
        for name in inspect.get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, _MUTABLE):
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        dataclasses.dataclass(cls, frozen=frozen, order=order)  # type: ignore[call-overload]


def to_builtins(value: Any) -> Any:
    if isinstance(value, Struct):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        if value._array_like:
            return [to_builtins(getattr(value, field.name)) for field in fields]
        tag = {} if value._tag is None else {"type": value._tag}
        kept = [f for f in fields if not (value._omit and getattr(value, f.name) == _default(f))]
        return tag | {field.name: to_builtins(getattr(value, field.name)) for field in kept}
    if isinstance(value, dict):
        return {key: to_builtins(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_builtins(one) for one in value]
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is _MISSING else field.default_factory()


def convert(value: Any, type: Any = Any) -> Any:  # msgspec's own name
    """`value` as that type. Raises ValidationError."""
    origin, inner = typing.get_origin(type), typing.get_args(type)
    if type is Any:
        return value
    if origin is typing.Annotated:
        return convert(value, inner[0])
    if origin is typing.Literal:
        return _want(value in inner, value, type)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, inner)
    if origin is list:
        return [convert(one, inner[0]) for one in _want(isinstance(value, (list, tuple)), value, type)]
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(convert(one, kind) for one, kind in zip(value, kinds, strict=True))
    if origin is dict:
        found = _want(isinstance(value, dict), value, type)
        return {convert(key, inner[0]): convert(one, inner[1]) for key, one in found.items()}
    if isinstance(type, builtin_type) and issubclass(type, Struct):
        return _convert_struct(value, type)
    if type is float and isinstance(value, int):
        return float(value)
    if type is int and isinstance(value, str):  # a key of JSON
        return int(value)
    return _want(isinstance(value, type), value, type)


builtin_type = type


def _convert_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    structs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Struct)]
    if isinstance(value, dict) and structs:
        named = [kind for kind in structs if kind._tag == value.get("type")]
        return convert(value, _want(named, value, kinds)[0])
    return convert(value, next(kind for kind in kinds if kind is not types.NoneType))


def _convert_struct(value: Any, kind: Any) -> Any:
    fields = dataclasses.fields(kind)
    if kind._array_like:
        value = dict(zip([field.name for field in fields], value, strict=False))
    if _want(isinstance(value, dict), value, kind).get("type", kind._tag) != kind._tag:
        raise ValidationError(f"{value.get('type')!r} is not {kind.__name__}")
    hints = _hints(kind)
    for field in fields:
        required = field.default is _MISSING and field.default_factory is _MISSING
        if required and field.name not in value:
            raise ValidationError(f"{kind.__name__} lacks {field.name}")
    return kind(**{f.name: convert(value[f.name], hints[f.name]) for f in fields if f.name in value})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _want(fine: Any, value: Any, kind: Any) -> Any:
    if not fine:
        raise ValidationError(f"expected {kind}, got {value!r:.100}")
    return fine if isinstance(fine, list) else value


class msgpack:  # a module of msgspec's
    @staticmethod
    def encode(value: Any) -> bytes:
        return _packer.packb(to_builtins(value))

    @staticmethod
    def decode(data: Any, type: Any = Any) -> Any:
        try:
            found = _packer.unpackb(data, strict_map_key=False)
        except Exception as error:
            raise DecodeError(str(error)) from error
        return convert(found, type)

    class Encoder:
        def encode(self, value: Any) -> bytes:
            return msgpack.encode(value)

    class Decoder:
        def __init__(self, type: Any = Any) -> None:
            self._type = type

        def __class_getitem__(cls, item: Any) -> Any:
            return cls

        def decode(self, data: Any) -> Any:
            return msgpack.decode(data, self._type)


class json:  # a module of msgspec's
    @staticmethod
    def encode(value: Any) -> bytes:
        return _json.dumps(to_builtins(value)).encode()

    @staticmethod
    def decode(data: Any, type: Any = Any) -> Any:
        try:
            found = _json.loads(data)
        except ValueError as error:
            raise DecodeError(str(error)) from error
        return convert(found, type)


class structs:  # a module of msgspec's
    replace = staticmethod(dataclasses.replace)
    asdict = staticmethod(lambda value: {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})

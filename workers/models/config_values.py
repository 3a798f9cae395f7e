"""config.json with checked look-ups, so that a bad value is named rather than met later as a bad shape. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.errors import ModelError, NotExpressed


class ConfigValues:
    """null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"config.json has no {key!r}; a decoder needs it")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wanted = "a positive integer" if least == 1 else f"an integer >= {least}"
            raise ModelError(f"config.json: {key} must be {wanted}, not {value!r}")
        return value

    def first_integer(self, *keys: str, default: int) -> int:
        """Of the first key that is there: one quantity under several names."""
        return next((self.integer(key) for key in keys if self.values.get(key) is not None), default)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        return default if value is None else positive_number(key, value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value that the decoder does not express; absent is fine."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            listed = " or ".join(repr(one) for one in allowed) or "null"
            raise NotExpressed(f"config.json: {key} {value!r} is not supported; supported is {listed}")


def positive_number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)

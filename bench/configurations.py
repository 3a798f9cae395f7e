"""Engine configurations by name: the settings of EngineConfig in which they differ from its defaults.

A name is parts joined by `+`: a weight format first, then what is changed beside it, e.g. `int8+kv8`, `bf16+torch`.
"""

from __future__ import annotations

import os
from typing import Any

from workers.config import EngineConfig

CORES = os.cpu_count() or 1

FORMATS: dict[str, dict[str, Any]] = {
    "default": {},
    "stored": {"dtype": "bfloat16", "quantization": "stored"},
    "fp32": {"dtype": "float32", "quantization": "none"},
    "bf16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
CHANGES: dict[str, dict[str, Any]] = {
    "kv8": {"kv_cache_dtype": "int8"},
    "torch": {"kernels": "torch"},
    "one": {"num_threads": 1},
    "pin": {"num_threads": CORES, "cpus": list(range(CORES))},
    "nocache": {"prefix_caching": False},
}
# What an engine without the field does anyway: no reason to refuse.
_ALWAYS_SO: dict[str, Any] = {"quantization": "none", "kv_cache_dtype": "auto", "kernels": "torch"}

ALL = ("bf16", "fp32", "int8", "int4", "bf16+kv8", "int8+kv8", "int4+kv8")


class NotSupported(ValueError):
    """This engine has no such setting yet; the message names it."""


def overrides(name: str) -> dict[str, Any]:
    """Raises ValueError for a name that means nothing and NotSupported for what this engine cannot do."""
    first, *rest = name.split("+")
    if first not in FORMATS or not set(rest) <= CHANGES.keys():
        raise ValueError(
            f"configuration {name!r} is not known: it must be one of {', '.join(FORMATS)}, "
            f"each followed by any of {', '.join('+' + change for change in CHANGES)}"
        )
    wanted = dict(FORMATS[first])
    for change in rest:
        wanted |= CHANGES[change]
    unknown = wanted.keys() - EngineConfig.model_fields.keys()
    missing = sorted(field for field in unknown if wanted[field] != _ALWAYS_SO.get(field))
    if missing:
        raise NotSupported(f"{name}: EngineConfig has no {', '.join(missing)}")
    return {field: value for field, value in wanted.items() if field not in unknown}


def check_in_force(name: str, engine: Any) -> None:
    """Raise NotSupported when an engine has taken a setting and not heeded it: its figures would be another's."""
    wanted = overrides(name)
    kernels = getattr(engine.runner, "kernels", "torch")
    if wanted.get("quantization") in ("int8", "int4") and kernels == "torch":
        raise NotSupported(f"{name}: weights are not quantized with {kernels} kernels")
    if wanted.get("kv_cache_dtype") == "int8" and engine.layout.dtype != "int8":
        raise NotSupported(f"{name}: the KV cache is {engine.layout.dtype}")


def engine_config(name: str, **settings: Any) -> EngineConfig:
    """The configuration with further settings; those of the name win."""
    return EngineConfig(**(settings | overrides(name)))

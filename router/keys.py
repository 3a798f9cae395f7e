"""The API keys that let a client in, over HTTP and gRPC alike, and whose they are."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from router.config import DEFAULT_TENANT, checked_api_key, key_digest

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0  # at a file of keys
_MAX_FILE_BYTES = 16 * 1024**2


@dataclass(slots=True)
class _KeyFile:
    tenant: str
    path: Path
    stamp: tuple[int, int, int] | None = None  # of what was read last
    digests: list[bytes] = field(default_factory=list)


class ApiKeys:
    """Bearer keys. Without any, and without a file of them, everybody is `default`.

    What a client sends is hashed, and the hash again with a secret that this process made up; that is looked up. How long
    a look-up takes says nothing about any key, and does not grow with their number.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        of_tenants: Iterable[tuple[str, Iterable[str]]] = (),
        files: Iterable[tuple[str, Path]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keys` are those of `default`. Raises OSError when a file cannot be read."""
        self._blind = secrets.token_bytes(32)
        self._clock = clock
        self._fixed = [(DEFAULT_TENANT, key_digest(key)) for key in keys]
        self._fixed += [(tenant, key_digest(key)) for tenant, own in of_tenants for key in own]
        self._files = [_KeyFile(tenant, path) for tenant, path in files]
        self._open = not self._fixed and not self._files  # an empty file opens nothing
        self._tenants: dict[bytes, str] = {}
        for file in self._files:
            _read(file)
        self._index()
        self._look_at = clock() + _LOOK_EVERY_S

    def tenant(self, authorization: bytes | str | None) -> str | None:
        """Whose key `authorization` holds: the value of HTTP's header, or of gRPC's metadata. None: nobody's."""
        if self._open:
            return DEFAULT_TENANT
        if self._files and self._clock() >= self._look_at:
            self._look_again()
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, key = value.partition(b" ")
        found = self._tenants.get(self._blinded(hashlib.sha256(key.strip()).digest()))
        return found if scheme.lower() == b"bearer" else None

    def admits(self, authorization: bytes | str | None) -> bool:
        return self.tenant(authorization) is not None

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")

    def _index(self) -> None:
        tenants: dict[bytes, str] = {}
        pairs = self._fixed + [(file.tenant, digest) for file in self._files for digest in file.digests]
        for tenant, digest in pairs:
            owner = tenants.setdefault(self._blinded(digest), tenant)
            if owner != tenant:
                logger.error(
                    "a key of tenant %s is listed for tenant %s too: it stays %s's", owner, tenant, owner
                )
        self._tenants = tenants

    def _look_again(self) -> None:
        self._look_at = self._clock() + _LOOK_EVERY_S
        changed = False
        for file in self._files:
            try:
                if _stamp(file.path) != file.stamp:
                    _read(file)
                    changed = True
                    logger.info(
                        "read %d API keys of tenant %s from %s", len(file.digests), file.tenant, file.path
                    )
            except OSError as error:
                if file.stamp is not None:  # said once
                    logger.error(
                        "%s cannot be read, the keys of tenant %s stay as they were: %s",
                        *(file.path, file.tenant, error.strerror or error),
                    )
                    file.stamp = None
        if changed:
            self._index()


def _read(file: _KeyFile) -> None:
    stamp = _stamp(file.path)  # before reading: what is written meanwhile is read the next time
    if stamp[1] > _MAX_FILE_BYTES:
        raise OSError(f"larger than {_MAX_FILE_BYTES} bytes")
    digests = []
    for number, line in enumerate(file.path.read_bytes().splitlines(), start=1):
        try:
            key = line.decode().strip()
            if key and not key.startswith("#"):
                digests.append(key_digest(checked_api_key(key)))
        except ValueError:
            # The others count all the same: a key that was taken out must not stay because of a misspelt line.
            logger.error("line %d of %s is no API key and is left out", number, file.path)
    file.digests, file.stamp = digests, stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino

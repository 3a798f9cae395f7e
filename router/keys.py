"""The API keys that let a client in, over HTTP and gRPC alike."""

from __future__ import annotations

import hashlib
import hmac


class ApiKeys:
    """Bearer keys, compared in constant time. No keys: everybody may come in."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admits(self, authorization: bytes | str | None) -> bool:
        """`authorization` is the value of HTTP's header, or of gRPC's metadata."""
        if not self._digests:
            return True
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, key = value.partition(b" ")
        given = _digest(key.strip())
        # Every key is compared, so that the time says neither which one matched nor how far.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

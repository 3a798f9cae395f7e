from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from router.keys import ApiKeys


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_keys_everybody_is_default() -> None:
    assert ApiKeys().tenant(None) == "default"


def test_plain_and_hashed_keys_know_their_tenant() -> None:
    keys = ApiKeys(["d-key"], of_tenants=[("a", ["a-key", hashed("a-hashed")]), ("b", [hashed("schlüssel")])])
    assert keys.tenant("Bearer d-key") == "default"
    assert keys.tenant(b"bearer  a-key ") == "a"
    assert keys.tenant("Bearer a-hashed") == "a"
    assert keys.tenant("Bearer schlüssel".encode()) == "b"
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic a-key",
        "a-key",
        f"Bearer {hashed('a-hashed')}",
        "Bearer a-ke",
    ):
        assert keys.tenant(wrong) is None


def test_a_file_of_keys_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(f"# of acme\n\nfirst-key\n{hashed('second-key')}\n")
    keys = ApiKeys(files=[("acme", path)], clock=clock)
    assert keys.tenant("Bearer first-key") == keys.tenant("Bearer second-key") == "acme"
    with caplog.at_level(logging.INFO):
        path.write_text("third-key\nsha256:nonsense\n")
        assert keys.tenant("Bearer first-key") == "acme"  # looked at once a second
        clock.now += 1.1
        assert keys.tenant("Bearer first-key") is None
        assert keys.tenant("Bearer third-key") == "acme"
        assert "line 2" in caplog.text
        for _ in range(3):
            path.unlink(missing_ok=True)
            clock.now += 1.1
            assert (
                keys.tenant("Bearer third-key") == "acme"
            )  # gone for a moment, as editors do: nobody is locked out
        assert caplog.text.count("cannot be read") == 1
        replacement = tmp_path / "new"
        replacement.write_text("")
        os.replace(replacement, path)
        clock.now += 1.1
        assert keys.tenant("Bearer third-key") is None
        assert keys.tenant(None) is None  # an empty file opens nothing
    for secret in ("first-key", "third-key", "nonsense"):
        assert secret not in caplog.text


def test_a_file_that_is_missing_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        ApiKeys(files=[("acme", tmp_path / "missing")])


def test_a_key_in_two_places_stays_with_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("a-key\n")
    keys = ApiKeys(of_tenants=[("a", ["a-key"])], files=[("b", path)])
    assert keys.tenant("Bearer a-key") == "a"
    assert "a key of tenant a is listed for tenant b too" in caplog.text
    assert "a-key" not in caplog.text

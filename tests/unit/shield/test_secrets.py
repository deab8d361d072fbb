"""Memory for secrets, and the encrypted directory's key."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from inclavare.errors import PlatformError, ResourceError
from inclavare.shield import secrets
from inclavare.shield.attestfs import check_secret_name
from inclavare.shield.encrypted import EncryptedDirectory
from inclavare.shield.secrets import Secret, SecretStore, has_memfd_secret


def test_a_secret_is_revealed_only_when_asked() -> None:
    secret = Secret(b"top secret")
    assert secret.reveal() == b"top secret"
    assert "top" not in repr(secret) and "top" not in str(secret)
    assert len(secret) == 10
    assert secret.protected == has_memfd_secret()
    secret.wipe()
    secret.wipe()
    assert len(secret) == 0
    with pytest.raises(ValueError):
        secret.reveal()


def test_empty_and_large_secrets() -> None:
    assert Secret(b"").reveal() == b""
    large = os.urandom(1 << 20)
    assert Secret(large).reveal() == large


def test_the_store() -> None:
    store = SecretStore()
    store.put(b"b", b"1")
    store.put(b"a", b"2")
    store.put(b"b", b"3")
    assert (store.names(), store.get(b"b"), store.get(b"c")) == ([b"a", b"b"], b"3", None)
    store.wipe()
    assert store.names() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "\n", "a\0", "x" * 129, "ä"])
def test_names_that_are_no_secrets(name: str) -> None:
    with pytest.raises(ValueError):
        check_secret_name(name)


needs_gocryptfs = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("gocryptfs") is None, reason="needs root and gocryptfs"
)


@needs_gocryptfs
def test_the_key_is_nowhere_to_be_seen_and_ciphertext_is_authenticated(tmp_path: Path) -> None:
    key = bytes(range(32))
    cipher, point = tmp_path / "cipher", tmp_path / "plain"
    cipher.mkdir()
    point.mkdir()
    directory = EncryptedDirectory.start(cipher, point, Secret(key))
    try:
        directory.wait()
        for place in ("cmdline", "environ"):
            seen = Path(f"/proc/{directory.pid}/{place}").read_bytes()
            assert key.hex().encode() not in seen and key not in seen
        (point / "file").write_bytes(b"plain text " * 1000)
    finally:
        directory.stop()
    [file] = [path for path in cipher.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert b"plain text" not in file.read_bytes()
    damaged = bytearray(file.read_bytes())
    damaged[300] ^= 1
    file.write_bytes(damaged)
    again = EncryptedDirectory.start(cipher, point, Secret(key))
    try:
        again.wait()
        with pytest.raises(OSError):
            (point / "file").read_bytes()
    finally:
        again.stop()
    assert not os.path.ismount(point)


@needs_gocryptfs
def test_another_key_opens_nothing(tmp_path: Path) -> None:
    cipher, point = tmp_path / "cipher", tmp_path / "plain"
    cipher.mkdir()
    point.mkdir()
    for key, expected in ((b"a" * 32, []), (b"b" * 32, [])):
        directory = EncryptedDirectory.start(cipher, point, Secret(key))
        try:
            directory.wait()
            assert os.listdir(point) == expected
            (point / "file").write_bytes(key)
            assert (point / "file").read_bytes() == key
        finally:
            directory.stop()


def test_missing_gocryptfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError) as caught:
        EncryptedDirectory.start(tmp_path, tmp_path, Secret(bytes(32)))
    assert "apt-get install gocryptfs" in str(caught.value.remedy)


@needs_gocryptfs
def test_a_directory_that_cannot_be_mounted_says_why(tmp_path: Path) -> None:
    point = tmp_path / "plain"
    point.mkdir()
    (point / "not-empty").touch()
    (tmp_path / "cipher").mkdir()
    directory = EncryptedDirectory.start(tmp_path / "cipher", point, Secret(bytes(32)))
    with pytest.raises(ResourceError) as caught:
        directory.wait()
    assert caught.value.found
    directory.stop()


def test_a_kernel_without_secret_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_SYS_MEMFD_SECRET", 100_000)
    assert not has_memfd_secret()
    secret = Secret(b"locked instead")
    assert (secret.protected, secret.reveal()) == (False, b"locked instead")
    region = secret._map
    secret.wipe()
    assert region.closed


@pytest.mark.skipif(not has_memfd_secret(), reason="this kernel gives out no secret memory")
def test_secret_memory_cannot_be_read_through_proc() -> None:
    value = os.urandom(32)
    secret = Secret(value)
    # The way that a debugger, and root, read another's memory.
    address = ctypes.addressof(ctypes.c_char.from_buffer(secret._map))
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        with pytest.raises(OSError):
            memory.read(32)
    assert secret.reveal() == value
    secret.wipe()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_one_that_says_much_is_listened_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KiB; gocryptfs warns on standard error as long as it lives."""
    talker = tmp_path / "gocryptfs"
    talker.write_text(
        "#!/bin/sh\ni=0\nwhile [ $i -lt 5000 ]; do echo a warning of some length about something >&2; i=$((i+1)); done\n"
        "kill -USR1 $2\nexec sleep 100\n"
    )
    talker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "plain").mkdir()
    directory = EncryptedDirectory.start(tmp_path, tmp_path / "plain", Secret(bytes(32)))
    try:
        directory.wait()
    finally:
        directory.stop()

"""Sealing as an application does it, through a mounted ``/dev/attestation``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attestation_files import calls_of, mounted, needs_fuse
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import InclavareError, IntegrityError, PlatformError, PolicyError
from inclavare.sdk import attest, seal
from inclavare.sgx import keys, sealing
from inclavare.sgx.structs import KeyRequest
from inclavare.tee.sgx_sim import create, fuses

Enter = Callable[..., None]


@pytest.fixture
def enter(config: Config, signers: Signers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Enter]:
    """Be in an enclave: ``enter(content, isv_svn=…)``; each call is a new session of the same platform."""
    with ExitStack() as stack:

        def go(
            content: bytes = b"code", *, key: Any = None, calls: dict[str, Any] | None = None, **fields: Any
        ) -> None:
            image = small_image(content)
            enclave = create(config).load(
                image, sign_image(image, key or signers.ours, **fields).to_bytes(), label="test"
            )
            point = stack.enter_context(mounted(calls_of(enclave, **(calls or {})), []))
            monkeypatch.setattr(attest, "DIRECTORY", point)

        yield go


def refused(id: str, call: Callable[..., Any], *arguments: Any, **more: Any) -> InclavareError:
    with pytest.raises(InclavareError) as caught:
        call(*arguments, **more)
    assert caught.value.id == id, caught.value.one_line()
    return caught.value


def test_importing_it_is_light() -> None:
    script = (
        "import sys; before = set(sys.modules); from inclavare.sdk import attest, seal; "
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] == 'inclavare'), "
        "*(m for m in ('cryptography', 'ctypes', 'cffi', 'json', 'dataclasses') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["inclavare", "inclavare.errors", "inclavare.sdk", "inclavare.sdk.attest",
                                   "inclavare.sdk.seal"]  # fmt: skip


def test_outside_of_an_enclave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path / "attestation")
    blob = bytes(10)
    for call in (lambda: seal.seal(b"state"), lambda: seal.read_counter("x")):
        error = refused("sdk.seal.outside", call)
        assert isinstance(error, PlatformError) and "ENCLAVE_TYPE" in str(error.remedy)
    refused("sealing.blob.magic", seal.unseal, blob)
    (tmp_path / "attestation").mkdir()
    refused("sdk.seal.report", seal.seal, b"state")
    refused("sdk.seal.counter", seal.read_counter, "x")


@needs_fuse
@pytest.mark.parametrize("policy", ["mrenclave", "mrsigner", "mrenclave+mrsigner"])
def test_round_trip_across_sessions(enter: Enter, policy: str) -> None:
    enter()
    blob = seal.seal(b"state", policy=policy, aad=b"name")
    enter()
    assert seal.unseal(blob, aad=b"name") == seal.unseal(blob, aad=b"name", policy=policy) == b"state"
    assert isinstance(refused("sealing.open.aad", seal.unseal, blob), IntegrityError)
    assert seal.unseal(seal.seal(b"")) == b""


@needs_fuse
def test_who_else_opens_it(enter: Enter, signers: Signers) -> None:
    enter(isv_svn=3)
    ours, signed = seal.seal(b"mine"), seal.seal(b"the signer's", policy="mrsigner")
    enter(b"newer", isv_svn=4)
    assert seal.unseal(signed) == b"the signer's"
    refused("sealing.require.isvsvn", seal.unseal, signed, minimum_isv_svn=4)
    refused("sealing.require.policy", seal.unseal, signed, policy="mrenclave")
    refused("sealing.open.tag", seal.unseal, ours)
    enter(b"older", isv_svn=2)
    error = refused("sealing.open.isvsvn", seal.unseal, signed)
    assert isinstance(error, PolicyError) and error.found == "ISVSVN 3"
    enter(b"another product", isv_prod_id=8)
    refused("sealing.open.tag", seal.unseal, signed)
    enter(key=signers.theirs)
    refused("sealing.open.tag", seal.unseal, signed)


@needs_fuse
def test_a_platform_of_an_older_security_version(enter: Enter, config: Config) -> None:
    enter()
    blob = seal.seal(b"state")
    roots = fuses.load(config.platform_dir)
    older = replace(roots, cpusvn=bytes((1,)) + roots.cpusvn[1:])
    identity = keys.Identity(bytes(32), bytes(32), sealing.ATTRIBUTE_MASK, 0, 3)

    def egetkey(request: bytes) -> bytes:
        return keys.egetkey(older, identity, KeyRequest.from_bytes(request))

    enter(calls={"egetkey": egetkey})
    assert isinstance(refused("sealing.open.cpusvn", seal.unseal, blob), PolicyError)


@needs_fuse
def test_wrong_requests(enter: Enter) -> None:
    enter()
    refused("sealing.policy", seal.seal, b"x", policy="anyone")
    refused("sealing.policy", seal.unseal, seal.seal(b"x"), policy="anyone")
    for name in ("", "a b", "../x", "x" * 65, "ä"):
        refused("sdk.seal.counter.name", seal.seal, b"x", counter=name)
    error = refused("sgx.egetkey.keypolicy", seal.seal, b"x", policy="mrsigner+configid")
    assert isinstance(error, PolicyError) and "KSS" in str(error.remedy)
    blob = bytearray(seal.seal(b"x", policy="mrsigner"))
    blob[128 + 2] |= keys.POLICY_CONFIGID
    refused("sealing.open.refused", seal.unseal, bytes(blob))


@needs_fuse
def test_keys_are_for_the_application_user(enter: Enter, tmp_path: Path) -> None:
    enter()
    blob = tmp_path / "blob"
    blob.write_bytes(seal.seal(b"state"))
    script = f"""
from pathlib import Path
from inclavare.sdk import attest, seal
attest.DIRECTORY = Path({str(attest.DIRECTORY)!r})
data = Path({str(blob)!r}).read_bytes()
from inclavare.sgx import sealing
import cryptography.hazmat.primitives.ciphers.aead, os
os.setresuid(65534, 65534, 65534)
try:
    seal.unseal(data)
except Exception as error:
    print(error.id, error.expected)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "sdk.seal.user uid 0\n", done.stderr


@needs_fuse
def test_without_counters(enter: Enter) -> None:
    enter(calls={"counters": None})
    error = refused("sdk.seal.counter", seal.seal, b"x", counter="state")
    assert isinstance(error, PlatformError) and "monotonic" in error.message
    assert seal.unseal(seal.seal(b"x")) == b"x"


# --- roll-back, and crashes at every step


@needs_fuse
@pytest.mark.parametrize("policy", ["mrenclave", "mrsigner"])
def test_roll_back_is_refused(enter: Enter, tmp_path: Path, policy: str) -> None:
    path = tmp_path / "sealed"
    enter()
    assert seal.read_counter("state", policy=policy) is None
    old: list[bytes] = []
    for number in range(1, 4):
        blob = seal.seal(b"state %d" % number, counter="state", policy=policy)
        seal.store(path, blob)
        old.append(path.read_bytes())
        assert old[-1] == blob and path.stat().st_mode & 0o777 == 0o600
    enter()
    assert seal.unseal(path.read_bytes(), counter="state") == b"state 3"
    for number, blob in enumerate(old[:-1], 1):
        error = refused("sealing.counter.rollback", seal.unseal, blob)
        assert (error.found, error.expected) == (f"counter {number}", "counter 3 or above")
        refused("sealing.counter.rollback", seal.confirm, blob)
    assert seal.unseal(old[-1]) == b"state 3"


@needs_fuse
def test_crash_before_the_file_is_written(enter: Enter, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    enter()
    seal.store(path, seal.seal(b"one", counter="c"))
    for _ in range(3):
        enter()
        seal.seal(b"never written", counter="c")  # the number is taken, and then the machine dies
        enter()
        assert seal.unseal(path.read_bytes(), counter="c") == b"one"
    seal.store(path, seal.seal(b"two", counter="c"))
    assert seal.unseal(path.read_bytes(), counter="c") == b"two"


@needs_fuse
def test_crash_before_the_file_is_confirmed(enter: Enter, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    enter()
    seal.store(path, seal.seal(b"one", counter="c"))
    first = path.read_bytes()
    path.write_bytes(seal.seal(b"two", counter="c"))  # and then the machine dies
    enter()
    # Nobody can know yet whether the write was finished, so both open; after the newer one the older one never does.
    assert seal.unseal(first, counter="c") == b"one"
    assert seal.unseal(path.read_bytes(), counter="c") == b"two"
    refused("sealing.counter.rollback", seal.unseal, first, counter="c")


@needs_fuse
def test_a_write_that_was_given_up_cannot_come_back(enter: Enter, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    enter()
    seal.store(path, seal.seal(b"one", counter="c"))
    kept_back = seal.seal(b"two, kept back by the host", counter="c")
    enter()
    assert seal.unseal(path.read_bytes(), counter="c") == b"one"
    seal.store(path, seal.seal(b"two", counter="c"))
    refused("sealing.counter.rollback", seal.unseal, kept_back, counter="c")
    refused("sealing.counter.rollback", seal.store, path, kept_back)
    assert seal.unseal(path.read_bytes(), counter="c") == b"two"


@needs_fuse
def test_crash_at_every_step_of_a_store(enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before each call that changes something; the state that is then on disk opens, and is old or new."""

    class Died(BaseException):
        pass

    path = tmp_path / "sealed"
    enter()
    seal.store(path, seal.seal(b"0", counter="c"))
    seen, step, survived = {b"0"}, 0, False
    while not survived:
        step += 1
        left = [step]

        def dying(real: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Died
                return real(*arguments, **more)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(seal, "_ask", dying(seal._ask))
            patched.setattr(Path, "replace", dying(Path.replace))
            try:
                seal.store(path, seal.seal(b"%d" % step, counter="c"))
                survived = True
            except Died:
                pass
        enter()
        now = seal.unseal(path.read_bytes(), counter="c")
        assert now in seen | {b"%d" % step}
        seen = {now}
    assert step >= 5 and seen == {b"%d" % step}


@needs_fuse
def test_it_is_confirmed_when_it_is_on_the_disk(enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sealed"
    enter()
    blob = seal.seal(b"one", counter="c")
    steps: list[str] = []
    ask, fsync, replaced = seal._ask, os.fsync, Path.replace

    def seen_fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if not name.startswith(str(tmp_path / "state")):  # the platform's own
            steps.append("sync " + ("directory" if name == str(tmp_path) else "file"))
        fsync(handle)

    def seen_replace(self: Path, target: Path) -> Path:
        if target == path:
            steps.append("rename")
        return replaced(self, target)

    def seen_ask(name: str, request: bytes, size: int) -> bytes:
        steps.append(request.split()[0].decode())
        return ask(name, request, size)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    monkeypatch.setattr(seal, "_ask", seen_ask)
    seal.store(path, blob)
    assert steps == ["read", "sync file", "rename", "sync directory", "confirm"]


@needs_fuse
def test_a_counter_that_was_destroyed(enter: Enter, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    enter()
    seal.store(path, seal.seal(b"one", counter="c"))
    blob = path.read_bytes()
    seal.destroy_counter("c")
    refused("sdk.seal.counter.unknown", seal.destroy_counter, "c")
    for call in (seal.unseal, seal.confirm):
        refused("sealing.counter.id", call, blob)
    refused("sealing.counter.id", seal.store, path, blob)
    assert seal.unseal(seal.seal(b"two", counter="c")) == b"two"  # another counter of that name
    for call in (seal.unseal, seal.confirm):
        refused("sealing.counter.id", call, blob)


@needs_fuse
def test_a_blob_without_a_counter_does_not_replace_one_with(enter: Enter) -> None:
    enter()
    free, other = seal.seal(b"free"), seal.seal(b"other", counter="other")
    for blob in (free, other):
        refused("sealing.require.counter", seal.unseal, blob, counter="state")
    assert seal.unseal(free) == b"free"


@needs_fuse
def test_a_platform_that_was_rolled_back(enter: Enter, config: Config) -> None:
    enter()
    seal.seal(b"1", counter="c")
    [path] = config.platform_dir.glob("counters/*/c.counter")
    state = path.read_bytes()
    blob = seal.seal(b"2", counter="c")
    path.write_bytes(state)
    refused("sdk.seal.counter.behind", seal.unseal, blob)


@needs_fuse
def test_policies_do_not_share_counters(enter: Enter) -> None:
    enter()
    blob = seal.seal(b"a", counter="c", policy="mrsigner")
    assert seal.read_counter("c") is None
    found = seal.read_counter("c", policy="mrsigner")
    assert found is not None and (found.value, found.confirmed) == (1, 0)
    seal.confirm(blob)
    enter(b"newer", isv_svn=9)
    assert seal.unseal(seal.seal(b"b", counter="c", policy="mrsigner")) == b"b"
    refused("sealing.counter.rollback", seal.unseal, blob)


@needs_fuse
def test_no_room(enter: Enter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from inclavare.tee.sgx_sim import counters

    enter()
    monkeypatch.setattr(counters, "MAX_COUNTERS", 1)
    seal.seal(b"x", counter="one")
    refused("sdk.seal.counter.full", seal.seal, b"x", counter="two")
    blob = seal.seal(b"x", counter="one")
    with pytest.raises(OSError):
        seal.store(tmp_path / "missing/state", blob)
    found = seal.read_counter("one")
    assert found is not None and found.confirmed == 0

"""Seal data to the enclave that this process runs in, through ``/dev/attestation``.

::

    blob = seal.seal(state, aad=b"state of shard 3", counter="shard-3")
    seal.store("/data/state", blob)                # durable; from now on older states are refused
    state = seal.unseal(open("/data/state", "rb").read(), aad=b"state of shard 3", counter="shard-3")

How a counter protects against roll-back, and crashes do not lose the state: :func:`seal` takes the counter's next
number into the blob, so no two blobs bear the same. The counter also remembers the highest *confirmed* number: of the
newest blob that is known to be stored. :func:`unseal` accepts that one and newer ones, and confirms what it accepts.
Whatever ends the process between :func:`seal` and :func:`confirm`, the file on the disk, old or new, still opens.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import IntegrityError, PlatformError, ResourceError, UsageError
from . import attest

if TYPE_CHECKING:
    from ..sgx.sealing import CounterNumber, Sealed
    from ..sgx.structs import KeyRequest
    from ..tee.base import Counter


def seal(data: bytes, *, policy: str = "mrenclave", aad: bytes = b"", counter: str | None = None) -> bytes:
    """Seal data; the result is 656 bytes longer (see :mod:`inclavare.sgx.sealing`).

    Args:
        data: at most 1 GiB.
        policy: who can open it: ``mrenclave`` (this enclave), ``mrsigner`` (every enclave of its signer with its
            product id, of this security version or a newer one), or what
            :func:`~inclavare.sgx.sealing.parse_policy` knows.
        aad: additional data, which are authenticated and have to be given again; they are not stored.
        counter: name of a monotonic counter (1 to 64 letters, digits, dots, dashes, underscores), made if there is
            none: older blobs of that counter are refused once this one is confirmed. One process at a time may seal
            under a counter.

    Raises:
        PlatformError: not in an enclave container, not its application user, or a counter where the platform has none.
        UsageError: another policy, too much data, not a counter's name.
    """
    from ..sgx import sealing
    from ..sgx.structs import ReportBody

    bits = sealing.parse_policy(policy)
    with _file("report").open("rb", buffering=0) as report:
        body = ReportBody.from_bytes(report.read(ReportBody.LAYOUT.size))
    number = None if counter is None else _next(sealing.owner(bits), counter)
    return sealing.seal(data, sealing.new_request(body, bits), _egetkey, aad=aad, counter=number)


def unseal(
    blob: bytes,
    *,
    aad: bytes = b"",
    policy: str | None = None,
    minimum_isv_svn: int = 0,
    counter: str | None = None,
) -> bytes:
    """Open sealed data: all of it or none.

    Args:
        blob: from :func:`seal`.
        aad: the same additional data.
        policy: refuse data that are sealed under another policy. Name it where data of the signer's other enclaves
            must not be taken for this enclave's own.
        minimum_isv_svn: refuse data that an older version of the enclave sealed.
        counter: refuse data that are not bound to this counter; without it a blob that never had a counter is taken.

    Raises:
        PlatformError: as for :func:`seal`.
        PolicyError: sealed by a newer enclave or platform, or not what was asked for.
        IntegrityError: another enclave or platform, other additional data, damage, or older than what was stored last.
    """
    from ..sgx import sealing

    found = sealing.Sealed.parse(blob)
    bits = None if policy is None else sealing.parse_policy(policy)
    found.require(policy=bits, minimum_isv_svn=minimum_isv_svn, counter=counter)
    data = found.open(_egetkey, aad=aad)
    _confirm(found)
    return data


def confirm(blob: bytes) -> None:
    """This blob is stored: from now on older ones of its counter are refused. Without a counter nothing happens.

    Raises:
        IntegrityError: it is older than a confirmed one itself, or its counter was destroyed.
    """
    from ..sgx import sealing

    _confirm(sealing.Sealed.parse(blob))


def store(path: str | Path, blob: bytes) -> None:
    """Write a blob to a file (mode 0600), wholly and durably or not at all, and then confirm it.

    Raises:
        IntegrityError: as :func:`confirm`; the file stays as it was.
        OSError: the file cannot be written; likewise.
    """
    from ..enclave.paths import write_atomically
    from ..sgx import sealing

    found = sealing.Sealed.parse(blob)
    if found.counter is not None:
        state = read_counter(found.counter.name, policy=sealing.policy_name(found.policy))
        found.check_counter(bytes(16) if state is None else state.id, 0 if state is None else state.confirmed)
    write_atomically(Path(path), blob, 0o600, durable=True)
    _confirm(found)


def read_counter(name: str, *, policy: str = "mrenclave") -> Counter | None:
    """A counter's state, or ``None``: nothing was sealed under it yet.

    An application whose sealed file is missing learns here whether it ever had one (``confirmed`` above 0).

    Raises:
        PlatformError: as for :func:`seal`.
    """
    from ..sgx import sealing

    try:
        return _counter("read", sealing.owner(sealing.parse_policy(policy)), name)
    except FileNotFoundError:
        return None


def destroy_counter(name: str, *, policy: str = "mrenclave") -> None:
    """Destroy a counter. What was sealed under it is refused for ever.

    Raises:
        PlatformError: as for :func:`seal`.
        UsageError: there is none.
    """
    from ..sgx import sealing

    try:
        _counter("destroy", sealing.owner(sealing.parse_policy(policy)), name)
    except FileNotFoundError:
        raise UsageError(f"there is no monotonic counter {name}", id="sdk.seal.counter.unknown") from None


# --- files


def _file(name: str) -> Path:
    path = attest.DIRECTORY / name
    if path.exists():
        return path
    if not attest.DIRECTORY.exists():
        raise PlatformError(
            "sealing keys can be had inside an enclave only: no one else, the host neither, can derive them",
            id="sdk.seal.outside",
            found=f"no {attest.DIRECTORY}",
            expected="to run in an enclave container",
            remedy="run this in a container that was started with ENCLAVE_TYPE set, as its main program or by exec",
        )
    raise PlatformError(
        "the platform offers no monotonic counters" if name == "counter" else "the enclave runtime offers no EGETKEY",
        id=f"sdk.seal.{name}",
        found=f"no {path}",
        remedy="seal without a counter, and keep what must not be rolled back elsewhere"
        if name == "counter"
        else f"use the key in {attest.DIRECTORY}/keys/_sgx_mrenclave with a format of your own",
    )


def _ask(name: str, request: bytes, size: int) -> bytes:
    """Write a request and read its answer, through one open file."""
    path = _file(name)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise PlatformError(
            f"{path} may not be opened",
            id="sdk.seal.user",
            found=f"uid {os.geteuid()}: {error.strerror}",
            expected=f"uid {path.stat().st_uid}",
            remedy="seal as the container's application user",
        ) from None
    try:
        os.write(handle, request)
        return os.read(handle, size)
    finally:
        os.close(handle)


def _egetkey(request: KeyRequest) -> bytes:
    from ..sgx.codes import Status
    from ..sgx.keys import KeyRefused

    try:
        answer = _ask("egetkey", request.to_bytes(), 20)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise KeyRefused(
            "EGETKEY faults on the sealing policy",
            id="sgx.egetkey.keypolicy",
            found=f"KEYPOLICY {request.key_policy:#x}",
            remedy="only enclaves with key separation and sharing (ATTRIBUTES.KSS) have policies besides mrenclave "
            "and mrsigner",
        ) from None
    status = Status(int.from_bytes(answer[:4], "little"))
    if status:
        event = status.name.removeprefix("SGX_INVALID_").lower()
        raise KeyRefused(f"EGETKEY answered {status.name}", id=f"sgx.egetkey.{event}")
    return answer[4:]


def _counter(operation: str, owner: str, name: str, *more: str) -> Counter:
    """Ask about a counter.

    Raises:
        FileNotFoundError: there is none.
        OSError: ESTALE, ERANGE.
    """
    from ..tee.base import Counter

    try:
        answer = _ask("counter", " ".join((operation, owner, name, *more)).encode(), 128)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UsageError(
                "not a counter's name",
                id="sdk.seal.counter.name",
                found=name[:80],
                expected="1 to 64 letters, digits, dots, dashes and underscores",
            ) from None
        if error.errno in (errno.ENOSPC, errno.EOVERFLOW, errno.EIO):
            raise ResourceError(
                f"the platform cannot change the monotonic counter {name}",
                id="sdk.seal.counter.full",
                found=error.strerror,
                remedy="destroy counters that are not used any more, and look at the host's disk and runelet.log",
            ) from None
        raise
    if not answer:
        return Counter(bytes(16))
    id, value, confirmed = answer.split()
    return Counter(bytes.fromhex(id.decode()), int(value), int(confirmed))


def _next(owner: str, name: str) -> CounterNumber:
    from ..sgx.sealing import CounterNumber

    try:
        found = _counter("increment", owner, name)
    except FileNotFoundError:
        try:
            _counter("create", owner, name)
        except FileExistsError:
            pass  # another process was quicker
        found = _counter("increment", owner, name)
    return CounterNumber(name, found.id, found.value)


def _confirm(sealed: Sealed) -> None:
    number = sealed.counter
    if number is None:
        return
    from ..sgx.sealing import owner

    try:
        state = _counter("confirm", owner(sealed.policy), number.name, number.id.hex(), str(number.value))
    except FileNotFoundError:
        sealed.check_counter(bytes(16), 0)
        raise
    except OSError as error:
        if error.errno == errno.ESTALE:
            current = _counter("read", owner(sealed.policy), number.name)
            sealed.check_counter(current.id, current.confirmed)
        elif error.errno == errno.ERANGE:
            raise IntegrityError(
                f"the monotonic counter {number.name} is behind the data that were sealed under it",
                id="sdk.seal.counter.behind",
                found=f"counter {number.value} in the data",
                remedy="the platform's own state was rolled back: these data cannot be shown to be the newest",
            ) from None
        raise
    sealed.check_counter(state.id, state.confirmed)

"""Secrets of the enclave that this process runs in.

::

    from inclavare.sdk import secret

    key = secret.get("kbs:///default/key/app")     # what the key broker releases to this enclave
    key = secret.get("default/key/app")            # the same
    key = secret.get("data-key")                   # what its owner released with `inclavare secret get`

What the manifest names is there before the application starts, in ``/dev/attestation/secrets``; it is the newest value
each time. For anything else the key broker is asked, through Confidential Containers' interface on 127.0.0.1:8006.
"""

from __future__ import annotations

import time

from ..enclave.kbs_uri import Resource
from ..errors import AppraisalError, PlatformError, UsageError
from . import attest

#: Confidential Containers' in-guest interface.
GUEST_API = ("127.0.0.1", 8006)
#: Seconds: for an answer; for the interface to come up beside an application that has just been started.
_TIMEOUT, _STARTING = 30.0, 2.0
_MAX_SECRET = 1 << 20


def get(name: str) -> bytes:
    """A secret.

    Args:
        name: a ``kbs://`` URI, ``repository/type/tag``, or the name under which it was released to this enclave.

    Raises:
        PlatformError: ``sdk.secret.absent``: nothing was released under this name; ``sdk.secret.unavailable``: the key
            broker cannot be asked; or this process does not run in an enclave.
        AppraisalError: ``sdk.secret.denied``: the key broker does not release it to this enclave.
        UsageError: not a name.
    """
    if "/" not in name:
        found = attest.secret(_file_name(name))
        if found is None:
            raise PlatformError(
                f"no secret {name} was released to this enclave",
                id="sdk.secret.absent",
                remedy=f"release it: inclavare secret get {name} --container ID",
            )
        return found
    resource = Resource.parse(name if "://" in name else f"kbs:///{name}")
    found = attest.secret(resource.name)
    return _ask(resource) if found is None else found


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or "\0" in name or len(name) > 128:
        raise UsageError("not a secret's name", id="sdk.secret.name", found=repr(name[:80]))
    return name


def _ask(resource: Resource) -> bytes:
    import http.client

    if resource.plugin != "resource":
        raise PlatformError(
            "Confidential Containers' interface has no resources of plugins",
            id="sdk.secret.unavailable",
            found=f"kbs+{resource.plugin}",
            remedy="name it in [[secrets]] in enclave.toml and build the image again",
        )
    until = time.monotonic() + _STARTING
    while True:
        connection = http.client.HTTPConnection(*GUEST_API, timeout=_TIMEOUT)
        try:
            connection.request("GET", "/cdh/" + resource.request_path)
            answer = connection.getresponse()
            body = answer.read(_MAX_SECRET + 1)
            break
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise _unavailable("nobody listens on 127.0.0.1:8006") from None
            time.sleep(0.05)
        except (OSError, http.client.HTTPException) as error:
            raise _unavailable(str(error)) from None
        finally:
            connection.close()
    if answer.status == 200 and len(body) <= _MAX_SECRET:
        return body
    said = body[:2000].decode(errors="replace")
    if answer.status == 403:
        raise AppraisalError("the key broker does not release it to this enclave", id="sdk.secret.denied", found=said)
    raise _unavailable(said)


def _unavailable(found: str) -> PlatformError:
    return PlatformError(
        "the key broker cannot be asked",
        id="sdk.secret.unavailable",
        found=found,
        expected="[attestation] verdictd in enclave.toml, and a network namespace of the container's own",
        remedy="see the runelet's log",
    )

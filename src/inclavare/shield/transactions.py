"""Files of ``/dev/attestation`` that answer requests: write one, read its answer through the same open file.

``egetkey``
    A KEYREQUEST of 512 bytes in one write. The answer is RAX as EGETKEY leaves it (4 bytes, little-endian; 0 is
    success) and the key (16 bytes, zeros with an error). A request for which EGETKEY faults is EINVAL.

``counter``
    Words in one write: ``create``, ``read``, ``increment`` or ``destroy``, the owner (``mrenclave`` or ``mrsigner``)
    and the counter's name; or ``confirm``, owner, name, id and number. The answer is a line with the counter's id (32
    hexadecimal digits), its number and the highest confirmed number; nothing for ``destroy``. ENOENT: there is none;
    EEXIST: there is one already; ESTALE: the id is another's; ERANGE: the number was not given out; EOVERFLOW: no more
    numbers; ENOSPC: too many counters, or no room; EINVAL: not a request.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..errors import InclavareError, UsageError
from ..sgx.keys import KeyRefused
from ..sgx.structs import StructureError
from ..tee.base import Counters
from .fuse import FuseError

KEY_SIZE = 16

_ERRORS = {
    "tee.counter.unknown": errno.ENOENT,
    "tee.counter.exists": errno.EEXIST,
    "tee.counter.stale": errno.ESTALE,
    "tee.counter.ahead": errno.ERANGE,
    "tee.counter.end": errno.EOVERFLOW,
    "tee.counter.many": errno.ENOSPC,
    "tee.state.write": errno.ENOSPC,
}


def egetkey(call: Callable[[bytes], bytes], request: bytes) -> bytes:
    """Answer a KEYREQUEST: 20 bytes.

    Raises:
        FuseError: EINVAL.
    """
    try:
        return bytes(4) + call(request)
    except KeyRefused as error:
        if error.status is None:
            raise FuseError(errno.EINVAL) from None
        return error.status.to_bytes(4, "little") + bytes(KEY_SIZE)
    except StructureError:
        raise FuseError(errno.EINVAL) from None


def counter(counters: Counters, request: bytes) -> bytes:
    """Answer a request about a monotonic counter.

    Raises:
        FuseError: see the module.
    """
    try:
        operation, owner, name, *more = request.decode("ascii").split()
        if operation == "confirm":
            id, value = more
            found = counters.confirm(owner, name, bytes.fromhex(id), int(value))
        elif more:
            raise ValueError
        elif operation == "destroy":
            counters.destroy(owner, name)
            return b""
        else:
            call = {"create": counters.create, "read": counters.read, "increment": counters.increment}[operation]
            found = call(owner, name)
    except (ValueError, KeyError):
        raise FuseError(errno.EINVAL) from None
    except InclavareError as error:
        code = _ERRORS.get(error.id, errno.EINVAL if isinstance(error, UsageError) else None)
        if code is None:
            raise  # a fault of the platform, which is logged
        raise FuseError(code) from None
    return f"{found.id.hex()} {found.value} {found.confirmed}\n".encode()

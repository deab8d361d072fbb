"""What keeps one client or tenant from taking the service away from the others. Each process counts for itself."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

#: Clients and tenants that are counted at once; the one that was quiet for longest is forgotten first.
MAX_COUNTED = 10_000


class Rate:
    """So many requests a minute for each name, and as many at once.

    Args:
        clock: seconds, monotonic.
        counted: names that are remembered; a forgotten one begins anew.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, counted: int = MAX_COUNTED) -> None:
        self._clock = clock
        self._counted = counted
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, name: str, per_minute: int) -> float:
        """Take one request: 0 if there is one left, else seconds until the next one."""
        now = self._clock()
        left, since = self._left.pop(name, (float(per_minute), now))
        left = min(float(per_minute), left + (now - since) * per_minute / 60)
        allowed = left >= 1
        self._left[name] = (left - 1 if allowed else left, now)
        if len(self._left) > self._counted:
            self._left.popitem(last=False)
        if allowed:
            return 0.0
        return (1 - left) * 60 / per_minute if per_minute else 60.0


def client_key(host: str) -> str:
    """What a client is counted as: its IPv4 address, or its IPv6 network (/64), of which one client has all."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)


class Gate:
    """So much work waiting or under way; more is sent away at once instead of waiting for ever.

    Used from one event loop.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    @property
    def inside(self) -> int:
        """How much there is now."""
        return self._inside

    def enter(self) -> bool:
        """Whether there is room; if so, call :meth:`leave` at the end."""
        if self._inside >= self._limit:
            return False
        self._inside += 1
        return True

    def leave(self) -> None:
        """Make room."""
        self._inside -= 1

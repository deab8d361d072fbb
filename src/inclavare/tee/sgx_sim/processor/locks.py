"""Concurrency: what a leaf function holds while it runs, and what another then may not touch (SDM vol. 3D, 40.1.4).

Each leaf's reference has tables of its operands' concurrency: the page itself, and three further resources that only
certain leaves contend for. Here leaves run one after another, so none holds anything when the next begins; a test (or
an emulator that suspends a leaf) holds a resource with :meth:`Locks.held` on another logical processor's behalf.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


class Resource(Enum):
    """What is contended for."""

    #: The EPC page and its EPCM entry: "base concurrency restrictions".
    PAGE = "page"
    #: The page against EACCEPT, EACCEPTCOPY, EMODPE, EMODPR and EMODT.
    MODIFICATION = "modification"
    #: An SECS's MRENCLAVE and initialised state, against EADD, EEXTEND and EINIT.
    MEASUREMENT = "measurement"
    #: An SECS's tracking facility, against ETRACK and ETRACKC.
    TRACKING = "tracking"


class Access(Enum):
    """How a leaf uses it."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Locks:
    """Who holds what."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, Resource], list[Access]] = {}

    @contextmanager
    def held(self, page: int, access: Access, resource: Resource = Resource.PAGE) -> Iterator[None]:
        """Hold the resource of EPC page number ``page``."""
        holders = self._held.setdefault((page, resource), [])
        holders.append(access)
        try:
            yield
        finally:
            holders.remove(access)

    def free(self, page: int, access: Access, resource: Resource = Resource.PAGE) -> bool:
        """Whether the resource can be had: shared with sharers, exclusively only if nobody holds it."""
        holders = self._held.get((page, resource), ())
        return not holders if access is Access.EXCLUSIVE else Access.EXCLUSIVE not in holders

"""A software SGX processor: EPC and EPCM, every leaf of ENCLS and ENCLU, access control, enclave entry and exit.

:class:`Processor` is the package, :class:`LogicalProcessor` one hardware thread of it, :class:`AddressSpace` the page
tables and ordinary memory of the untrusted side, :class:`Driver` what an operating system does with them. The leaves
follow the pseudo-code of the Intel SDM, volume 3D, check by check; see ``rules.py`` for those that do not touch pages.

What is not modelled: 32-bit mode, CET, virtualisation (EPC oversubscription from within a guest), debug exceptions,
performance monitoring.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .driver import Driver, EnclavePage, LoadedEnclave
    from .epcm import EpcmEntry
    from .events import Event, Kind
    from .faults import Fault, GeneralProtection, InvalidOpcode, LeafError, PageFault
    from .locks import Access, Locks, Resource
    from .logical import LogicalProcessor, Translation
    from .processor import Processor
    from .registers import Registers
    from .rules import Features
    from .space import AddressSpace

__all__ = [
    "Access",
    "AddressSpace",
    "Driver",
    "EnclavePage",
    "EpcmEntry",
    "Event",
    "Fault",
    "Features",
    "GeneralProtection",
    "InvalidOpcode",
    "Kind",
    "LeafError",
    "LoadedEnclave",
    "Locks",
    "LogicalProcessor",
    "PageFault",
    "Processor",
    "Registers",
    "Resource",
    "Translation",
]

_WHERE = {
    "driver": ("Driver", "EnclavePage", "LoadedEnclave"),
    "epcm": ("EpcmEntry",),
    "events": ("Event", "Kind"),
    "faults": ("Fault", "GeneralProtection", "InvalidOpcode", "LeafError", "PageFault"),
    "locks": ("Access", "Locks", "Resource"),
    "logical": ("LogicalProcessor", "Translation"),
    "processor": ("Processor",),
    "registers": ("Registers",),
    "rules": ("Features",),
    "space": ("AddressSpace",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> object:
    """Names are imported when they are asked for: the container path needs ``rules`` only, and starts quickly."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)

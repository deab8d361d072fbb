"""The interface between a TEE platform and everything above it.

A platform is one module in this package; nothing above learns its name. Look it up with :func:`platform`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..config import Config
from ..errors import PlatformError, UsageError
from ..sgx.image import EnclaveImage


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a platform can be used on this machine, and if not, why and what would help."""

    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Counter:
    """A monotonic counter's state.

    Attributes:
        id: 16 random bytes, drawn when it was made: one that is destroyed and made again is another.
        value: the highest number that :meth:`Counters.increment` has given out.
        confirmed: the highest number that :meth:`Counters.confirm` was told; never above ``value``.
    """

    id: bytes
    value: int = 0
    confirmed: int = 0


class Counters(Protocol):
    """Monotonic counters of one enclave; every change is durable before a method returns.

    A counter is found by its owner and its name. ``owner`` is ``mrenclave`` (this very enclave) or ``mrsigner`` (every
    enclave of its signer), each with this product id and DEBUG attribute, as for seal keys: whoever may derive the key,
    of whatever security version, may use the counter. A name is 1 to 64 letters, digits, dots, dashes and underscores.

    Raises:
        UsageError: ``tee.counter.name`` or ``.owner``, malformed; ``.unknown``, there is none; ``.exists``.
        ResourceError: ``tee.counter.many``, or the state cannot be written.
    """

    def create(self, owner: str, name: str) -> Counter:
        """A new counter at 0."""

    def read(self, owner: str, name: str) -> Counter:
        """Its state."""

    def increment(self, owner: str, name: str) -> Counter:
        """Give out the next number, once."""

    def confirm(self, owner: str, name: str, id: bytes, value: int) -> Counter:
        """What bears this number is stored: ``confirmed`` becomes at least ``value``.

        Raises:
            UsageError: ``tee.counter.stale``: ``id`` is of a counter that was destroyed; ``tee.counter.ahead``:
                ``value`` was never given out.
        """

    def destroy(self, owner: str, name: str) -> None:
        """Remove it; its id never comes back."""


class Enclave(Protocol):
    """An initialised enclave (EINIT succeeded). Its EPC pages are held until :meth:`destroy`."""

    @property
    def mrenclave(self) -> bytes:
        """32 bytes."""

    @property
    def mrsigner(self) -> bytes:
        """32 bytes."""

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG."""

    @property
    def epc_pages(self) -> int:
        """4096-byte pages in use, the SECS included."""

    def target_info(self) -> bytes:
        """This enclave's own TARGETINFO, 512 bytes, for reports that it is to verify."""

    def report(self, target_info: bytes, report_data: bytes) -> bytes:
        """EREPORT: 512 and 64 bytes in, 432 bytes out."""

    def egetkey(self, request: bytes) -> bytes:
        """EGETKEY: a 512-byte KEYREQUEST in, a 16-byte key out.

        Raises:
            PolicyError: ``sgx.egetkey.*``: the processor refuses the request.
            IntegrityError: it is not a KEYREQUEST (a reserved byte is not zero), for which EGETKEY faults.
        """

    def seal_key(self, policy: str) -> bytes:
        """EGETKEY for the seal key, 16 bytes; ``policy`` is ``mrenclave`` or ``mrsigner``."""

    @property
    def counters(self) -> Counters | None:
        """Its monotonic counters; ``None`` where the platform offers none, as SGX hardware under Linux does not."""

    def destroy(self) -> None:
        """EREMOVE every page and give the EPC back. Idempotent."""


class Platform(Protocol):
    """A provider of enclaves."""

    #: The name in manifests and policies: ``sgx`` or ``sgx-sim``.
    name: str
    #: True where evidence of this platform proves nothing about hardware.
    simulated: bool

    def probe(self) -> Availability:
        """Whether enclaves can be loaded here. Cheap, no side effects."""

    def load(self, image: EnclaveImage, sigstruct: bytes, *, label: str) -> Enclave:
        """ECREATE, EADD, EEXTEND and EINIT.

        Args:
            image: the pages.
            sigstruct: 1808 bytes.
            label: whom the EPC pages are accounted to (a container id), for ``doctor`` and error messages.

        Raises:
            ResourceError: the EPC is full.
            IntegrityError: EINIT refused the SIGSTRUCT (signature, ENCLAVEHASH, attributes, masks).
            PlatformError: the platform is not usable.
        """

    def quote_target_info(self) -> bytes:
        """TARGETINFO of the quoting enclave, 512 bytes."""

    def quote(self, report: bytes) -> bytes:
        """A quote over a 432-byte REPORT that is targeted at the quoting enclave."""

    def collateral(self) -> dict[str, Any]:
        """The collateral for this platform's quotes, in dcap-qvl's JSON layout (``pck_crl`` … ``tcb_info``)."""

    def root_ca(self) -> bytes:
        """The platform's root CA certificate, DER."""

    def reclaim(self) -> None:
        """Free what owners held who were killed. Cheap; the next load would do the same."""


#: Values of ``ENCLAVE_TYPE`` and ``enclave.type`` besides the platforms' own names.
ALIASES = {"intelSgx": "sgx", "intelsgx": "sgx"}

NAMES = ("sgx", "sgx-sim")


def canonical_name(value: str) -> str:
    """The platform's name for a value of ``ENCLAVE_TYPE``.

    Raises:
        UsageError: no such platform.
    """
    name = ALIASES.get(value, value)
    if name not in NAMES:
        raise UsageError(
            f"unknown enclave type {value!r}",
            id="tee.type.unknown",
            expected="intelSgx (hardware) or sgx-sim (software, for development)",
            remedy="set ENCLAVE_TYPE to one of these, or unset it for an ordinary container",
        )
    return name


def platform(name: str, config: Config) -> Platform:
    """The platform of that name (see :func:`canonical_name`), usable or not.

    Raises:
        UsageError: no such platform.
    """
    from importlib import import_module

    module = import_module(f".{canonical_name(name).replace('-', '_')}", __package__)
    make: Callable[[Config], Platform] = module.create
    return make(config)


def reclaim(config: Config) -> None:
    """Free what killed owners held, on every platform."""
    for name in NAMES:
        platform(name, config).reclaim()


def usable_platform(name: str, config: Config) -> Platform:
    """Like :func:`platform`, but refuses one that cannot load enclaves here.

    Raises:
        PlatformError: with the reason and the remedy. Never falls back to another platform.
    """
    found = platform(name, config)
    availability = found.probe()
    if not availability.usable:
        raise PlatformError(
            f"enclave type {name} cannot be used on this machine",
            id="tee.platform.unusable",
            found=availability.reason,
            remedy=availability.remedy,
        )
    return found

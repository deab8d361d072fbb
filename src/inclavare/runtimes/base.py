"""The interface of an enclave runtime. Nothing else branches on a runtime's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from ..enclave.manifest import Manifest
from ..enclave.tree import Tree
from ..errors import UsageError
from ..sgx.image import EnclaveImage
from ..shield.root import Places
from ..shield.secrets import SecretStore
from ..tee.base import Enclave, Platform


@dataclass(frozen=True, slots=True)
class Container:
    """What a runtime is given to start a container.

    Attributes:
        id: container id.
        manifest: what was measured.
        config: OCI configuration as admitted (see :mod:`inclavare.runelet.admission`); not to be changed.
        tree: the measured file tree, root checked.
        contents: file descriptor of the host directory with the image's files.
        places: the container's directories, made.
        on_violation: called with a path and a reason when the host's files differ from the tree.
        on_fault: called with an unexpected exception of a serving thread.
    """

    id: str
    manifest: Manifest
    config: dict[str, Any]
    tree: Tree
    contents: int
    places: Places
    on_violation: Callable[[str, str], None]
    on_fault: Callable[[BaseException], None]


class Broker(Protocol):
    """The way to the key broker that the manifest names; errors carry the broker's reasons."""

    def provision(self, store: SecretStore) -> None:
        """Put the manifest's secrets into the store, under :attr:`inclavare.enclave.kbs_uri.Resource.name`.

        Raises:
            InclavareError: a required one was not released.
        """

    def volume_key(self, uri: str, path: str) -> bytes:
        """The key of the encrypted volume at ``path``.

        Raises:
            InclavareError: it was not released.
        """


class Session(Protocol):
    """A prepared container; it serves until :meth:`close`."""

    #: Secrets that relying parties released to this enclave.
    secrets: SecretStore

    def configure(self) -> dict[str, Any]:
        """The OCI configuration that the low-level runtime is to run."""

    def processes(self) -> list[int]:
        """Helper processes; if one ends, the enclave is broken and the container must end."""

    def close(self) -> None:
        """Unmount, end the helpers, wipe keys. Idempotent; does not destroy the enclave."""


class EnclaveRuntime(Protocol):
    """One enclave runtime."""

    name: str

    def check(self, platform: Platform) -> None:
        """Refuse a platform on which this runtime would not protect the application; before anything is begun.

        Raises:
            PlatformError: with the reason.
        """

    def image(self, manifest: Manifest, tree_root: bytes) -> EnclaveImage:
        """What is measured: the enclave's pages for a manifest and a 32-byte tree root."""

    def prepare(self, container: Container) -> Any:
        """Begin what takes long and needs no enclave yet; the result goes to :meth:`start`, or to :meth:`abandon`."""

    def start(
        self, container: Container, enclave: Enclave, platform: Platform, prepared: Any, broker: Broker | None
    ) -> Session:
        """Make everything that the container needs, its secrets included.

        Args:
            broker: ``None`` where the manifest names none; a runtime whose LibOS fetches its secrets itself leaves it.

        Raises:
            InclavareError: it cannot be made; nothing is left behind.
        """

    def abandon(self, prepared: Any) -> None:
        """Take back what :meth:`prepare` began, where the start failed before :meth:`start`."""


NAMES = ("native",)


def runtime(name: str) -> EnclaveRuntime:
    """The runtime of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(
            f"enclave runtime {name!r} is not available",
            id="runtime.name.unknown",
            expected=", ".join(NAMES),
            remedy="correct [enclave] runtime in enclave.toml and build the image again",
        )
    module = import_module(f".{name}", __package__)
    found: EnclaveRuntime = module.RUNTIME
    return found

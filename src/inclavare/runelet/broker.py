"""What the manifest wants from its key broker: secrets and volume keys before the start, newer values after it.

The host can keep the broker away from the enclave, and nothing else: it can neither read what is released nor put
something in its place (:mod:`inclavare.attestation.kbs_client`). Which broker, which anchor and which secrets is
measured; nothing of it comes from the container's configuration.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..enclave.kbs_uri import Resource
from ..enclave.manifest import Manifest, Secret
from ..errors import InclavareError, PlatformError, UsageError
from ..log import EventLog
from ..shield.secrets import SecretStore
from ..tee.base import Enclave, Platform

if TYPE_CHECKING:
    from ..attestation.kbs_client import KbsClient

#: Seconds until the broker is asked again after it could not be reached, or accepted this enclave no more.
_RETRY = 30.0
_SHORTEST = 1.0
#: Directories that are the kernel's or the enclave runtime's own.
_NO_PLACES = ("/dev/attestation", "/proc", "/sys")


def check(manifest: Manifest) -> None:
    """Refuse a manifest that requires secrets and says nobody who has them; before anything is begun.

    Raises:
        PlatformError: ``runelet.secret.unavailable``.
        UsageError: ``kbs.uri`` or ``runelet.secret.place``.
    """
    _check_places(manifest)
    required = [secret.uri for secret in manifest.secrets if secret.required]
    required += [volume.key for volume in manifest.files.encrypted if volume.key.startswith("kbs")]
    for uri in (*required, *(secret.uri for secret in manifest.secrets)):
        Resource.parse(uri)
    if required and not manifest.attestation.verdictd:
        raise PlatformError(
            f"the manifest requires {required[0]} before the start, and names no key broker",
            id="runelet.secret.unavailable",
            expected="[attestation] verdictd and trust_anchor in enclave.toml",
            remedy="name it and build again, or set required = false and release the secret with `inclavare secret get`"
            " after the start",
        )


def _check_places(manifest: Manifest) -> None:
    """Each secret needs a place of its own.

    Raises:
        UsageError: ``runelet.secret.place``.
    """
    taken: dict[str, str] = {}
    for secret in manifest.secrets:
        place, why = secret.path or secret.env, ""
        if place in taken:
            why = f"{taken[place]} is to be there, too"
        elif secret.path and any(place.startswith(f"{other}/") or other.startswith(f"{place}/") for other in taken):
            why = "one secret's file cannot lie below another's"
        elif secret.path and any(f"{place}/".startswith(f"{top}/") for top in _NO_PLACES):
            why = "nothing can be placed there"
        elif secret.path and manifest.process.args[:1] == (place,):
            why = "it is the program that is started"
        if why:
            raise UsageError(
                f"the secret {secret.uri} cannot go to {place}: {why}",
                id="runelet.secret.place",
                found=place,
                expected="a place of its own",
                remedy="correct path or env of [[secrets]] in enclave.toml and build again",
            )
        taken[place] = secret.uri


class EnclaveAttester:
    """Quotes for one enclave (see :class:`inclavare.attestation.kbs_client.Attester`)."""

    def __init__(self, enclave: Enclave, platform: Platform) -> None:
        self._enclave = enclave
        self._platform = platform
        # A platform object is one thread's at a time.
        self._lock = threading.Lock()

    @property
    def tee(self) -> str:
        """The platform's name."""
        return self._platform.name

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes of report data."""
        with self._lock:
            return self._platform.quote(self._enclave.report(self._platform.quote_target_info(), report_data))

    def collateral(self) -> dict[str, Any]:
        """Collateral for these quotes."""
        with self._lock:
            return self._platform.collateral()


class Broker:
    """One enclave's way to its key broker. No client is imported, and nobody is asked, before something is needed.

    Args:
        manifest: with ``[attestation] verdictd``.
        attester: of the enclave.
        log: events ``secret.*``; never a value.
    """

    def __init__(self, manifest: Manifest, attester: EnclaveAttester, log: EventLog) -> None:
        self._manifest = manifest
        self.attester = attester
        self._log = log
        self._client: KbsClient | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._said: dict[str, str] = {}

    def fetch(self, uri: str) -> bytes:
        """What a ``kbs://`` URI names.

        Raises:
            InclavareError: see :meth:`inclavare.attestation.kbs_client.KbsClient.get`.
        """
        return self._connected().get(uri)

    def fresh_client(self) -> KbsClient:
        """Another client, with a key of its own.

        Raises:
            UsageError: ``kbs.url`` or ``kbs.trust_anchor``.
        """
        from ..attestation.kbs_client import KbsClient

        section = self._manifest.attestation
        return KbsClient(
            section.verdictd, section.trust_anchor, self.attester, tee=self.attester.tee, policy=section.policy
        )

    def volume_key(self, uri: str, path: str) -> bytes:
        """The key of an encrypted volume.

        Raises:
            InclavareError: it was not released; says for which volume.
        """
        try:
            return self.fetch(uri)
        except InclavareError as error:
            self._refused(uri, error, "error")
            raise _about(f"the key {uri} of the volume {path} was not released", error) from None

    def provision(self, store: SecretStore) -> None:
        """Fetch the manifest's secrets; one that is not required may stay away.

        Raises:
            InclavareError: a required one was not released; carries the broker's reasons.
            UsageError: ``runelet.secret.env``: a value that no environment variable can have.
        """
        broken: InclavareError | None = None
        # Required ones first, so that a refusal comes soon.
        for secret in sorted(self._manifest.secrets, key=lambda secret: not secret.required):
            try:
                if broken is not None:
                    raise broken
                value = self.fetch(secret.uri)
            except InclavareError as error:
                self._refused(secret.uri, error, "error" if secret.required else "warning")
                if secret.required:
                    what = f"the secret {secret.uri} is required before the start and was not released"
                    raise _about(what, error) from None
                if error.id != "kbs.resource.denied":
                    broken = error  # it is about the broker, not about this resource: no need to wait for it again
                continue
            if secret.env:
                _check_env(secret, value)
            store.put(Resource.parse(secret.uri).name.encode(), value)
            self._log.event("secret.released", uri=secret.uri)

    def keep_fresh(self, store: SecretStore) -> None:
        """Fetch the secrets again whenever the broker's decision runs out; changed values replace the old ones."""
        if self._manifest.secrets:
            self._thread = threading.Thread(target=self._refresh, args=(store,), name="secrets", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._ended.set()

    def _refresh(self, store: SecretStore) -> None:
        import random

        while True:
            client = self._client
            remaining = _RETRY if client is None else max(_SHORTEST, client.remaining or _RETRY)
            # Spread, so that containers that were started together do not ask together.
            if self._ended.wait(remaining * random.uniform(0.9, 1.0)):  # noqa: S311
                return
            try:
                self._connected().forget()
                for secret in self._manifest.secrets:
                    if self._renew(secret, store):
                        break
            except Exception as error:  # the next round may succeed; the values that are there stay
                self._log.event("secret.refresh.fault", level="error", reason=type(error).__name__)

    def _renew(self, secret: Secret, store: SecretStore) -> bool:
        """Fetch one again; whether there is no point in asking for more."""
        name = Resource.parse(secret.uri).name.encode()
        try:
            value = self.fetch(secret.uri)
        except InclavareError as error:
            self._refused(secret.uri, error, "warning")
            return error.id != "kbs.resource.denied"
        self._said.pop(secret.uri, None)
        if value != store.get(name) and not self._ended.is_set():
            store.put(name, value)
            self._log.event("secret.renewed", uri=secret.uri)
        return False

    def _refused(self, uri: str, error: InclavareError, level: str) -> None:
        """Said once, until it changes."""
        if self._said.get(uri) != error.id:
            self._said[uri] = error.id
            self._log.event("secret.refused", level=level, uri=uri, reason=error.id, found=error.found)

    def _connected(self) -> KbsClient:
        with self._lock:
            if self._client is None:
                self._client = self.fresh_client()
            return self._client


def _check_env(secret: Secret, value: bytes) -> None:
    try:
        fits = "\0" not in value.decode()
    except UnicodeDecodeError:
        fits = False
    if not fits:
        raise UsageError(
            f"the secret {secret.uri} cannot be the value of the environment variable {secret.env}",
            id="runelet.secret.env",
            expected="UTF-8 text without NUL",
            remedy="give it a path instead of env in enclave.toml, or store it as text",
        )


def _about(what: str, error: InclavareError) -> InclavareError:
    return type(error)(
        f"{what}: {error.message}", id=error.id, found=error.found, expected=error.expected, remedy=error.remedy
    )

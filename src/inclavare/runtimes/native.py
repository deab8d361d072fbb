"""The ``native`` runtime: the application runs on the host's kernel, inside what the runelet shields.

There is no LibOS. The measured tree is its root, what it writes is encrypted, and the enclave's keys and reports reach
it through ``/dev/attestation``. The application's own memory is not enclave memory: on ``sgx-sim`` this protects
against other users and against changed images, not against the host's root (docs/threat-model.md).
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..enclave.image import native_image
from ..enclave.image import runtime_digest as _runtime_digest
from ..enclave.manifest import Manifest
from ..errors import PlatformError
from ..sgx.image import EnclaveImage
from ..shield import mounts
from ..shield.attestfs import AttestFs, EnclaveCalls
from ..shield.encrypted import KEY_SIZE, EncryptedDirectory
from ..shield.root import ShieldedRoot
from ..shield.secrets import Secret, SecretStore
from ..tee.base import Enclave, Platform
from .base import Broker, Container

ATTESTATION = "/dev/attestation"


class NativeRuntime:
    """See the module."""

    name = "native"

    def check(self, platform: Platform) -> None:
        """Refuse hardware: the application would not run in the enclave.

        Raises:
            PlatformError: ``runtime.native.hardware``.
        """
        if not platform.simulated:
            raise PlatformError(
                "the native enclave runtime protects nothing on SGX hardware",
                id="runtime.native.hardware",
                found="an application that would run beside its enclave, in memory that the host can read",
                expected="an enclave runtime with code in the enclave (gramine, occlum), which this version lacks",
                remedy="use enclave type sgx-sim for development",
            )

    def image(self, manifest: Manifest, tree_root: bytes) -> EnclaveImage:
        """Header, manifest, threads and heap; see docs/formats.md."""
        return native_image(manifest, tree_root, _runtime_digest())

    def prepare(self, container: Container) -> EncryptedDirectory:
        """Start gocryptfs under a key that is drawn here and lives nowhere else."""
        places = container.places
        places.make()
        key = Secret(os.urandom(KEY_SIZE))
        try:
            return EncryptedDirectory.start(places.cipher, places.layer, key)
        finally:
            key.wipe()

    def abandon(self, prepared: EncryptedDirectory) -> None:
        """Stop gocryptfs."""
        prepared.stop()

    def start(
        self,
        container: Container,
        enclave: Enclave,
        platform: Platform,
        prepared: EncryptedDirectory,
        broker: Broker | None,
    ) -> NativeSession:
        """Fetch the secrets; mount root, volumes and ``/dev/attestation``."""
        session = NativeSession(container, SecretStore(), [prepared])
        try:
            if broker is not None:
                broker.provision(session.secrets)
            session.root = ShieldedRoot.mount(
                container.places,
                container.tree,
                container.contents,
                prepared,
                on_violation=container.on_violation,
                on_fault=container.on_fault,
            )
            for number, entry in enumerate(container.manifest.files.encrypted):
                session.add_volume(number, entry.path, _volume_key(entry.path, entry.key, enclave, broker))
            session.serve_attestation(enclave, platform)
        except BaseException:
            session.close()
            raise
        return session


@dataclass(slots=True)
class NativeSession:
    """A prepared container of the native runtime."""

    container: Container
    secrets: SecretStore
    encrypted: list[EncryptedDirectory]
    root: ShieldedRoot | None = None
    attestation: AttestFs | None = None
    volumes: dict[str, Path] = field(default_factory=dict)

    def add_volume(self, number: int, path: str, secret: Secret) -> None:
        """Mount an encrypted volume: its ciphertext is the host's bind mount for that path, else this start's scratch.

        Args:
            secret: 32 bytes; wiped.
        """
        places = self.container.places
        source = next((m.get("source") for m in self.container.config["mounts"] if m["destination"] == path), None)
        cipher = places.cipher / f"volume-{number}" if source is None else Path(source)
        point = places.volumes / str(number)
        try:
            if source is None:
                cipher.mkdir(mode=0o700)
            point.mkdir(mode=0o700)
            directory = EncryptedDirectory.start(cipher, point, secret)
        finally:
            secret.wipe()
        self.encrypted.append(directory)
        directory.wait()
        self.volumes[path] = point

    def serve_attestation(self, enclave: Enclave, platform: Platform) -> None:
        """Mount ``/dev/attestation``.

        Raises:
            PlatformError: the mount failed.
        """

        def quote(report_data: bytes) -> bytes:
            return platform.quote(enclave.report(platform.quote_target_info(), report_data))

        user = (self.container.config.get("process") or {}).get("user") or {}
        self.attestation = AttestFs(
            EnclaveCalls(
                my_target_info=enclave.target_info,
                report=enclave.report,
                quote=quote,
                collateral=lambda: json.dumps(platform.collateral()).encode(),
                seal_key=enclave.seal_key,
                egetkey=enclave.egetkey,
                counters=enclave.counters,
            ),
            self.secrets,
            owner=(int(user.get("uid", 0)), int(user.get("gid", 0))),
            on_fault=self.container.on_fault,
        )
        try:
            self.attestation.mount(str(self.container.places.attestation))
        except OSError as error:
            raise PlatformError(
                f"{ATTESTATION} could not be mounted: {error.strerror}",
                id="runtime.attestation.mount",
                remedy="load the fuse module and make sure that /dev/fuse exists (inclavare doctor)",
            ) from None

    def configure(self) -> dict[str, Any]:
        """The admitted configuration on the shielded root, with the volumes and ``/dev/attestation``."""
        config = copy.deepcopy(self.container.config)
        config["ociVersion"] = "1.0.2"  # what every low-level runtime knows
        config["root"]["path"] = str(self.container.places.root)
        asked = {mount["destination"]: mount.get("options") or [] for mount in config.get("mounts", [])}
        mounts_out = [mount for mount in config.get("mounts", []) if mount["destination"] not in self.volumes]
        for path, point in self.volumes.items():
            read_only = ["ro"] if {"ro", "rro"} & set(asked.get(path, ())) else []
            mounts_out.append(_bind(path, point, "nosuid", "nodev", *read_only))
        mounts_out.append(_bind(ATTESTATION, self.container.places.attestation, "nosuid", "nodev", "noexec"))
        config["mounts"] = mounts_out
        self._place_secrets(config)
        return config

    def _place_secrets(self, config: dict[str, Any]) -> None:
        """The files of ``/dev/attestation/secrets`` at the manifest's paths: never on a disk, renewed in place."""
        if not self.container.manifest.secrets:
            return
        from ..enclave.kbs_uri import Resource

        for secret in self.container.manifest.secrets:
            name = Resource.parse(secret.uri).name
            value = self.secrets.get(name.encode())
            if value is None:
                continue
            if secret.path:
                source = self.container.places.attestation / "secrets" / name
                config["mounts"].append(_bind(secret.path, source, "ro", "nosuid", "nodev", "noexec"))
            else:
                others = [entry for entry in config["process"]["env"] if not entry.startswith(f"{secret.env}=")]
                config["process"]["env"] = [*others, f"{secret.env}={value.decode()}"]

    def processes(self) -> list[int]:
        """The gocryptfs processes."""
        return [directory.pid for directory in self.encrypted]

    def close(self) -> None:
        """Unmount everything and wipe the secrets."""
        self.secrets.wipe()
        mounts.umount(str(self.container.places.attestation))
        for directory in self.encrypted[1:]:
            directory.stop()
        if self.root is not None:
            self.root.unmount()
            self.root = None
        else:
            self.encrypted[0].stop()
            for point in mounts.mounted_below(str(self.container.places.base)):
                mounts.umount(point)


def _volume_key(path: str, key: str, enclave: Enclave, broker: Broker | None) -> Secret:
    """The 32 bytes that an encrypted volume is kept under.

    Raises:
        PlatformError: ``runtime.volume.key``: the key's source cannot be used here.
        InclavareError: the key broker does not release it.
    """
    from hashlib import sha256

    policy = key.removeprefix("sealed:")
    if key != policy and policy in ("mrenclave", "mrsigner"):
        # Two volumes of one enclave must not share a key stream, so the path separates them.
        material = b"inclavare.volume.v1\0" + path.encode() + b"\0" + enclave.seal_key(policy)
    elif key == policy and broker is not None:
        # Without the path: its owner may have it mounted elsewhere in another enclave.
        value = broker.volume_key(key, path)
        if len(value) < KEY_SIZE:
            raise PlatformError(
                f"encrypted path {path}: {key} is no key",
                id="runtime.volume.key",
                found=f"{len(value)} bytes",
                expected=f"at least {KEY_SIZE} random bytes",
                remedy="store another key, for example from `openssl rand 32`",
            )
        material = b"inclavare.volume.kbs.v1\0" + value
    else:
        raise PlatformError(
            f"encrypted path {path}: the key {key} cannot be fetched",
            id="runtime.volume.key",
            expected="sealed:mrenclave, sealed:mrsigner, or a key broker in [attestation] verdictd",
            remedy="change [[files.encrypted]] key or [attestation] in enclave.toml",
        )
    return Secret(sha256(material).digest())


def _bind(destination: str, source: Path, *options: str) -> dict[str, Any]:
    access = [] if "ro" in options else ["rw"]
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", *access, *options]}


RUNTIME = NativeRuntime()

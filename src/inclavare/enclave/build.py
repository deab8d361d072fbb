"""Building an enclave image: manifest, file tree, MRENCLAVE, SIGSTRUCT, and all of it into ``/.inclavare/``."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UsageError
from ..sgx import measure as sgx_measure
from ..sgx.image import EnclaveImage
from ..sgx.sigstruct import mrsigner
from ..sgx.structs import Sigstruct
from ..tee.base import canonical_name
from . import oci, signing, stored, tree, users
from .image import runtime_digest
from .manifest import Manifest
from .paths import full_disk, write_atomically
from .programs import work_directory
from .reference import Reference

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: How to make the pages of an enclave from its manifest and tree root; the enclave runtime's business.
ImageMaker = Callable[[Manifest, bytes], EnclaveImage]


def derive_manifest(
    config: dict[str, Any],
    rootfs: Path,
    *,
    source: bytes = b"",
    source_name: str = "enclave.toml",
    tee: str | None = None,
    debug: bool | None = None,
) -> Manifest:
    """The complete manifest of an image: a person's ``enclave.toml`` over the image's own configuration.

    Args:
        config: ``config`` object of the OCI image configuration (Entrypoint, Cmd, Env, WorkingDir, User, Labels).
        rootfs: the unpacked image, by whose account files the user is resolved.
        source: the ``enclave.toml``, empty for none.
        source_name: its name, for errors.
        tee: the only TEE platform, instead of the manifest's.
        debug: instead of the manifest's.

    Raises:
        UsageError: the file or the image's configuration is wrong, no command is named, or the user is unknown.
    """

    def strings(key: str) -> list[str]:
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(
                f"the image's configuration is wrong: {key}",
                id="enclave.oci.config",
                found=repr(value)[:80],
                expected="a list of strings",
            )
        return value

    def string(key: str, default: str) -> str:
        value = config.get(key) or default
        if not isinstance(value, str):
            raise UsageError(
                f"the image's configuration is wrong: {key}", id="enclave.oci.config", found=repr(value)[:80]
            )
        return value

    env = dict(item.partition("=")[::2] for item in strings("Env"))
    labels = config.get("Labels")
    named = env.get("ENCLAVE_TYPE") or (labels.get("enclave.type") if isinstance(labels, dict) else None)
    base = Manifest().with_process(
        args=(*strings("Entrypoint"), *strings("Cmd")),
        env={name: value for name, value in env.items() if name and not name.startswith("ENCLAVE_")},
        cwd=posixpath.normpath("/" + string("WorkingDir", "/").lstrip("/")),
        user=string("User", "0"),
    )
    if named:
        base = base.with_enclave(tee=(canonical_name(str(named)),))
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source_name}: {error}", id="enclave.manifest.syntax", expected="UTF-8") from None
    manifest = Manifest.parse(text, source_name, base)
    if tee is not None:
        manifest = manifest.with_enclave(tee=(canonical_name(tee),))
    if debug is not None:
        manifest = manifest.with_enclave(debug=debug)
    manifest.require_args(source_name)
    root_fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return manifest.with_process(user=users.resolve(root_fd, manifest.process.user))
    finally:
        os.close(root_fd)


@dataclass(frozen=True, slots=True)
class Identity:
    """What an enclave is: manifest, file tree and the measurement over both.

    Attributes:
        manifest: complete.
        tree: the file tree.
        image: the pages.
        mrenclave: 32 bytes.
    """

    manifest: Manifest
    tree: tree.Tree
    image: EnclaveImage
    mrenclave: bytes


def measure(
    manifest: Manifest,
    rootfs: Path,
    image_of: ImageMaker,
    progress: oci.Progress,
    *,
    cache: tree.DigestCache | None = None,
) -> Identity:
    """Build the file tree and compute MRENCLAVE.

    Raises:
        UsageError: the root file system cannot be read, or the enclave is too small.
        IntegrityError: a file changed while it was read.
    """
    progress.stage("measuring files")
    files = tree.build(
        rootfs,
        cache=cache,
        progress=progress.advance,
        total=progress.total,
        trusted=manifest.files.trusted,
        allowed=manifest.files.allowed,
    )
    progress.stage("computing MRENCLAVE")
    image = image_of(manifest, files.root)
    return Identity(manifest, files, image, sgx_measure.measure(image))


@dataclass(frozen=True, slots=True)
class Built:
    """A finished enclave image.

    Attributes:
        identity: what was measured.
        sigstruct: 1808 bytes.
        mrsigner: 32 bytes.
        destination: where it was written.
    """

    identity: Identity
    sigstruct: bytes
    mrsigner: bytes
    destination: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary."""
        return {"destination": self.destination, **identity_dict(self.identity), "mrsigner": self.mrsigner.hex()}


def identity_dict(identity: Identity) -> dict[str, Any]:
    """JSON-ready values that make up an enclave's identity."""
    enclave = identity.manifest.enclave
    return {
        "mrenclave": identity.mrenclave.hex(),
        "tree_root": identity.tree.root.hex(),
        "manifest_digest": hashlib.sha256(identity.manifest.canonical()).hexdigest(),
        "isv_prod_id": enclave.isv_prod_id,
        "isv_svn": enclave.isv_svn,
        "debug": enclave.debug,
        "tee": list(enclave.tee),
        "runtime": enclave.runtime,
        "paths": len(identity.tree),
    }


def to_stored(identity: Identity, sigstruct: bytes | None, source: bytes = b"") -> stored.Stored:
    """What goes into ``/.inclavare/``."""
    build = {
        "inclavare": __version__,
        "runtime_digest": runtime_digest().hex(),
        "mrenclave": identity.mrenclave.hex(),
        "tree_root": identity.tree.root.hex(),
    }
    return stored.Stored(
        identity.manifest.canonical(),
        identity.tree.to_bytes(),
        sigstruct,
        source,
        json.dumps(build, indent=2, sort_keys=True).encode() + b"\n",
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build.

    Attributes:
        key: RSA-3072, exponent 3.
        image_of: the enclave runtime's image.
        source: an ``enclave.toml``, empty for none.
        source_name: its name, for errors.
        tee: the only TEE platform, instead of the manifest's.
        debug: instead of the manifest's.
        check: refuses manifests that could not be started over a root file system, by what is known above this package.
    """

    key: RSAPrivateKey
    image_of: ImageMaker
    source: bytes = b""
    source_name: str = "enclave.toml"
    tee: str | None = None
    debug: bool | None = None
    check: Callable[[Manifest, Path], None] | None = None

    def manifest(self, config: dict[str, Any], rootfs: Path) -> Manifest:
        """:func:`derive_manifest` with this recipe."""
        made = derive_manifest(
            config, rootfs, source=self.source, source_name=self.source_name, tee=self.tee, debug=self.debug
        )
        if self.check is not None:
            self.check(made, rootfs)
        return made


def build_image(
    source: Reference,
    destination: Reference,
    recipe: Recipe,
    *,
    in_place: bool = False,
    force: bool = False,
    tls_verify: bool = True,
    progress: oci.Progress | None = None,
) -> Built:
    """Build an enclave image.

    Args:
        source: image, root file system or bundle.
        destination: where the enclave image goes; ignored with ``in_place``.
        recipe: key, runtime and manifest.
        in_place: write ``/.inclavare/`` into the source directory itself.
        force: replace a destination that exists.
        tls_verify: false to speak plain HTTP to a registry on this machine.
        progress: told about each step.

    Raises:
        UsageError: source, destination or manifest is wrong.
        PlatformError: skopeo or umoci is missing.
        ResourceError: the disk is full; nothing half-written is left.
        IntegrityError: the image is odd in a place that matters.
    """
    progress = progress or oci.Quiet()
    if in_place and source.kind == "image":
        raise UsageError(
            "an image cannot be built in place",
            id="enclave.oci.in_place",
            expected="a root file system or bundle directory",
            remedy="name a destination",
        )
    if not in_place:
        oci.check_destination(source, destination, force)
    with work_directory() as work:
        opened = oci.open_source(source, work, progress, tls_verify=tls_verify)
        manifest = recipe.manifest(opened.config, opened.rootfs)
        oci.refuse_odd_stored(opened.rootfs)
        if in_place:
            return _finish_directory(opened, source.path, opened.rootfs, manifest, recipe, progress)
        if destination.kind != "image":
            with oci.new_directory(destination.path, force) as new:
                rootfs = oci.copy_directory(opened, new, progress)
                made = _finish_directory(opened, new, rootfs, manifest, recipe, progress)
            return replace(made, destination=destination.text)
        identity = measure(manifest, opened.rootfs, recipe.image_of, progress)
        sigstruct = signing.sign_image(identity.image, manifest, recipe.key, mrenclave=identity.mrenclave)
        layout = opened.layout or oci.new_layout(opened.rootfs, work, progress)
        oci.add_stored(layout, work, opened.rootfs, to_stored(identity, sigstruct, recipe.source), progress)
        oci.push(layout, destination, force=force, tls_verify=tls_verify, progress=progress)
        return Built(identity, sigstruct, _mrsigner(sigstruct), destination.text)


def _mrsigner(sigstruct: bytes) -> bytes:
    return mrsigner(Sigstruct.from_bytes(sigstruct).modulus)


def _finish_directory(
    opened: oci.Source, directory: Path, rootfs: Path, manifest: Manifest, recipe: Recipe, progress: oci.Progress
) -> Built:
    identity = measure(manifest, rootfs, recipe.image_of, progress)
    progress.stage("signing and writing")
    sigstruct = signing.sign_image(identity.image, manifest, recipe.key, mrenclave=identity.mrenclave)
    stored.write(rootfs, to_stored(identity, sigstruct, recipe.source))
    if opened.reference.kind == "bundle":
        _annotate_bundle(directory / "config.json", manifest)
    return Built(identity, sigstruct, _mrsigner(sigstruct), str(directory))


def _annotate_bundle(path: Path, manifest: Manifest) -> None:
    """Let the bundle ask for the measured process and name its TEE, as an image's configuration does."""
    document = json.loads(path.read_bytes())
    measured = manifest.process
    process = document.setdefault("process", {})
    process["args"] = list(measured.args) or process.get("args", [])
    process["cwd"] = measured.cwd
    uid, gid, groups = measured.ids
    process["user"] = {**(process.get("user") or {}), "uid": uid, "gid": gid, "additionalGids": list(groups)}
    kept = [entry for entry in process.get("env") or [] if entry.partition("=")[0] not in measured.env]
    process["env"] = kept + [f"{name}={value}" for name, value in measured.env.items()]
    if len(manifest.enclave.tee) == 1:
        document["annotations"] = {**(document.get("annotations") or {}), "enclave.type": manifest.enclave.tee[0]}
    try:
        write_atomically(path, json.dumps(document, indent=2).encode() + b"\n", path.stat().st_mode & 0o777)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(str(path), error) from None
        raise UsageError(f"{path} cannot be written", id="enclave.oci.bundle", found=error.strerror) from None

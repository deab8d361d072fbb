"""Container images in, enclave images out.

skopeo moves images between registries, archives, daemons and OCI layouts; umoci unpacks them and adds the one layer
with ``/.inclavare/``. The original layers and the rest of the configuration stay as they were.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InclavareError, IntegrityError, PlatformError, UsageError
from . import stored, users
from .manifest import ProcessSection
from .paths import full_disk, write_atomically
from .programs import remove_tree, require_programs, run, skopeo_copy
from .reference import Reference

if TYPE_CHECKING:
    pass

_TAG = "enclave"


class Progress(Protocol):
    """Who wants to know how far a build is."""

    def stage(self, text: str) -> None:
        """A new step begins."""

    def total(self, size: int) -> None:
        """The current step will go through this many bytes."""

    def advance(self, size: int) -> None:
        """That many more bytes are done; called from several threads."""


class Quiet:
    """A :class:`Progress` that says nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def total(self, size: int) -> None:
        """Nothing."""

    def advance(self, size: int) -> None:
        """Nothing."""


# --- sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        reference: what it was called.
        rootfs: its root file system.
        config: the OCI image configuration's ``config`` object, or its equivalent for a bundle.
        layout: OCI layout that holds the image under the tag ``enclave``, or ``None`` for a directory.
    """

    reference: Reference
    rootfs: Path
    config: dict[str, Any]
    layout: Path | None


def pull(reference: Reference, work: Path, *, tls_verify: bool = True) -> Path:
    """Copy an image into an OCI layout ``work/image``, tag ``enclave``.

    Raises:
        UsageError: skopeo could not read it.
        PlatformError: skopeo is missing.
        ResourceError: the disk is full.
    """
    require_programs("skopeo")
    layout = work / "image"
    skopeo_copy(
        f"reading {reference.text}", *_tls(reference, "src", tls_verify), reference.text, f"oci:{layout}:{_TAG}"
    )
    return layout


def open_source(reference: Reference, work: Path, progress: Progress, *, tls_verify: bool = True) -> Source:
    """Make a source's root file system accessible; a directory is used where it is.

    Args:
        reference: the source.
        work: an empty directory for the image and its unpacked files.
        progress: told about each step.
        tls_verify: false to speak plain HTTP to a registry on this machine.

    Raises:
        UsageError: unreadable, or no image.
        PlatformError: skopeo or umoci is missing, or unpacking needs root.
        ResourceError: the disk is full.
    """
    if reference.kind == "rootfs":
        return Source(reference, reference.path, {}, None)
    if reference.kind == "bundle":
        rootfs, config = _read_bundle(reference.path)
        return Source(reference, rootfs, config, None)
    require_programs("skopeo", "umoci")
    if os.geteuid() != 0:
        raise PlatformError(
            "unpacking an image needs root, because the owners of its files are measured",
            id="enclave.oci.root",
            found=f"uid {os.geteuid()}",
            expected="uid 0",
            remedy="run as root, for example with sudo",
        )
    progress.stage(f"reading {reference.text}")
    layout = pull(reference, work, tls_verify=tls_verify)
    config = _image_config(layout)
    progress.stage("unpacking")
    run(f"unpacking {reference.text}", "umoci", "unpack", "--image", f"{layout}:{_TAG}", work / "bundle")
    return Source(reference, work / "bundle" / "rootfs", config, layout)


def _blob(layout: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not value.isalnum():
        raise UsageError("the image names a blob that cannot be", id="enclave.oci.blob", found=digest)
    return layout / "blobs" / algorithm / value


def _layout_manifest(layout: Path) -> dict[str, Any]:
    try:
        index = json.loads((layout / "index.json").read_bytes())
        digest = next(
            entry["digest"]
            for entry in index["manifests"]
            if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == _TAG
        )
        found: dict[str, Any] = json.loads(_blob(layout, digest).read_bytes())
        return found
    except (OSError, ValueError, KeyError, StopIteration, AttributeError) as error:
        raise UsageError("the image has no usable manifest", id="enclave.oci.manifest", found=error) from None


def _image_config(layout: Path) -> dict[str, Any]:
    manifest = _layout_manifest(layout)
    try:
        document = json.loads(_blob(layout, manifest["config"]["digest"]).read_bytes())
        config = document.get("config") or {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError("the image has no usable configuration", id="enclave.oci.config", found=error) from None
    if not isinstance(config, dict):
        raise UsageError("the image has no usable configuration", id="enclave.oci.config", found=type(config).__name__)
    return config


def _read_bundle(bundle: Path) -> tuple[Path, dict[str, Any]]:
    """Root file system and image-like configuration of an OCI bundle."""
    path = bundle / "config.json"

    def wrong(found: object, expected: str) -> UsageError:
        return UsageError(
            f"{path} is not a bundle's configuration", id="enclave.oci.bundle", found=found, expected=expected
        )

    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise wrong(error.strerror, "a readable file") from None
    except ValueError as error:
        raise wrong(error, "JSON") from None
    try:
        root = document["root"]["path"]
        process = document.get("process") or {}
        user = process.get("user") or {}
        groups = [user.get("gid", 0), *user.get("additionalGids", [])]
        config: dict[str, Any] = {
            "Cmd": list(process.get("args") or ()),
            "Env": list(process.get("env") or ()),
            "WorkingDir": process.get("cwd", "/"),
            "User": f"{user.get('uid', 0)}:{','.join(map(str, groups))}",
            "Labels": dict(document.get("annotations") or {}),
        }
        rootfs = bundle / root
    except (KeyError, TypeError, AttributeError) as error:
        raise wrong(f"{type(error).__name__} {error}", "root.path, and process as in the OCI runtime-spec") from None
    if not rootfs.is_dir():
        raise wrong(f"no directory {rootfs}", "the bundle's root file system")
    return rootfs, config


def _exists(what: str, remedy: str = "choose another, or replace it with --force") -> UsageError:
    return UsageError(f"{what} exists already", id="enclave.oci.exists", remedy=remedy)


def check_destination(source: Reference, destination: Reference, force: bool) -> None:
    path = destination.path
    if destination.kind != "image":
        if source.kind != "image" and path.exists() and path.samefile(source.path):
            raise UsageError(
                "source and destination are the same directory",
                id="enclave.oci.same",
                remedy="use --in-place to write into it",
            )
        if path.exists() and not force and any(path.iterdir()):
            raise _exists(str(path))
    elif destination.transport in ("docker-archive", "oci-archive"):
        if path.is_dir():
            raise UsageError(f"{path} is a directory", id="enclave.oci.exists", expected="the name of an archive file")
        if path.exists() and not force:
            raise _exists(str(path))
    elif destination.transport == "oci" and path.exists():
        if not (path / "oci-layout").is_file() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(
                f"{path} is not an OCI layout",
                id="enclave.oci.exists",
                expected="an OCI layout, an empty directory or a new name",
                remedy="choose another directory",
            )
        if not force and destination.tag in _layout_tags(path):
            raise _exists(f"oci:{path}:{destination.tag}" if destination.tag else f"an image in {path}")
    parent = path.absolute().parent
    if destination.kind != "image" or destination.transport in ("oci", "oci-archive", "docker-archive"):
        if not parent.is_dir():
            raise UsageError(
                f"{parent} does not exist", id="enclave.oci.parent", expected="a directory", remedy=f"mkdir -p {parent}"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{parent} cannot be written", id="enclave.oci.parent", remedy="choose another directory")


def _layout_tags(layout: Path) -> set[str]:
    try:
        index = json.loads((layout / "index.json").read_bytes())
        return {
            entry.get("annotations", {}).get("org.opencontainers.image.ref.name", "") for entry in index["manifests"]
        }
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{layout} is not a usable OCI layout", id="enclave.oci.layout", found=error) from None


def _tls(reference: Reference, side: str, verify: bool) -> list[str]:
    if verify or reference.transport != "docker":
        return []
    host = reference.registry.rsplit(":", 1)[0].strip("[]")
    if host not in ("localhost", "::1") and not host.startswith("127."):
        raise UsageError(
            f"plain HTTP is only for a registry on this machine, not for {reference.registry}",
            id="enclave.oci.tls",
            expected="localhost or 127.0.0.1",
            remedy="give the registry a certificate, and leave out --tls-verify=false",
        )
    return [f"--{side}-tls-verify=false"]


@contextmanager
def new_directory(path: Path, force: bool) -> Iterator[Path]:
    """A directory beside ``path`` that takes its place if all goes well, and vanishes otherwise."""
    path = path.absolute()
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        new.mkdir(mode=0o755)
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        if old.exists():
            remove_tree(old)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(str(path), error) from None
        raise UsageError(f"{path} cannot be written", id="enclave.oci.write", found=error.strerror) from None
    finally:
        if new.exists():
            remove_tree(new)


def copy_directory(opened: Source, new: Path, progress: Progress) -> Path:
    """Copy a source into a new directory in its own shape; the copy's root file system."""
    require_programs("cp")
    progress.stage("copying files")
    _refuse_mounts(opened.rootfs)
    _refuse_other_owners(opened.rootfs)
    bundle = opened.reference.kind == "bundle"
    rootfs = new / "rootfs" if bundle else new
    rootfs.mkdir(exist_ok=True)
    # "-x" is belt and braces: mounts below the root were refused above.
    run(f"copying to {new}", "cp", "-ax", "--reflink=auto", "--", f"{opened.rootfs}/.", f"{rootfs}/")
    if bundle:
        document = json.loads((opened.reference.path / "config.json").read_bytes())
        document["root"]["path"] = "rootfs"
        (new / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    return rootfs


def _refuse_other_owners(rootfs: Path) -> None:
    """Owners are measured, and only root can give a copy's files to others."""
    if os.geteuid() == 0:
        return
    own = (os.geteuid(), os.getegid())
    for directory, names, files in os.walk(rootfs):
        for name in (".", *names, *files):
            status = os.lstat(os.path.join(directory, name))
            if (status.st_uid, status.st_gid) != own:
                raise PlatformError(
                    "copying a root file system needs root, because the owners of its files are measured",
                    id="enclave.oci.root",
                    found=f"{Path(directory) / name} belongs to {status.st_uid}:{status.st_gid}",
                    expected=f"{own[0]}:{own[1]}",
                    remedy="run as root, for example with sudo, or build with --in-place",
                )


def _refuse_mounts(rootfs: Path) -> None:
    prefix = str(rootfs.resolve()).rstrip("/") + "/"
    with Path("/proc/self/mountinfo").open("rb") as handle:
        for line in handle:
            mounted = line.split()[4].decode("unicode_escape")
            if mounted.startswith(prefix):
                raise UsageError(
                    f"another file system is mounted at {mounted}",
                    id="enclave.tree.mount",
                    remedy="unmount it, or measure a copy of the root file system",
                )


def refuse_odd_stored(rootfs: Path) -> None:
    existing = rootfs / stored.DIRECTORY
    if existing.is_symlink() or (existing.exists() and not existing.is_dir()):
        raise IntegrityError(
            f"the image has a /{stored.DIRECTORY} that is not a directory",
            id="enclave.oci.reserved",
            found="a link" if existing.is_symlink() else "a file",
            expected="nothing, or what an earlier build put there",
            remedy="remove it from the image; the name is reserved",
        )


def new_layout(rootfs: Path, work: Path, progress: Progress) -> Path:
    """An OCI image with one layer: a root file system."""
    require_programs("skopeo", "umoci")
    progress.stage("packing the root file system")
    layout = work / "image"
    image = f"{layout}:{_TAG}"
    run("making an image", "umoci", "init", "--layout", layout)
    run("making an image", "umoci", "new", "--image", image)
    run("packing the root file system", "umoci", "insert", "--image", image, rootfs, "/")
    return layout


def _process_options(process: ProcessSection, config: dict[str, Any], rootfs: Path) -> list[str]:
    """umoci's options that give an image the measured process, so that an engine asks for just that by itself.

    What says the same already stays as its author wrote it.
    """
    options: list[str] = []
    if process.args and [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])] != list(process.args):
        options += ["--clear", "config.entrypoint", "--clear", "config.cmd"]
        options += [option for part in process.args for option in ("--config.cmd", part)]
    options += [option for name, value in process.env.items() for option in ("--config.env", f"{name}={value}")]
    root_fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        own = users.resolve(root_fd, str(config.get("User") or "0"))
    except UsageError:
        own = ""  # a name that the image does not know; the manifest named another
    finally:
        os.close(root_fd)
    if own != process.user:
        options += ["--config.user", process.user.partition(",")[0]]
    return [*options, "--config.workingdir", process.cwd]


def add_stored(layout: Path, work: Path, rootfs: Path | None, contents: stored.Stored, progress: Progress) -> None:
    """Add the one layer with ``/.inclavare/``, the measured process, and the label and variable that name the TEE.

    Args:
        layout: OCI layout from :func:`pull`.
        work: directory for temporary files.
        rootfs: the unpacked image, to see whether a layer below has ``/.inclavare/``; ``None`` if it surely has.
        contents: what to write.
        progress: told about the step.

    Raises:
        ResourceError: the disk is full.
        UsageError: umoci failed.
    """
    progress.stage("adding the enclave's layer")
    addition = work / "addition"
    addition.mkdir()
    stored.write(addition, contents)
    if rootfs is not None:
        refuse_odd_stored(rootfs)
    replace = rootfs is None or (rootfs / stored.DIRECTORY).exists()
    image = f"{layout}:{_TAG}"
    run(
        "adding the enclave's layer",
        "umoci",
        "insert",
        "--image",
        image,
        *(["--opaque"] if replace else []),
        "--history.created_by",
        "inclavare build",
        addition / stored.DIRECTORY,
        f"/{stored.DIRECTORY}",
    )
    # An image that is signed again has its process from when it was built.
    process = contents.manifest.process
    options = [] if rootfs is None else _process_options(process, _image_config(layout), rootfs)
    tees = contents.manifest.enclave.tee
    if len(tees) == 1:
        options += ["--config.label", f"enclave.type={tees[0]}", "--config.env", f"ENCLAVE_TYPE={tees[0]}"]
    if options:
        run("configuring the image", "umoci", "config", "--no-history", "--image", image, *options)


def push(layout: Path, destination: Reference, *, force: bool, tls_verify: bool, progress: Progress) -> None:
    """Write the image of a layout to its destination; a failure leaves nothing half-written.

    Raises:
        ResourceError: the disk is full.
        UsageError: skopeo failed.
    """
    progress.stage(f"writing {destination.text}")
    image = f"oci:{layout}:{_TAG}"
    what = f"writing {destination.text}"
    path = destination.path.absolute()
    suffix = f":{destination.tag}" if destination.tag else ""
    if destination.transport in ("docker-archive", "oci-archive"):
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            skopeo_copy(what, image, f"{destination.transport}:{new}{suffix}")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    elif destination.transport == "oci" and not (path / "oci-layout").exists():
        with new_directory(path, force) as new_layout:
            skopeo_copy(what, image, f"oci:{new_layout}{suffix}")
    elif destination.transport == "oci":
        _push_into_layout(what, image, path, suffix)
    else:
        skopeo_copy(what, *_tls(destination, "dest", tls_verify), image, destination.text)


def _push_into_layout(what: str, image: str, path: Path, suffix: str) -> None:
    index = path / "index.json"
    before = index.read_bytes()
    blobs = set((path / "blobs").rglob("*"))
    try:
        skopeo_copy(what, image, f"oci:{path}{suffix}")
        # skopeo keeps the image that had the tag, without a name; who replaces an image wants it gone.
        known = json.loads(before)["manifests"]
        after = json.loads(index.read_bytes())
        fresh = [entry for entry in after["manifests"] if entry not in known]
        # An image without a tag replaces the one without; one with a tag, the one that had it.
        old = known if suffix or not fresh else []
        kept = [entry for entry in after["manifests"] if entry.get("annotations") or entry in (old or fresh)]
        replaced = len(kept) < len(after["manifests"])
        if replaced:
            write_atomically(index, json.dumps({**after, "manifests": kept}).encode())
    except (InclavareError, OSError) as error:
        write_atomically(index, before)
        for blob in set((path / "blobs").rglob("*")) - blobs:
            if blob.is_file():
                blob.unlink()
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full_disk(str(path), error) from None
            raise UsageError(f"{path} cannot be written", id="enclave.oci.write", found=error.strerror) from None
        raise
    if replaced:
        # From here on the old image is no longer complete, so nothing may be taken back.
        run("removing the image that was replaced", "umoci", "gc", "--layout", path)


# --- looking -----------------------------------------------------------------------------------------------------


def stored_in_layout(layout: Path) -> stored.Stored | None:
    """``/.inclavare/`` of an image in a layout, found in its layers without unpacking them.

    Raises:
        IntegrityError: damaged.
        UsageError: a layer cannot be read (for example one compressed with zstd).
    """
    wanted = {
        stored.MANIFEST: 1 << 20,
        stored.TREE: stored.MAX_TREE,
        stored.SIGSTRUCT: stored.SIGSTRUCT_SIZE,
        stored.SOURCE: stored.MAX_SOURCE,
        stored.BUILD: stored.MAX_SOURCE,
    }
    for layer in reversed(_layout_manifest(layout).get("layers", [])):
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(_blob(layout, layer["digest"]), "r:*") as archive:
                for member in _members(archive):
                    name = posixpath.normpath(member.name).lstrip("/")
                    if name == f".wh.{stored.DIRECTORY}":
                        return None
                    directory, _, base = name.partition("/")
                    if directory != stored.DIRECTORY or base not in wanted:
                        continue
                    handle = archive.extractfile(member) if member.isreg() else None
                    if handle is None or member.size > wanted[base]:
                        raise IntegrityError(
                            f"/{name} of the image is damaged",
                            id="enclave.stored.damaged",
                            found=f"{member.size} bytes" if member.isreg() else "not a regular file",
                            expected=f"a regular file of at most {wanted[base]} bytes",
                        )
                    found[base] = handle.read()
        except (tarfile.TarError, OSError, EOFError, KeyError) as error:
            raise UsageError("a layer of the image cannot be read", id="enclave.oci.layer", found=error) from None
        if found:
            if stored.MANIFEST not in found or stored.TREE not in found:
                raise IntegrityError(
                    f"/{stored.DIRECTORY} of the image is incomplete",
                    id="enclave.stored.damaged",
                    found=", ".join(sorted(found)),
                    expected=f"{stored.MANIFEST} and {stored.TREE}",
                )
            return stored.Stored(
                found[stored.MANIFEST],
                found[stored.TREE],
                found.get(stored.SIGSTRUCT),
                found.get(stored.SOURCE, b""),
                found.get(stored.BUILD, b""),
            )
    return None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            # umoci leaves out the padding after an archive's last file. Nothing else can be missing: skopeo has
            # checked the layer's digest.
            return
        if member is None:
            return
        yield member

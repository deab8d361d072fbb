"""What the commands about enclave images share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    from ..enclave.manifest import Manifest
    from ..enclave.oci import Progress
    from ..enclave.reference import Reference
    from ..enclave.stored import Stored
    from ..enclave.tree import Tree
    from ..sgx.image import EnclaveImage

tls_option = click.option(
    "--tls-verify",
    type=bool,
    default=True,
    show_default=True,
    help="False: plain HTTP to a registry on this machine.",
)
key_option = click.option(
    "--key",
    "key_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Signing key: RSA-3072, exponent 3, PEM. [default: a developer key in ~/.config/inclavare]",
)
manifest_option = click.option(
    "-m",
    "--manifest",
    "manifest_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="enclave.toml; what it leaves out comes from the image's own configuration.",
)


def image_of(manifest: Manifest, tree_root: bytes) -> EnclaveImage:
    """The pages of an enclave, as its enclave runtime makes them.

    Raises:
        UsageError: there is no such runtime.
    """
    from ..runtimes.base import runtime

    return runtime(manifest.enclave.runtime).image(manifest, tree_root)


def signing_key(path: Path | None) -> RSAPrivateKey:
    """The key that was named, or the developer's own, made at first use.

    Raises:
        UsageError: it cannot be used.
    """
    from ..enclave import signing

    if path is not None:
        return signing.load_key(path)
    from ._output import note

    own = signing.developer_key()
    key, made = signing.load_or_make_key(own)
    note(
        f"made a developer key, {own}; it is the MRSIGNER of what you build, so keep it"
        if made
        else f"signing with the developer key {own}"
    )
    return key


def read_manifest(path: Path | None) -> tuple[bytes, str]:
    """An ``enclave.toml`` and its name, or nothing.

    Raises:
        UsageError: unreadable.
    """
    if path is None:
        return b"", "enclave.toml"
    from ..errors import UsageError

    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", id="enclave.manifest.read", found=error.strerror) from None


def read_stored(reference: Reference, work: Path, progress: Progress, *, tls_verify: bool) -> Stored | None:
    """``/.inclavare/`` of an image or directory, without unpacking an image's other files.

    Raises:
        InclavareError: unreadable or damaged.
    """
    from ..enclave import oci, stored

    if reference.kind == "image":
        progress.stage(f"reading {reference.text}")
        return oci.stored_in_layout(oci.pull(reference, work, tls_verify=tls_verify))
    return stored.read(oci.open_source(reference, work, progress).rootfs)


def require_stored(found: Stored | None, text: str) -> Stored:
    """Refuse an image that is no enclave image.

    Raises:
        UsageError: ``found`` is ``None``.
    """
    if found is None:
        from ..errors import UsageError

        raise UsageError(
            f"{text} is not an enclave image",
            id="enclave.stored.missing",
            found="no /.inclavare in it",
            remedy=f"make one with: inclavare build {text} DESTINATION",
        )
    return found


def built_by_other_code(found: Stored) -> str | None:
    """A remedy, if the image was built by an inclavare whose measured code differs from this one's."""
    import json

    from ..enclave.image import runtime_digest

    try:
        built = json.loads(found.build)
        if built["runtime_digest"] != runtime_digest().hex():
            return f"it was built by inclavare {built['inclavare']} with other code than this one's; build it again"
    except (ValueError, KeyError, TypeError):
        pass
    return None


def sigstruct_fields(sigstruct: bytes) -> dict[str, Any]:
    """The fields of a SIGSTRUCT that mean something to people, and whether its signature holds.

    Raises:
        IntegrityError: not a SIGSTRUCT.
    """
    from ..errors import IntegrityError
    from ..sgx import sigstruct as sgx_sigstruct
    from ..sgx.structs import Attributes, Sigstruct

    parsed = Sigstruct.from_bytes(sigstruct)
    try:
        sgx_sigstruct.verify(parsed)
        signature = "good"
    except IntegrityError as error:
        signature = error.message
    attributes, mask = Attributes.from_bytes(parsed.attributes), Attributes.from_bytes(parsed.attribute_mask)
    date = f"{parsed.date:08x}"
    return {
        "signature": signature,
        "mrsigner": sgx_sigstruct.mrsigner(parsed.modulus).hex(),
        "enclave_hash": parsed.enclave_hash.hex(),
        "date": f"{date[:4]}-{date[4:6]}-{date[6:]}",
        "vendor": f"{parsed.vendor:#x}",
        "isv_prod_id": parsed.isv_prod_id,
        "isv_svn": parsed.isv_svn,
        "debug": attributes.debug,
        "attributes": f"{attributes.flags:#018x}",
        "attribute_mask": f"{mask.flags:#018x}",
        "xfrm": f"{attributes.xfrm:#x}",
        "xfrm_mask": f"{mask.xfrm:#018x}",
        "miscselect": f"{parsed.miscselect:#x}",
        "misc_mask": f"{parsed.misc_mask:#010x}",
    }


def tree_statistics(tree: Tree) -> dict[str, int]:
    """Numbers about a verified tree.

    Raises:
        IntegrityError: damaged.
    """
    from ..enclave.tree import block_count

    names = {
        "d": "directories",
        "f": "files",
        "l": "links",
        "c": "devices",
        "b": "devices",
        "p": "fifos",
        "s": "sockets",
    }
    counts = {"paths": len(tree), **dict.fromkeys(names.values(), 0), "bytes": 0, "blocks": 0, "setuid": 0}
    for _, node in tree.walk():
        counts[names[node.kind]] += 1
        if node.kind == "f":
            counts["bytes"] += node.size
            counts["blocks"] += block_count(node.size)
            counts["setuid"] += bool(node.mode & 0o6000)
    return counts


def differences(stored: Tree, actual: Tree, limit: int = 20) -> list[str]:
    """What differs between two verified trees, as lines for people; at most ``limit`` and one more that says so.

    Raises:
        IntegrityError: damaged.
    """
    from ._output import printable

    found: list[str] = []
    todo = [(b"/", 0, 0)]
    while todo:
        path, left, right = todo.pop()
        one, two = stored.node(left), actual.node(right)
        if one.digest == two.digest:
            continue
        fields = [
            f"{name} {show(getattr(one, name))} → {show(getattr(two, name))}"
            for name, show in _COMPARED
            if getattr(one, name) != getattr(two, name)
        ]
        if one.blocks != two.blocks and one.size == two.size:
            fields.append("content")
        if fields:
            found.append(f"{printable(path)}: {', '.join(fields)}")
        prefix = path if path == b"/" else path + b"/"
        for name in sorted(one.children.keys() | two.children.keys(), reverse=True):
            a, b = one.children.get(name), two.children.get(name)
            if a is None or b is None:
                found.append(f"{printable(prefix + name)}: {'added' if a is None else 'missing'}")
            else:
                todo.append((prefix + name, a, b))
        if len(found) > limit:
            return [*found[:limit], "… and more"]
    return found


_COMPARED = (
    ("kind", str),
    ("mode", lambda value: f"{value:04o}"),
    ("uid", str),
    ("gid", str),
    ("size", str),
    ("target", lambda value: repr(value)[1:]),
    ("rdev", str),
)

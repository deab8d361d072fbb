"""Options and helpers of commands that make or check signed reference values."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import UsageError

if TYPE_CHECKING:
    from ..attestation.references import ReferenceBundle
    from ..attestation.signers import KeySigner, TrustedSigners
    from ..enclave.build import Built
    from ..enclave.reference import Reference

_F = TypeVar("_F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path, dir_okay=False)
_EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)
_UNITS = {"h": 3600, "d": 86400, "y": 365 * 86400}
DEFAULT_VALIDITY = "1y"

reference_key_option = click.option(
    "--key",
    "key_path",
    type=_PATH,
    help="Key that signs, ECDSA P-256 or Ed25519, PEM, mode 0600. [default: one in ~/.config/inclavare]",
)
output_option = click.option("-o", "--output", "output_path", type=_PATH, help="[default: standard output]")


def bundle_options(function: _F) -> _F:
    """``--reference-bundle`` of `build`, as parameters of :func:`write_bundle`."""
    for option in (
        click.option("--reference-name", metavar="IMAGE", help="Name of the image in it. [default: DESTINATION's]"),
        click.option("--reference-key", type=_PATH, help="Key that signs it. [default: one in ~/.config/inclavare]"),
        click.option("--reference-bundle", type=_PATH, help="Write signed reference values of the image, too."),
    ):
        function = option(function)
    return function


def trust_options(function: _F) -> _F:
    """Whose signatures count, as parameters of :func:`trusted`."""
    for option in (
        click.option("--sigstore-issuer", metavar="URL", help="OpenID Connect issuer of --sigstore-identity."),
        click.option("--sigstore-identity", metavar="NAME", help="Signer whom sigstore certifies."),
        click.option("--sigstore-root", type=_EXISTING, help="Trusted root of that sigstore instance, JSON."),
        click.option("--trust", multiple=True, type=_EXISTING, help="Trusted public key, PEM; may be repeated."),
    ):
        function = option(function)
    return function


def signer(path: Path | None) -> KeySigner:
    """The key that was named, or the user's own, made at first use.

    Raises:
        UsageError: it cannot be used.
    """
    from ..attestation.signers import KeySigner
    from ..enclave.signing import developer_key
    from ._output import note

    if path is not None:
        return KeySigner.load(path)
    own = developer_key().with_name("reference-key.pem")
    found, made = KeySigner.load_or_make(own)
    if made:
        public = own.with_suffix(".pub.pem")
        public.write_bytes(found.public_pem())
        note(f"made a key for reference values, {own}; who registers them has to trust {public}")
    return found


def trusted(
    trust: tuple[Path, ...], sigstore_root: Path | None, sigstore_identity: str | None, sigstore_issuer: str | None
) -> TrustedSigners:
    """The signers of :func:`trust_options`.

    Raises:
        UsageError: a key cannot be used, nobody is named, or a sigstore option is missing.
    """
    from ..attestation.signers import SigstoreIdentity, TrustedSigners, load_public_key

    keys = [load_public_key(path.read_bytes(), str(path)) for path in trust]
    if sigstore_root is None and sigstore_identity is None and sigstore_issuer is None:
        if not keys:
            raise click.UsageError("Name whose signature counts: --trust KEY, or the three --sigstore options.")
        return TrustedSigners(keys)
    if sigstore_root is None or sigstore_identity is None or sigstore_issuer is None:
        raise click.UsageError("--sigstore-root, --sigstore-identity and --sigstore-issuer belong together.")
    return TrustedSigners(keys, [SigstoreIdentity(sigstore_root, sigstore_identity, sigstore_issuer)])


def seconds(text: str) -> int:
    """A length of time: ``12h``, ``90d`` or ``1y``.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,6})([hdy])", text)
    if match is None or int(match[1]) == 0:
        raise UsageError("this is not a length of time", id="reference.validity", found=text, expected="12h, 90d or 1y")
    return int(match[1]) * _UNITS[match[2]]


def now() -> int:
    """Seconds since 1970; ``SOURCE_DATE_EPOCH`` where that is set, so that a build can be repeated."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(epoch) if epoch.isdigit() else int(time.time())


def write_bundle(built: Built, destination: Reference, path: Path, by: KeySigner, name: str | None) -> ReferenceBundle:
    """Sign what was built, and write it.

    Raises:
        UsageError: the file cannot be written.
        IntegrityError: the image runs on no TEE platform that is known.
    """
    from ..attestation.references import ReferenceBundle, sign
    from ..enclave.build import identity_dict
    from ._files import write_output

    identity = identity_dict(built.identity)
    payload = image_statement(
        identity,
        built.mrsigner.hex(),
        name or image_name(destination),
        image_digests(destination),
        start=now(),
        validity=seconds(DEFAULT_VALIDITY),
    )
    envelope = sign(payload, by)
    try:
        write_output(path, envelope, mode=0o644)
    except OSError as error:
        raise UsageError(f"{path} cannot be written", id="reference.write", found=error.strerror) from None
    return ReferenceBundle.read(payload, envelope=envelope)


def image_statement(
    identity: dict[str, Any],
    mrsigner: str | None,
    name: str,
    digests: dict[str, str],
    *,
    start: int,
    validity: int,
    values: dict[str, Any] | None = None,
) -> bytes:
    """The statement about an enclave image.

    Args:
        identity: as :func:`inclavare.enclave.build.identity_dict` gives it.
        digests: of the image, by algorithm; the file tree's root is added.
        start: seconds since 1970.
        validity: seconds.
    """
    from .. import __version__
    from ..attestation.references import Subject, statement

    claims: dict[str, str | int] = {"mrenclave": identity["mrenclave"]}
    if mrsigner is not None:
        claims["mrsigner"] = mrsigner
    claims |= {"isv_prod_id": identity["isv_prod_id"], "isv_svn": identity["isv_svn"]}
    return statement(
        [Subject(name, (*digests.items(), ("inclavareTree", identity["tree_root"])))],
        [(identity["tee"], claims)],
        not_before=start,
        not_after=start + validity,
        values=values,
        build={
            "inclavare": __version__,
            "runtime": identity["runtime"],
            "manifestDigest": identity["manifest_digest"],
            "treeRoot": identity["tree_root"],
        },
    )


def image_name(reference: Reference) -> str:
    """What an image is called by those who use it."""
    if reference.transport in ("", "oci", "oci-archive", "docker-archive"):
        stem = reference.path.name.removesuffix(".tar")
        return (
            reference.tag
            if reference.transport == "docker-archive" and reference.tag
            else stem + (f":{reference.tag}" if reference.tag else "")
        )
    return reference.tag


def image_digests(reference: Reference) -> dict[str, str]:
    """The image's digest where it can be read without asking anybody: in an OCI layout."""
    import json

    if reference.transport != "oci":
        return {}
    try:
        entries = json.loads((reference.path / "index.json").read_bytes())["manifests"]
        named = [
            entry
            for entry in entries
            if not reference.tag
            or (entry.get("annotations") or {}).get("org.opencontainers.image.ref.name") == reference.tag
        ]
        algorithm, _, value = named[0]["digest"].partition(":") if len(named) == 1 else ("", "", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {algorithm: value} if value else {}


def show_bundle(bundle: ReferenceBundle) -> None:
    """For people."""
    from ._output import print_fields

    document = bundle.to_dict()
    print_fields(
        [
            ("id", bundle.id),
            *(
                ("image", subject.name + "".join(f"\n{name}:{value}" for name, value in subject.digests))
                for subject in bundle.subjects
            ),
            ("valid", f"{document['not_before']} to {document['not_after']}"),
            *(("signed by", one) for one in bundle.signers),
        ]
    )
    for entry in bundle.references:
        print_fields(entry.claims.items(), title=f"accepted on {', '.join(entry.tees)}")
    for title, values in (("further values", bundle.values), ("build", bundle.build)):
        if values:
            print_fields(values.items(), title=title)

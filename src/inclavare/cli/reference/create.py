"""``inclavare reference create``: make reference values of an enclave image, or of claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from .._appraisals import moment
from .._enclaves import image_of, read_stored, require_stored, sigstruct_fields, tls_option
from .._files import read_input, write_output
from .._output import Steps, json_option, print_json
from .._references import (
    DEFAULT_VALIDITY,
    image_digests,
    image_name,
    image_statement,
    now,
    output_option,
    reference_key_option,
    seconds,
    show_bundle,
    signer,
)

_MAX_JSON = 4 << 20


@click.command("create")
@click.argument("source", required=False)
@click.option("--name", help="Name of the image. [default: SOURCE's]")
@click.option("--digest", "digests", multiple=True, metavar="sha256:HEX", help="Digest of the image; may be repeated.")
@click.option("--tee", "tees", multiple=True, help="TEE platform that claims are of; may be repeated.")
@click.option(
    "--claims", "claims_path", metavar="FILE", help="Claims in JSON, as commands print them with --json; or -."
)
@click.option("--claim", "claims", multiple=True, metavar="NAME=VALUE", help="A claim, such as mrenclave=…")
@click.option("--value", "values", multiple=True, metavar="NAME=JSON", help="A further value, for policies in Rego.")
@click.option("--not-before", help="[default: now]")
@click.option("--valid-for", default=DEFAULT_VALIDITY, show_default=True, help="12h, 90d, 1y, …")
@click.option("--unsigned", is_flag=True, help="Write the statement alone, to be signed elsewhere.")
@reference_key_option
@output_option
@tls_option
@json_option
def command(
    *,
    source: str | None,
    name: str | None,
    digests: tuple[str, ...],
    tees: tuple[str, ...],
    claims_path: str | None,
    claims: tuple[str, ...],
    values: tuple[str, ...],
    not_before: str | None,
    valid_for: str,
    unsigned: bool,
    key_path: Path | None,
    output_path: Path | None,
    tls_verify: bool,
    as_json: bool,
) -> None:
    """Make a bundle of reference values.

    SOURCE is an enclave image, as for `inspect`. Without it, the claims are taken from --claims, a document that
    `verify`, `measure` or `sgx sign` printed with --json, and from --claim.
    """
    from ...attestation.references import ReferenceBundle, Subject, sign, statement

    start = now() if not_before is None else moment(not_before)
    known = dict(_pair(text, ":", "--digest") for text in digests)
    further = {key: _parsed(text) for key, text in (_pair(text, "=", "--value") for text in values)}
    if source is not None:
        if tees or claims or claims_path:
            raise click.UsageError("--tee, --claims and --claim are for reference values of no SOURCE.")
        payload = _of_image(source, name, known, start, seconds(valid_for), further, tls_verify)
    else:
        if not name or not tees or not (claims or claims_path):
            raise click.UsageError("Name a SOURCE, or --name, --tee and --claims or --claim.")
        found = _claims(claims_path, claims, tees[0])
        payload = statement(
            [Subject(name, tuple((known or _content_digest(found)).items()))],
            [(tees, found)],
            not_before=start,
            not_after=start + seconds(valid_for),
            values=further,
        )
    written = payload if unsigned else sign(payload, signer(key_path))
    if as_json and output_path is None:
        raise click.UsageError("--json needs -o, for the bundle itself goes to standard output.")
    write_output(output_path, written, mode=0o644)
    bundle = ReferenceBundle.read(payload)
    if as_json:
        print_json(bundle.to_dict())
    elif output_path is not None:
        show_bundle(bundle)


def _of_image(
    source: str,
    name: str | None,
    digests: dict[str, str],
    start: int,
    validity: int,
    values: dict[str, Any],
    tls_verify: bool,
) -> bytes:
    from ...enclave.build import Identity, identity_dict
    from ...enclave.programs import work_directory
    from ...enclave.reference import Reference
    from ...sgx.measure import measure

    reference = Reference.parse(source)
    with Steps() as steps, work_directory() as work:
        found = require_stored(read_stored(reference, work, steps, tls_verify=tls_verify), source)
    found.tree.verify_root(found.tree.root)
    image = image_of(found.manifest, found.tree.root)
    identity = identity_dict(Identity(found.manifest, found.tree, image, measure(image)))
    mrsigner = None
    if found.sigstruct is not None:
        signed = sigstruct_fields(found.sigstruct)
        if signed["enclave_hash"] != identity["mrenclave"] or signed["signature"] != "good":
            raise UsageError(
                "the image's SIGSTRUCT is not over this enclave",
                id="reference.sigstruct",
                found=f"ENCLAVEHASH {signed['enclave_hash']}, signature {signed['signature']}",
                expected=f"ENCLAVEHASH {identity['mrenclave']}",
                remedy="build the image again, with this inclavare",
            )
        mrsigner = signed["mrsigner"]
    return image_statement(
        identity,
        mrsigner,
        name or image_name(reference),
        digests or image_digests(reference),
        start=start,
        validity=validity,
        values=values,
    )


def _claims(path: str | None, pairs: tuple[str, ...], tee: str) -> dict[str, str | int]:
    """Those claims of a document that reference values are made of, and what the command line says."""
    from ...attestation import identity

    family = identity.family(tee)
    if family not in identity.MEASURED:
        raise UsageError("there is no such TEE", id="reference.tee", found=tee, expected=", ".join(identity.TEES))
    numbers = identity.EXACT[family] | identity.AT_LEAST[family]
    names = [*identity.MEASURED[family], *numbers]
    found: dict[str, str | int] = {}
    if path is not None:
        document = _parsed(read_input(path, _MAX_JSON).decode(errors="replace"))
        for level in _levels(document, family):
            found |= {
                key: level[key]
                for key in names
                if isinstance(level.get(key), int if key in numbers else str) and _tells(level[key])
            }
    for key, text in (_pair(text, "=", "--claim") for text in pairs):
        found[key] = int(text) if key in numbers and text.isdigit() else text
    return found


def _tells(value: Any) -> bool:
    """Zeros in a quote's optional fields tell nothing; whoever means them says so with --claim."""
    return not isinstance(value, str) or value.strip("0") != ""


def _levels(document: Any, family: str) -> list[dict[str, Any]]:
    """Where commands put claims in what they print: at the top, under ``claims`` or ``identity``, by TEE."""
    if not isinstance(document, dict):
        raise UsageError("the claims are not an object", id="reference.claims", found=type(document).__name__)
    tops = [document, *(document[key] for key in ("identity", "claims") if isinstance(document.get(key), dict))]
    return [*tops, *(top[family] for top in tops if isinstance(top.get(family), dict))]


def _content_digest(claims: dict[str, str | int]) -> dict[str, str]:
    """An in-toto subject has a digest; without an image it is that of the claims."""
    from hashlib import sha256

    return {"sha256": sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()}


def _pair(text: str, separator: str, option: str) -> tuple[str, str]:
    name, found, value = text.partition(separator)
    if not name or not found or not value:
        raise UsageError(f"{option} is incomplete", id="reference.option", found=text, expected=f"NAME{separator}VALUE")
    return name, value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("this is not JSON", id="reference.json", found=text[:80], expected=str(error)) from None

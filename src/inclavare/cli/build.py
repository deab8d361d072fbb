"""``inclavare build``: make an enclave image of an image, root file system or bundle."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._enclaves import image_of, key_option, manifest_option, read_manifest, signing_key, tls_option
from ._output import Steps, json_option, note, print_fields, print_json, size
from ._references import bundle_options, signer, write_bundle

if TYPE_CHECKING:
    from ..enclave.manifest import Manifest

#: A policy of a key broker, with ``@version`` or without; verdictd's ids may have an @ of their own.
_POLICY = r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,137}"


@click.command("build")
@click.argument("source")
@click.argument("destination", required=False)
@manifest_option
@key_option
@click.option("--tee", help="The only TEE platform that the enclave may run on: sgx or sgx-sim.")
@click.option("--debug/--no-debug", default=None, help="Make a debug enclave (protects nothing), or none.")
@click.option("--in-place", is_flag=True, help="Write /.inclavare into the source directory itself.")
@click.option("--force", is_flag=True, help="Replace a destination that exists.")
@bundle_options
@tls_option
@json_option
def command(
    *,
    source: str,
    destination: str | None,
    manifest_path: Path | None,
    key_path: Path | None,
    tee: str | None,
    debug: bool | None,
    in_place: bool,
    force: bool,
    reference_bundle: Path | None,
    reference_key: Path | None,
    reference_name: str | None,
    tls_verify: bool,
    as_json: bool,
) -> None:
    """Measure and sign SOURCE and write it, with its manifest, file tree and SIGSTRUCT, to DESTINATION.

    \b
    SOURCE and DESTINATION:
      oci:DIR[:TAG]               OCI image layout
      oci-archive:FILE[:TAG]      the same as one file
      docker-archive:FILE[:NAME]  as written by docker save
      docker://HOST/NAME[:TAG]    registry
      docker-daemon:NAME:TAG      images of the local docker
      DIRECTORY                   root file system, or OCI bundle (config.json and rootfs)
    """
    from ..enclave.build import Recipe, build_image
    from ..enclave.reference import Reference

    if (destination is None) != in_place:
        raise click.UsageError("Name a DESTINATION, or write into the source with --in-place.")
    if reference_bundle is None and (reference_key or reference_name):
        raise click.UsageError("--reference-key and --reference-name belong to --reference-bundle.")
    reference_signer = None if reference_bundle is None else signer(reference_key)
    opened = Reference.parse(source)
    target = opened if destination is None else Reference.parse(destination, destination=True)
    text, name = read_manifest(manifest_path)
    with Steps() as steps:
        recipe = Recipe(signing_key(key_path), image_of, text, name, tee, debug, _check_secrets)
        built = build_image(
            opened, target, recipe, in_place=in_place, force=force, tls_verify=tls_verify, progress=steps
        )
    bundle = None
    if reference_bundle is not None and reference_signer is not None:
        bundle = write_bundle(built, target, reference_bundle, reference_signer, reference_name)
    if as_json:
        print_json(built.to_dict() | ({} if bundle is None else {"reference_bundle": bundle.to_dict()}))
        return
    manifest = built.identity.manifest
    print_fields(
        [
            ("image", built.destination),
            ("MRENCLAVE", built.identity.mrenclave),
            ("MRSIGNER", built.mrsigner),
            ("tree root", built.identity.tree.root),
            ("paths", len(built.identity.tree)),
            ("command", " ".join(manifest.process.args)),
            ("memory", f"{size(manifest.enclave.size)}, {manifest.enclave.threads} threads"),
            (
                "runs on",
                ", ".join(manifest.enclave.tee) + (" (debug: protects nothing)" if manifest.enclave.debug else ""),
            ),
            *([] if bundle is None else [("reference bundle", f"{reference_bundle}, id {bundle.id}")]),
        ]
    )
    if manifest.enclave.tee == ("sgx",) and tee is None and not Path("/dev/sgx_enclave").exists():
        note("it runs on SGX hardware only; for a machine without, build with --tee sgx-sim")


def _check_secrets(manifest: Manifest, rootfs: Path) -> None:
    """Refuse now what would be refused at every start: a key broker or a secret that nobody could ask for.

    Raises:
        InclavareError: ``kbs.*`` or ``runelet.secret.*``.
    """
    from ..errors import UsageError

    if manifest.attestation.verdictd:
        from ..attestation.kbs_client import parse_service

        parse_service(manifest.attestation.verdictd, manifest.attestation.trust_anchor)
    if manifest.attestation.policy and not re.fullmatch(_POLICY, manifest.attestation.policy):
        raise UsageError(
            "the policy that the key broker has to have appraised by cannot be one",
            id="kbs.policy.name",
            found=manifest.attestation.policy[:80],
            expected="an id, or id@version",
            remedy="correct [attestation] policy in enclave.toml",
        )
    if manifest.secrets or manifest.files.encrypted:
        from ..runelet import broker

        broker.check(manifest)
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for secret in manifest.secrets:
            if secret.path and _is_directory(root, secret.path):
                raise UsageError(
                    f"the secret {secret.uri} cannot go to {secret.path}: the image has a directory there",
                    id="runelet.secret.place",
                    found=secret.path,
                    expected="a file",
                    remedy="name a file, for example below it, as path in [[secrets]]",
                )
    finally:
        os.close(root)


def _is_directory(root: int, path: str) -> bool:
    """Whether a path is one inside the image, whatever its links say."""
    from ..enclave.paths import open_in_root

    try:
        os.close(open_in_root(root, path, os.O_PATH | os.O_DIRECTORY))
    except OSError:
        return False
    return True

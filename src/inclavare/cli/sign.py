"""``inclavare sign``: sign an enclave image, here or with a key that is kept elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from ._enclaves import image_of, key_option, read_stored, require_stored, signing_key, sigstruct_fields, tls_option
from ._output import Steps, json_option, note, print_fields, print_json
from ._signing import service, service_options

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("sign")
@click.argument("target")
@click.argument("destination", required=False)
@key_option
@click.option("--gendata", type=_FILE, help="Write the 256 bytes that a signer elsewhere signs, and nothing else.")
@click.option(
    "--catsig",
    nargs=2,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="DATA SIGNATURE",
    help="Take a signature that was made elsewhere over the file from --gendata.",
)
@click.option("--public-key", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The signer's, PEM.")
@service_options
@click.option("--force", is_flag=True, help="Replace a destination that exists.")
@tls_option
@json_option
def command(
    *,
    target: str,
    destination: str | None,
    key_path: Path | None,
    gendata: Path | None,
    catsig: tuple[Path, Path] | None,
    public_key: Path | None,
    signing_service: str | None,
    token_file: Path | None,
    ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
    force: bool,
    tls_verify: bool,
    as_json: bool,
) -> None:
    """Sign the enclave image TARGET, which stays as it is otherwise, and write it to DESTINATION or back.

    \b
    With a key that is kept elsewhere:
      inclavare sign IMAGE --gendata data.bin
      openssl dgst -sha256 -sign key.pem -out signature.bin data.bin
      inclavare sign IMAGE --catsig data.bin signature.bin --public-key public.pem
    """
    from ..enclave import oci, signing, stored
    from ..enclave.programs import work_directory
    from ..enclave.reference import Reference
    from ..sgx.measure import measure

    remote = service(signing_service, token_file, ca, client_cert, client_key)
    if sum(way is not None for way in (gendata, catsig, key_path, remote)) > 1:
        raise click.UsageError("Give --key, or --gendata, or --catsig with --public-key, or --signing-service.")
    if (public_key is None) if catsig is not None else (public_key is not None and remote is None):
        raise click.UsageError("--catsig needs --public-key, which belongs to it and to --signing-service.")
    reference = Reference.parse(target)
    if reference.kind != "image" and destination is not None:
        raise click.UsageError("A directory is signed in place; leave DESTINATION out.")
    with Steps() as steps, work_directory() as work:
        found = require_stored(read_stored(reference, work, steps, tls_verify=tls_verify), target)
        # The stored tree's root is what EINIT will see; whether the files agree with it is `measure`'s question.
        manifest = found.manifest
        image = image_of(manifest, found.tree.root)
        mrenclave = measure(image)
        if gendata is not None:
            _write(gendata, signing.unsigned_data(image, manifest, mrenclave=mrenclave))
            note(f"sign {gendata} with RSA-3072 (exponent 3), PKCS#1 v1.5, SHA-256")
            if as_json:
                print_json({"data": str(gendata), "mrenclave": mrenclave.hex()})
            return
        if catsig is not None and public_key is not None:
            data, signature = (path.read_bytes() for path in catsig)
            sigstruct = signing.attach_signature(data, signature, public_key.read_bytes())
            signing.check_sigstruct(sigstruct, image, manifest, mrenclave)
        elif remote is not None:
            data = signing.unsigned_data(image, manifest, mrenclave=mrenclave)
            sigstruct = remote.sign(data, public_key.read_bytes() if public_key else None).to_bytes()
        else:
            sigstruct = signing.sign_image(image, manifest, signing_key(key_path), mrenclave=mrenclave)
        signed = stored.Stored(found.manifest_json, found.tree_bytes, sigstruct, found.source, found.build)
        if reference.kind == "image":
            where = reference if destination is None else Reference.parse(destination, destination=True)
            if where.kind != "image":
                raise click.UsageError("DESTINATION must be an image, like TARGET.")
            if destination is not None:
                oci.check_destination(reference, where, force)
            oci.add_stored(work / "image", work, None, signed, steps)
            oci.push(work / "image", where, force=True, tls_verify=tls_verify, progress=steps)
            written = where.text
        else:
            stored.write(oci.open_source(reference, work, steps).rootfs, signed)
            written = target
    fields = {"image": written, "mrenclave": mrenclave.hex(), **sigstruct_fields(sigstruct)}
    if as_json:
        print_json(fields)
    else:
        print_fields(
            [("image", written), ("MRENCLAVE", mrenclave), ("MRSIGNER", fields["mrsigner"]), ("date", fields["date"])]
        )


def _write(path: Path, content: bytes) -> None:
    from ..enclave.paths import write_atomically
    from ..errors import UsageError

    try:
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written", id="enclave.signing.write", found=error.strerror) from None

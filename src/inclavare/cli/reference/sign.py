"""``inclavare reference sign``: sign reference values, also by a key that is elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from .._files import read_input, write_output
from .._references import output_option, reference_key_option, signer

_EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command("sign")
@click.argument("bundle")
@reference_key_option
@click.option("--to-be-signed", is_flag=True, help="Write the bytes that a key elsewhere has to sign.")
@click.option("--signature", type=_EXISTING, help="What it made of them: ECDSA with SHA-256 (DER), or Ed25519.")
@click.option("--public-key", type=_EXISTING, help="That key's public half, PEM.")
@output_option
def command(
    *,
    bundle: str,
    key_path: Path | None,
    to_be_signed: bool,
    signature: Path | None,
    public_key: Path | None,
    output_path: Path | None,
) -> None:
    """Sign BUNDLE: a statement that `create --unsigned` made, or a bundle, which has one signature more then."""
    from ...attestation import references, signers

    data = read_input(bundle, references.MAX_BUNDLE)
    if (signature is None) != (public_key is None):
        raise click.UsageError("--signature and --public-key belong together.")
    if to_be_signed + (signature is not None) + (key_path is not None) > 1:
        raise click.UsageError("--key, --to-be-signed and --signature are three ways of one thing.")
    message = references.pae(references.envelope_payload(data))
    if to_be_signed:
        write_output(output_path, message, mode=0o644)
    elif signature is not None and public_key is not None:
        made, key = signature.read_bytes(), signers.load_public_key(public_key.read_bytes(), str(public_key))
        signers.TrustedSigners([key]).verify(message, [(None, made)])
        write_output(output_path, references.attach(data, signers.key_id(key), made), mode=0o644)
    else:
        write_output(output_path, references.sign(data, signer(key_path)), mode=0o644)

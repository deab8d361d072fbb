"""``inclavare attest``: challenge a running enclave container, and print or verify its evidence."""

from __future__ import annotations

from pathlib import Path

import click

from ._appraisals import challenge, finish, hex_bytes, load_policy, policy_option, root_option
from ._output import json_option, note


@click.command("attest")
@click.argument("container")
@policy_option
@root_option
@click.option("--nonce", help="The challenge, hexadecimal, 16 to 64 bytes. [default: 32 random bytes]")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the evidence there.")
@json_option
def command(
    *,
    container: str,
    policy_path: Path | None,
    root_path: Path | None,
    nonce: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Challenge CONTAINER (an id, or its beginning) with a nonce.

    With --policy the evidence is verified and appraised as `verify` does it, with the same exit codes. Without, it is
    printed as JSON, for `inclavare verify -`.
    """
    from ..attestation import verify

    chosen = None if nonce is None else hex_bytes(nonce, "--nonce", 16, 64)
    policy = None if policy_path is None else load_policy(policy_path, root_path)
    _, used, evidence = challenge(container, chosen)
    if output is not None:
        output.write_text(evidence.to_json())
    if policy is not None:
        finish(verify(evidence, policy, nonce=used), as_json=as_json)
        return
    if output is None:
        click.echo(evidence.to_json())
    note(f"not verified: inclavare verify {output or '-'} --nonce {used.hex()} --policy FILE")

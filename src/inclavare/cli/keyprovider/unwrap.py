"""``inclavare keyprovider unwrap``: unwraps keys of image layers with what verdictd releases to this enclave."""

from __future__ import annotations

from pathlib import Path

import click

from ._serve import until_signal


@click.command("unwrap")
@click.option("--socket", type=click.Path(path_type=Path), required=True, help="Where to listen; mode 0600.")
@click.option("--verdictd", "url", required=True, help="https://host[:port][/t/<tenant>]")
@click.option("--trust-anchor", required=True, help="PEM file or SHA-256 fingerprint of its certificate.")
@click.option("--tee", default="sgx", show_default=True, help="This enclave's platform.")
@click.option("--collateral", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Sent along; JSON.")
@click.option("--policy", default="", help="The policy that it has to have appraised by.")
def command(*, socket: Path, url: str, trust_anchor: str, tee: str, collateral: Path | None, policy: str) -> None:
    """Serve UnWrapKey in an enclave container, so that images are decrypted in it and nowhere else."""
    from ...attestation.kbs_client import KbsClient
    from ...sdk.ratls import EnclaveAttester
    from ...verdict.keyprovider import Server, Unwrapper

    anchor = Path(trust_anchor)
    text = anchor.read_text("utf-8") if anchor.is_file() else trust_anchor
    client = KbsClient(url, text, EnclaveAttester(collateral), tee=tee, policy=policy)
    try:
        until_signal(lambda: Server(Unwrapper(client), socket.absolute()))
    finally:
        client.close()

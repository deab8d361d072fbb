"""``inclavare keyprovider wrap``: has keys of image layers wrapped by verdictd, for whoever encrypts images."""

from __future__ import annotations

from pathlib import Path

import click

from ._serve import until_signal

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command("wrap")
@click.option("--socket", type=click.Path(path_type=Path), required=True, help="Where to listen; mode 0600.")
@click.option("--verdictd", "address", required=True, help="Its key provider, HOST:PORT.")
@click.option("--trust-anchor", type=_FILE, required=True, help="PEM: its certificate, or its authority.")
@click.option("--token-file", type=_FILE, required=True, help="An operator's token; mode 0600.")
@click.option("--tenant", default="default", show_default=True)
def command(*, socket: Path, address: str, trust_anchor: Path, token_file: Path, tenant: str) -> None:
    """Serve WrapKey, so that `skopeo copy --encryption-key provider:attestation-agent:keyid=kbs:///repo/image_key/tag`
    works. The key-encryption key never leaves verdictd."""
    from ...enclave.signing_access import read_private
    from ...verdict.keyprovider import Forwarder, Server

    def token() -> str:
        return read_private(token_file, "keyprovider.token").decode("ascii", "replace").strip()

    token()
    forwarder = Forwarder(address, trust_anchor.read_bytes(), token, tenant=tenant)
    try:
        until_signal(lambda: Server(forwarder, socket.absolute()))
    finally:
        forwarder.close()

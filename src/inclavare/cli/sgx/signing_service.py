"""``inclavare sgx signing-service``: a service that signs enclaves with a key that stays on its machine."""

from __future__ import annotations

from pathlib import Path

import click

from .._fields import hexadecimal

_FILE = click.Path(path_type=Path, dir_okay=False)
_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("signing-service")
def command() -> None:
    """A service that signs enclaves with a key that stays on its machine.

    \b
    On the key's machine:
      inclavare sgx signing-service add-token ci --token-file tokens > ci.token
      inclavare sgx signing-service serve --key key.pem --token-file tokens
    On the caller's, which has ci.token (mode 0600) and the service's tls-cert.pem:
      inclavare sgx sign enclave.sgxs --signing-service https://HOST:8443 --token-file ci.token --ca tls-cert.pem
    """


@command.command("serve")
@click.option("--key", "key_path", type=_EXISTING, required=True, help="Signing key: RSA-3072, exponent 3, PEM, 0600.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8443, show_default=True, help="0: any.")
@click.option("--token-file", type=_EXISTING, help="Callers' tokens (see add-token): each request must bring one.")
@click.option("--client-ca", type=_EXISTING, help="PEM: each connection must bring a certificate of this authority.")
@click.option("--tls-cert", type=_EXISTING, help="The service's certificate, PEM. [default: a self-made one]")
@click.option("--tls-key", type=_EXISTING, help="Key of --tls-cert, PEM.")
@click.option("--name", "names", multiple=True, help="Host name or address for the self-made certificate.")
@click.option("--state", type=click.Path(path_type=Path, file_okay=False), help="Where the self-made one is kept.")
@click.option("--audit-log", type=_FILE, help="A JSON line for each decision. [default: standard error]")
@click.option("--rate", type=click.IntRange(1), default=60, show_default=True, help="Signatures a minute per caller.")
@click.option(
    "--allow",
    type=click.Choice(["DEBUG", "PROVISIONKEY", "EINITTOKENKEY"]),
    multiple=True,
    help="Sign enclaves with this attribute, or whose loader may switch it on.",
)
@click.option("--vendor", type=click.Choice(["0", "0x8086"]), multiple=True, help="VENDOR that is signed. [default: 0]")
@click.option("--isv-prod-id", type=click.IntRange(0, 65535), multiple=True, help="Sign this product only.")
@click.option("--mrenclave", type=hexadecimal(32), multiple=True, help="Sign this enclave only.")
@click.option("--mrenclave-file", type=_EXISTING, help="Sign the enclaves of this file only: one MRENCLAVE a line.")
def serve(
    *,
    key_path: Path,
    host: str,
    port: int,
    token_file: Path | None,
    client_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    names: tuple[str, ...],
    state: Path | None,
    audit_log: Path | None,
    rate: int,
    allow: tuple[str, ...],
    vendor: tuple[str, ...],
    isv_prod_id: tuple[int, ...],
    mrenclave: tuple[bytes, ...],
    mrenclave_file: Path | None,
) -> None:
    """Serve until SIGTERM or SIGINT. Callers are known by their token, by their certificate, or must bring both.

    Enclaves are signed if their signer rules out DEBUG, PROVISIONKEY and EINITTOKENKEY (see --allow).
    """
    import signal
    import sys

    from ... import serving
    from ...config import load
    from ...enclave import signing, signing_access, signing_service
    from .._output import note

    if token_file is None and client_ca is None:
        raise click.UsageError("Give --token-file, --client-ca or both: the service must know its callers.")
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together.")
    signing_access.read_private(key_path, "enclave.signing.key")
    key = signing.load_key(key_path)
    if token_file is not None:
        signing_access.read_tokens(token_file)
    if tls_cert is None or tls_key is None:
        directory = state or load().state_dir / "signing-service"
        wanted = (*names, *(() if host in ("0.0.0.0", "::") else (host,)))  # noqa: S104
        tls_cert, tls_key = serving.own_certificate(directory, wanted, common_name="inclavare signing service")
    listed = mrenclave_file.read_text("utf-8").split() if mrenclave_file else []
    hashes = frozenset((*mrenclave, *(hexadecimal(32)(text) for text in listed)))
    policy = signing_access.SigningPolicy(
        attributes=frozenset(allow),
        vendors=frozenset(int(text, 0) for text in vendor) or frozenset({0}),
        isv_prod_ids=frozenset(isv_prod_id) or None,
        mrenclaves=hashes if mrenclave or mrenclave_file else None,
    )
    settings = signing_service.Settings(key, tls_cert, tls_key, token_file, client_ca, policy, rate, audit_log)
    server = signing_service.server(settings)
    with serving.listen(host, port) as listening:
        # uvicorn raises the signal that ended it once more; by then all is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        note(f"certificate {tls_cert}, SHA-256 {serving.fingerprint(tls_cert)}")
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"listening on https://{shown}:{listening.getsockname()[1]}")
        sys.stdout.flush()
        server.run(sockets=[listening])


@command.command("add-token")
@click.argument("name")
@click.option("--token-file", type=_FILE, required=True, help="Made with mode 0600; holds the tokens' SHA-256 only.")
def add_token(*, name: str, token_file: Path) -> None:
    """Make a token for the caller NAME and print it. Running services take it at once."""
    from ...enclave import signing_access

    click.echo(signing_access.add_token(token_file, name))


@command.command("remove-token")
@click.argument("name")
@click.option("--token-file", type=_EXISTING, required=True)
def remove_token(*, name: str, token_file: Path) -> None:
    """Take the token of the caller NAME away. Running services refuse it at once."""
    from ...enclave import signing_access

    signing_access.remove_token(token_file, name)

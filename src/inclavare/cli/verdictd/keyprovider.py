"""``inclavare verdictd keyprovider``: serve ocicrypt's WrapKey to operators, over TLS."""

from __future__ import annotations

from pathlib import Path

import click

from ..keyprovider._serve import until_signal
from ._service import config_option, load, opened


@click.command("keyprovider")
@config_option
@click.option("--listen", "address", default="127.0.0.1:8444", show_default=True, help="HOST:PORT")
def command(*, config_path: Path | None, address: str) -> None:
    """Serve ocicrypt's WrapKey (gRPC) with verdictd's certificate and store, until SIGTERM or SIGINT.

    Callers show an operator's token; `inclavare keyprovider wrap` does it for skopeo. Keys are unwrapped nowhere but in
    the enclaves that they are released to.
    """
    from ...verdict.keyprovider import Server, Wrapper

    config = load(config_path)
    with opened(config) as store:
        certificate = (config.certificate, config.certificate_key)
        until_signal(lambda: Server(Wrapper(config, store), address, certificate))

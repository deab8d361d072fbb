"""Options of commands that have something signed by a signing service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..enclave.signing_client import SigningService

_F = TypeVar("_F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def service_options(function: _F) -> _F:
    """``--signing-service`` and how to meet it, as parameters of :func:`service`."""
    for option in (
        click.option("--client-key", type=_FILE, help="Key of --client-cert, PEM."),
        click.option("--client-cert", type=_FILE, help="Certificate to show the signing service, PEM."),
        click.option("--ca", type=_FILE, help="The signing service's certificate or its authority's, PEM."),
        click.option("--token-file", type=_FILE, help="File with the token for the signing service, mode 0600."),
        click.option("--signing-service", metavar="URL", help="Have it signed by this signing service."),
    ):
        function = option(function)
    return function


def service(
    signing_service: str | None,
    token_file: Path | None,
    ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
) -> SigningService | None:
    """The signing service of these options; ``None`` if none was named."""
    if signing_service is None:
        if token_file or ca or client_cert or client_key:
            raise click.UsageError("--token-file, --ca, --client-cert and --client-key belong to --signing-service.")
        return None
    from ..enclave.signing_client import SigningService

    return SigningService(signing_service, token_file, ca, client_cert, client_key)

"""``inclavare verdict login``: remember a service, how it is known again, and a token for it."""

from __future__ import annotations

import hmac
import re
import ssl
import sys
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import click

from ...errors import IntegrityError, UsageError
from .._files import read_input
from .._output import json_option
from ._client import Client, Login, show

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("login")
@click.argument("url")
@click.option("--ca", "ca_path", type=_FILE, help="PEM: the service's certificate, or its authority's.")
@click.option("--fingerprint", help="SHA-256 of the service's certificate, as `verdictd init` shows it.")
@click.option("--token-file", type=_FILE, help="[default: standard input]")
@click.option("--tenant", default="default", show_default=True, help="What commands are about by default.")
@json_option
def command(
    *, url: str, ca_path: Path | None, fingerprint: str | None, token_file: Path | None, tenant: str, as_json: bool
) -> None:
    """Remember the service at URL (https://host:port) in ~/.config/inclavare/verdict.json, mode 0600.

    Without --ca and --fingerprint the system's authorities must vouch for it. The service is asked first.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise UsageError("this is not the URL of a service", id="verdict.login.url", found=url,
                         expected="https://host:port")  # fmt: skip
    if ca_path is not None and fingerprint is not None:
        raise click.UsageError("--ca or --fingerprint, not both.")
    certificate = ca_path.read_text("utf-8", "replace") if ca_path is not None else ""
    if fingerprint is not None:
        certificate = _pinned(parts.hostname, parts.port or 443, fingerprint)
    login = Login(f"https://{parts.netloc}", certificate, tenant, _token(token_file))
    found = Client(login).call("GET", "/info")
    login.save()
    if as_json:
        show({**found, "file": str(login.path())}, as_json)
    else:
        grants = ", ".join(f"{grant['role']} of {grant['tenant']}" for grant in found["grants"])
        show({"service": url, "actor": found["actor"], "roles": grants, "file": login.path()}, as_json)


def _token(path: Path | None) -> str:
    if path is None and sys.stdin.isatty():
        text: str = click.prompt("token", hide_input=True)
    else:
        text = read_input(path or "-", 16 << 10).decode("ascii", "replace")
    if not re.fullmatch(r"[A-Za-z0-9_=.-]+", text.strip()):
        raise UsageError(
            "this is not a token",
            id="verdict.login.token",
            expected="a JWT, in one line",
            remedy="name its file with --token-file",
        )
    return text.strip()


def _pinned(host: str, port: int, fingerprint: str) -> str:
    """The certificate that the service shows, if it is this one."""
    wanted = fingerprint.removeprefix("sha256:").replace(":", "").strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise UsageError(
            "this is no SHA-256 fingerprint",
            id="verdict.login.fingerprint",
            found=fingerprint,
            expected="64 hexadecimal digits",
            remedy="take it from what `inclavare verdictd init` showed",
        )
    try:
        pem = ssl.get_server_certificate((host, port), timeout=30)
    except OSError as error:
        raise UsageError("the service cannot be reached", id="verdict.client.unreachable",
                         found=error.strerror or str(error),
                         remedy="start it, or correct the URL") from None  # fmt: skip
    found = sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    if not hmac.compare_digest(found, wanted):
        raise IntegrityError(
            "the service shows another certificate",
            id="verdict.client.certificate",
            found=found,
            expected=wanted,
            remedy="compare with the fingerprint that `inclavare verdictd init` shows on the service's machine",
        )
    return pem

"""``inclavare proxy``: an attested TLS channel in front of any TCP program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InclavareError
from ..log import EventLog
from ._appraisals import load_policy, root_option
from ._output import json_option

if TYPE_CHECKING:
    from ..attestation.collateral import CollateralSource

_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


class _Address(click.ParamType[tuple[str, int]]):
    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


@click.command("proxy")
@click.argument("mode", type=click.Choice(["server", "client"]))
@click.option("--listen", type=_Address(), required=True, help="Where connections are taken; port 0: any.")
@click.option("--connect", type=_Address(), required=True, help="Where they go.")
@click.option("-p", "--policy", "policy_path", type=_EXISTING,
              help="Which enclaves are accepted (TOML). A server without takes any client.")  # fmt: skip
@root_option
@click.option("--attest", is_flag=True, help="client: show this enclave's evidence, too. A server always does.")
@click.option("--collateral", "collateral_path", type=_EXISTING,
              help="Collateral (JSON) for peers that bring none.")  # fmt: skip
@click.option("--pccs", metavar="URL", help="PCCS to ask for the collateral of peers that bring none.")
@click.option("--endorsements", type=_EXISTING,
              help="Collateral (JSON) that goes out with this enclave's evidence.  [default: the platform's]",
)  # fmt: skip
@click.option("--legacy", is_flag=True, help="server: Gramine's extension in the certificate, too.")
@click.option("--certificate-only", type=click.IntRange(1), metavar="SECONDS",
              help="Accept peers that answer no challenges, with certificates valid for so long.")  # fmt: skip
@click.option("--reattest", type=click.IntRange(2), default=3600, show_default=True, metavar="SECONDS",
              help="How long a peer's evidence counts; connections go on with new evidence only.")  # fmt: skip
@click.option("--max-connections", type=click.IntRange(1), default=1024, show_default=True, help="More are closed.")
@click.option("--handshake-timeout", type=click.FloatRange(0.1), default=10.0, show_default=True, metavar="SECONDS",
              help="For TCP, TLS and evidence.")  # fmt: skip
@click.option("--idle", type=click.FloatRange(0.1), default=600.0, show_default=True, metavar="SECONDS",
              help="Connections without data for so long are closed.")  # fmt: skip
@click.option("--drain", type=click.FloatRange(0.0), default=10.0, show_default=True, metavar="SECONDS",
              help="How long connections may go on after SIGTERM.")  # fmt: skip
@click.option("--log", "log_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write the JSON lines there.")  # fmt: skip
@json_option
def command(
    *,
    mode: str,
    listen: tuple[str, int],
    connect: tuple[str, int],
    policy_path: Path | None,
    root_path: Path | None,
    attest: bool,
    collateral_path: Path | None,
    pccs: str | None,
    endorsements: Path | None,
    legacy: bool,
    certificate_only: int | None,
    reattest: int,
    max_connections: int,
    handshake_timeout: float,
    idle: float,
    drain: float,
    log_path: Path | None,
    as_json: bool,
) -> None:
    """Put an attested TLS 1.3 channel in front of a program that speaks plain TCP.

    \b
    In the server's enclave container:
      inclavare proxy server --listen 0.0.0.0:8443 --connect 127.0.0.1:5432
    Beside the client:
      inclavare proxy client --listen 127.0.0.1:5432 --connect db:8443 --policy db.toml
    Mutual: add --policy clients.toml to the server, and --attest to the client, which then runs in an enclave, too.

    The plain side is always this machine's loopback. Each peer is verified before a connection is passed on;
    standard output tells of each peer that was accepted or refused, and why: a line each, JSON with --json.
    """
    import asyncio

    from ..attestation.ratls import client_context, proxy, server_context
    from ..sdk.ratls import EnclaveAttester

    policy = None if policy_path is None else load_policy(policy_path, root_path)
    if mode == "client" and policy is None:
        raise click.UsageError("A client needs --policy: a peer that nobody describes cannot be verified.")
    if collateral_path is not None and pccs is not None:
        raise click.UsageError("Give --collateral or --pccs.")
    attester = EnclaveAttester(endorsements) if mode == "server" or attest else None
    source = _source(collateral_path, pccs)
    if policy is not None and mode == "client":
        context = client_context(
            policy, attester=attester, collateral=source, certificate_only=certificate_only, lifetime=reattest
        )
    else:
        assert attester is not None
        context = server_context(
            attester,
            policy=policy,
            collateral=source,
            certificate_only=certificate_only,
            lifetime=reattest,
            legacy=legacy,
        )
    settings = proxy.Settings(
        listen=listen,
        connect=connect,
        context=context,
        connections=max_connections,
        handshake_seconds=handshake_timeout,
        idle_seconds=idle,
        drain_seconds=drain,
    )
    asyncio.run(proxy.run(settings, _teller(log_path, mode, as_json=as_json)))


def _source(path: Path | None, pccs: str | None) -> CollateralSource | None:
    from ..attestation import collateral

    if path is not None:
        return collateral.FileSource(path)
    return None if pccs is None else collateral.CachedSource(collateral.PccsSource(pccs))


def _teller(path: Path | None, mode: str, *, as_json: bool) -> Callable[..., None]:
    """Writes events to standard output, and as JSON lines to the log."""
    log = EventLog(path, proxy=mode)

    def tell(event: str, **fields: Any) -> None:
        level = "warning" if event in ("proxy.refused", "proxy.broken", "proxy.full") else "info"
        log.event(event, level=level, **fields)
        if as_json:
            click.echo(json.dumps({"event": event, **fields}))
        else:
            if "reason" in fields:
                fields["reason"] = InclavareError.from_dict(fields["reason"]).one_line()
            shown = ", ".join(f"{key} {_short(value)}" for key, value in fields.items() if value is not None)
            click.echo(f"{event.partition('.')[2]}: {shown}")
        sys.stdout.flush()

    return tell


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return str(value)

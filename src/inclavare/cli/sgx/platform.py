"""``inclavare sgx platform``: the simulated platform: identity, certificates, security, and its collateral service."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import click

from .._fields import hexadecimal
from .._files import output_option, write_output
from .._output import json_option, note, print_fields, print_json, print_table, size

_names = click.Choice(["sgx", "sgx-sim"])
_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("platform")
def command() -> None:
    """The simulated platform: identity, certificates, security, and its collateral service."""


@command.command("init")
@click.option("--epc-size", help='EPC that the firmware reserves, e.g. "256M". [default: the configuration\'s]')
@click.option("--cpusvn", type=hexadecimal(16), help="Security versions of the 16 TCB components, hexadecimal.")
@click.option("--fmspc", type=hexadecimal(6), help="Family, model, stepping, platform, SKU: 12 hexadecimal digits.")
@json_option
def init(*, epc_size: str | None, cpusvn: bytes | None, fmspc: bytes | None, as_json: bool) -> None:
    """Make a simulated platform. Without this command one is made at first use."""
    from ...config import load, parse_size
    from ...tee.sgx_sim import fuses, life

    try:
        wanted = None if epc_size is None else parse_size(epc_size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--epc-size") from None
    config = load()
    life.initialise(config, epc_size=wanted, cpusvn=cpusvn or fuses.CPUSVN, fmspc=fmspc or fuses.FMSPC)
    _show("sgx-sim", as_json=as_json)


@command.command("show")
@click.option("--tee", type=_names, default="sgx-sim", show_default=True)
@click.option("--root-ca", is_flag=True, help="Print the root CA certificate (PEM), a relying party's trust anchor.")
@click.option("--collateral", is_flag=True, help="Print the collateral for quotes of this platform (JSON).")
@click.option("--tdx", is_flag=True, help="With --collateral: for TDX quotes of the simulated platform.")
@json_option
def show(*, tee: str, root_ca: bool, collateral: bool, tdx: bool, as_json: bool) -> None:
    """Show a platform; its keys are made at first use."""
    from ...config import load
    from ...tee.base import usable_platform

    if tdx and (not collateral or tee != "sgx-sim"):
        raise click.UsageError("--tdx goes with --collateral, of sgx-sim.")
    if root_ca:
        click.echo(_pem(usable_platform(tee, load()).root_ca()), nl=False)
    elif tdx:
        from ...tee.sgx_sim import create

        print_json(create(load()).td_collateral())
    elif collateral:
        print_json(usable_platform(tee, load()).collateral())
    else:
        _show(tee, as_json=as_json)


@command.command("reset")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def reset(*, yes: bool, as_json: bool) -> None:
    """Remove the simulated platform. What was sealed on it is lost; who trusted its root trusts nothing any more."""
    from ...config import load
    from ...tee.sgx_sim import life

    config = load()
    removed = life.exists(config)
    if removed:
        note(
            f"this removes {config.platform_dir}: the fuse keys, and with them everything that enclaves have sealed, "
            "sealed:… volumes too; monotonic counters; and the root CA that policies name as trust_anchor"
        )
        if not yes:
            click.confirm("Remove the platform?", abort=True, err=True)
        life.reset(config)
    if as_json:
        print_json({"removed": removed, "state": str(config.platform_dir)})
    else:
        note("removed; the next use makes a new platform" if removed else "there was no platform")


@command.command("set-tcb")
@click.option("--status", help="TCB status: UpToDate, SWHardeningNeeded, … Revoked. Without --advisory, none apply.")
@click.option("--advisory", "advisories", multiple=True, metavar="ID", help="An advisory that applies.")
@click.option("--qe-status", help="Status of the quoting enclaves: UpToDate, OutOfDate or Revoked.")
@click.option("--qe-advisory", "qe_advisories", multiple=True, metavar="ID", help="An advisory that applies to them.")
@click.option("--pck-revoked/--pck-valid", default=None, help="Whether the PCK certificates are in the CRL.")
@click.option("--collateral-expired/--collateral-fresh", default=None, help="Whether the collateral is of last month.")
@click.option("--evaluation-number", type=int, help="TCB evaluation data number.")
@click.option("--cpusvn", type=hexadecimal(16), help="A microcode update: other sealing keys, another certificate.")
@json_option
def set_tcb(
    *,
    status: str | None,
    advisories: tuple[str, ...],
    qe_status: str | None,
    qe_advisories: tuple[str, ...],
    pck_revoked: bool | None,
    collateral_expired: bool | None,
    evaluation_number: int | None,
    cpusvn: bytes | None,
    as_json: bool,
) -> None:
    """Change what the platform's collateral says of its security, to test a policy. The rest stays as it is."""
    from ...config import load
    from ...tee.sgx_sim import life

    changes: dict[str, Any] = {
        "status": status,
        "qe_status": qe_status,
        "pck_revoked": pck_revoked,
        "collateral_expired": collateral_expired,
        "evaluation_number": evaluation_number,
        # A new status comes with its own advisories.
        "advisories": advisories if advisories or status else None,
        "qe_advisories": qe_advisories if qe_advisories or qe_status else None,
    }
    life.set_tcb(load(), cpusvn=cpusvn, **{key: value for key, value in changes.items() if value is not None})
    _show("sgx-sim", as_json=as_json)


@command.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="0: any.")
@click.option("--tls-cert", type=_EXISTING, help="The service's certificate (chain), PEM.")
@click.option("--tls-key", type=_EXISTING, help="Key of --tls-cert, PEM.")
@json_option
def serve(*, host: str, port: int, tls_cert: Path | None, tls_key: Path | None, as_json: bool) -> None:
    """Serve the platform's collateral as a PCCS does (API version 4), until SIGTERM or SIGINT.

    Quote provider library and verifiers take it with pccs_url, in /etc/sgx_default_qcnl.conf, or PCCS_URL. Without TLS
    it listens on loopback only.
    """
    import signal
    import sys

    from ...config import load
    from ...tee.sgx_sim import pccs

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together.")
    tls = None if tls_cert is None or tls_key is None else pccs.tls_context(tls_cert, tls_key)
    server = pccs.server(load(), tls)
    with pccs.listen(host, port, plain=tls is None) as listening:
        # uvicorn raises the signal that ended it once more; by then all is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if tls else 'http'}://{shown}:{listening.getsockname()[1]}{pccs.SGX}/"
        if as_json:
            print_json({"pccs_url": url})
        else:
            click.echo(f"pccs_url {url}")
        sys.stdout.flush()
        server.run(sockets=[listening])


@command.command("td-quote")
@click.option("--report-data", default="", metavar="HEX", help="Up to 64 bytes; zeros follow.")
@click.option("--mrtd", type=hexadecimal(48), required=True, metavar="HEX", help="Measurement of the TD, 48 bytes.")
@click.option("--rtmr", "rtmrs", type=hexadecimal(48), multiple=True, metavar="HEX", help="RTMR0, then RTMR1 …")
@click.option("--mr-config-id", type=hexadecimal(48), metavar="HEX", help="MRCONFIGID, 48 bytes.")
@click.option("--mr-owner", type=hexadecimal(48), metavar="HEX", help="MROWNER, 48 bytes.")
@click.option("--mr-owner-config", type=hexadecimal(48), metavar="HEX", help="MROWNERCONFIG, 48 bytes.")
@click.option("--debug", is_flag=True, help="A TD that its host can debug.")
@output_option
def td_quote(
    *,
    report_data: str,
    mrtd: bytes,
    rtmrs: tuple[bytes, ...],
    mr_config_id: bytes | None,
    mr_owner: bytes | None,
    mr_owner_config: bytes | None,
    debug: bool,
    output_path: Path | None,
) -> None:
    """Issue a TDX quote (version 4) of a trust domain that exists in these options only, to test verifiers.

    Its collateral: inclavare sgx platform show --collateral --tdx.
    """
    from ...config import load
    from ...sgx.tdx import TD_DEBUG, TD_SEPT_VE_DISABLE
    from ...tee.sgx_sim import create
    from .._appraisals import hex_bytes

    optional = {"config_id": mr_config_id, "owner": mr_owner, "owner_config": mr_owner_config}
    quote = create(load()).td_quote(
        hex_bytes(report_data, "--report-data", 0, 64).ljust(64, b"\0"),
        mrtd,
        rtmrs,
        attributes=TD_SEPT_VE_DISABLE | (TD_DEBUG if debug else 0),
        **{key: value for key, value in optional.items() if value is not None},
    )
    write_output(output_path, quote, mode=0o644)


def _show(tee: str, *, as_json: bool) -> None:
    from hashlib import sha256

    from ...config import load
    from ...tee.base import usable_platform

    config = load()
    found = usable_platform(tee, config)
    fields: dict[str, Any] = {
        "tee": found.name,
        "simulated": found.simulated,
        "root_ca_sha256": sha256(found.root_ca()).hexdigest(),
    }
    if tee == "sgx-sim":
        from ...tee.sgx_sim import life

        about = life.describe(config)
        fields |= {"epc_bytes": about["epc"]["bytes"], "state": str(config.platform_dir), **about}
    if as_json:
        print_json(fields)
    elif tee == "sgx-sim":
        _print(fields)
    else:
        print_fields(fields.items())


def _print(about: dict[str, Any]) -> None:
    """The simulated platform, for people."""
    epc, tcb, qe, pck = about["epc"], about["tcb"], about["qe"], about["pck"]
    collateral, root = about["collateral"], about["root_ca"]
    expired = ", EXPIRED" if collateral["expired"] else ""
    print_fields(
        [
            ("tee", f"{about['tee']}, simulated: nothing here proves anything about hardware"),
            ("state", about["state"]),
            ("EPC", f"{size(epc['bytes'])}, {epc['used_pages']} of {epc['pages']} pages used"),
            ("", epc["e820"]),
            ("CPUSVN", about["cpusvn"]),
            ("PPID", about["ppid"]),
            ("FMSPC", about["fmspc"]),
            ("PCE-ID", f"{about['pce_id']}, PCE SVN {about['pce']['svn']}"),
            ("PCK certificate", f"serial {pck['serial']}{', REVOKED' if pck['revoked'] else ''}"),
            ("", f"valid from {pck['not_before']} to {pck['not_after']}"),
            ("TCB", _status(tcb)),
            ("", f"level of {tcb['date']}, evaluation data number {tcb['evaluation_number']}"),
            ("QE", f"SVN {qe['svn']}, {_status(qe)}"),
            ("collateral", f"{collateral['issued']} to {collateral['next_update']}{expired}"),
            ("root CA", f"SHA-256 {root['sha256']}"),
            ("", f"valid from {root['not_before']} to {root['not_after']}"),
        ]
    )
    if epc["holders"]:
        rows = [(entry["label"], entry["pages"], entry["pid"]) for entry in epc["holders"]]
        print_table(("enclave", "EPC pages", "pid"), rows)


def _status(said: dict[str, Any]) -> str:
    advisories = ", ".join(said["advisories"])
    return f"{said['status']} ({advisories})" if advisories else str(said["status"])


def _pem(certificate: bytes) -> str:
    text = base64.b64encode(certificate).decode()
    lines = "\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"

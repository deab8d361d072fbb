"""``inclavare sgx verify-quote``: verify a quote with collateral from a PCCS, and appraise it under a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from .._appraisals import (
    at_option,
    collateral_option,
    collateral_source,
    finish,
    hex_bytes,
    load_policy,
    moment,
    pccs_option,
    policy_option,
    read_collateral,
    report_data_option,
    root_option,
)
from .._files import FILE, read_input
from .._output import json_option
from ._quotes import quote_type_option

#: Bytes; a quote with its certificates has about five thousand.
MAX_QUOTE = 1 << 20


@click.command("verify-quote")
@quote_type_option
@click.option("--quote", "quote_path", type=FILE, required=True, help="The quote; - is standard input.")
@policy_option
@root_option
@collateral_option
@pccs_option
@click.option(
    "--tee",
    type=click.Choice(["sgx", "sgx-sim"]),
    default="sgx",
    show_default=True,
    help="Whose collateral service to ask where neither is given: sgx, the PCCS that /etc/sgx_default_qcnl.conf names; "
    "sgx-sim, this machine's simulated platform.",
)
@report_data_option
@at_option
@json_option
def command(
    *,
    quote_path: Path,
    policy_path: Path | None,
    root_path: Path | None,
    collateral_path: Path | None,
    url: str | None,
    tee: str,
    report_data: str | None,
    at: str | None,
    as_json: bool,
) -> None:
    """Verify a quote as `inclavare verify` does, with its exit codes; only the collateral is looked up.

    Without --policy the default policy applies, which accepts no enclave that it does not name.
    """
    from ...attestation import Evidence, verify
    from ...attestation.policy import Policy

    quote = read_input(quote_path, MAX_QUOTE)
    policy = Policy() if policy_path is None else load_policy(policy_path, None)
    if root_path is not None:
        policy = policy.with_trust_anchor(root_path.read_bytes())
    evidence = Evidence.from_quote(quote)
    collateral = read_collateral(collateral_path) if collateral_path else _collateral(evidence, url, tee)
    result = verify(
        evidence.with_collateral(collateral),
        policy,
        report_data=None if report_data is None else hex_bytes(report_data, "--report-data", 1, 64),
        now=None if at is None else moment(at),
    )
    finish(result, as_json=as_json)


def _collateral(evidence: Any, url: str | None, tee: str) -> Any:
    """From the PCCS, or from the simulated platform where that was named. It is signed; nobody is trusted for it."""
    from ...tee.sgx import pccs

    if url is not None:
        source = collateral_source(url, online=False)
        assert source is not None
        return source.fetch(evidence.quote).parts
    simulated = evidence.tee.endswith("-sim")
    if simulated is not (tee == "sgx-sim"):
        raise UsageError(
            f"this is a quote of {evidence.tee}, and collateral was to come from {tee}",
            id="cli.sgx.tee",
            found=evidence.tee,
            expected=tee,
            remedy=f"give --tee {'sgx-sim' if simulated else 'sgx'} on that machine, or --pccs or --collateral",
        )
    if simulated:
        from ...attestation.collateral import PlatformSource

        return PlatformSource().fetch(evidence.quote).parts
    service, check = pccs.service()
    return pccs.collateral(service, evidence.quote, check_certificate=check)

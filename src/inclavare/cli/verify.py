"""``inclavare verify``: verify a quote, evidence or an RA-TLS certificate, and appraise it under a policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ._appraisals import (
    at_option,
    collateral_option,
    collateral_source,
    finish,
    hex_bytes,
    load_policy,
    moment,
    online_option,
    pccs_option,
    policy_option,
    read_collateral,
    read_evidence,
    report_data_option,
    root_option,
)
from ._output import json_option


@click.command("verify")
@click.argument("evidence_path", metavar="EVIDENCE")
@policy_option
@root_option
@collateral_option
@pccs_option
@online_option
@click.option(
    "--event-log",
    "log_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CC event log of a trust domain; its replay must give the RTMRs.",
)
@click.option("--nonce", help="The challenge that the evidence must answer, hexadecimal.")
@report_data_option
@at_option
@json_option
def command(
    *,
    evidence_path: str,
    policy_path: Path | None,
    root_path: Path | None,
    collateral_path: Path | None,
    url: str | None,
    online: bool,
    log_path: Path | None,
    nonce: str | None,
    report_data: str | None,
    at: str | None,
    as_json: bool,
) -> None:
    """Verify EVIDENCE (a file, or - for standard input).

    It may be evidence as `attest` prints it, a raw SGX or TDX quote, an SEV-SNP report, or an RA-TLS certificate.

    Exit code 0: authentic and accepted. 3: authentic, but the policy refuses it; every failed claim is listed with what
    was found, what was expected and what to do. 4: damaged, forged, expired, or of a root that is not trusted.
    Without --policy the default policy applies, which refuses simulated and debug enclaves, and any that it does not
    name: it is good for looking at evidence.
    """
    from ..attestation import Evidence, verify
    from ..attestation.collateral import Collateral, check_collateral
    from ..attestation.policy import Policy

    evidence = Evidence.load(read_evidence(evidence_path))
    if collateral_path is not None:
        evidence = evidence.with_collateral(
            Collateral(check_collateral(read_collateral(collateral_path)), str(collateral_path))
        )
    if log_path is not None:
        evidence = replace(evidence, event_log=log_path.read_bytes())
    policy = Policy() if policy_path is None else load_policy(policy_path, None)
    if root_path is not None:
        policy = policy.with_trust_anchor(root_path.read_bytes())
    result = verify(
        evidence,
        policy,
        nonce=None if nonce is None else hex_bytes(nonce, "--nonce", 1, 64),
        report_data=None if report_data is None else hex_bytes(report_data, "--report-data", 1, 64),
        now=None if at is None else moment(at),
        collateral=collateral_source(url, online=online),
    )
    finish(result, as_json=as_json)

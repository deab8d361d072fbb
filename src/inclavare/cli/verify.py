"""``inclavare verify``: verify a quote, evidence or an RA-TLS certificate, and appraise it under a policy."""

from __future__ import annotations

from pathlib import Path

import click

from ._appraisals import (
    at_option,
    collateral_option,
    finish,
    hex_bytes,
    load_policy,
    moment,
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
    nonce: str | None,
    report_data: str | None,
    at: str | None,
    as_json: bool,
) -> None:
    """Verify EVIDENCE (a file, or - for standard input): evidence as `attest` prints it, a raw quote, or a certificate.

    Exit code 0: authentic and accepted. 3: authentic, but the policy refuses it; every failed claim is listed with what
    was found, what was expected and what to do. 4: damaged, forged, expired, or of a root that is not trusted.
    Without --policy the default policy applies, which refuses simulated and debug enclaves, and any that it does not
    name: it is good for looking at evidence.
    """
    from ..attestation import Evidence, verify
    from ..attestation.policy import Policy

    evidence = Evidence.load(read_evidence(evidence_path))
    if collateral_path is not None:
        evidence = evidence.with_collateral(read_collateral(collateral_path))
    policy = Policy() if policy_path is None else load_policy(policy_path, None)
    if root_path is not None:
        policy = policy.with_trust_anchor(root_path.read_bytes())
    result = verify(
        evidence,
        policy,
        nonce=None if nonce is None else hex_bytes(nonce, "--nonce", 1, 64),
        report_data=None if report_data is None else hex_bytes(report_data, "--report-data", 1, 64),
        now=None if at is None else moment(at),
    )
    finish(result, as_json=as_json)

"""``inclavare verify``: verify a quote, evidence or an RA-TLS certificate, and appraise it under a policy."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from ..errors import UsageError
from ._appraisals import finish, hex_bytes, load_policy, policy_option, root_option
from ._output import json_option


@click.command("verify")
@click.argument("evidence_path", metavar="EVIDENCE")
@policy_option
@root_option
@click.option(
    "--collateral",
    "collateral_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Collateral (JSON), for a quote or certificate that carries none.",
)
@click.option("--nonce", help="The challenge that the evidence must answer, hexadecimal.")
@click.option("--report-data", help="What the report data must be, hexadecimal; zero-padded to 64 bytes.")
@click.option("--at", help="Verify for this time instead of now: seconds since 1970 or 2026-01-31T12:00:00Z.")
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

    evidence = Evidence.load(_read(evidence_path))
    if collateral_path is not None:
        try:
            evidence = evidence.with_collateral(json.loads(collateral_path.read_bytes()))
        except ValueError as error:
            raise UsageError(
                f"{collateral_path} is not JSON", id="cli.verify.collateral", found=error, expected="collateral as JSON"
            ) from None
    policy = Policy() if policy_path is None else load_policy(policy_path, None)
    if root_path is not None:
        policy = policy.with_trust_anchor(root_path.read_bytes())
    result = verify(
        evidence,
        policy,
        nonce=None if nonce is None else hex_bytes(nonce, "--nonce", 1, 64),
        report_data=None if report_data is None else hex_bytes(report_data, "--report-data", 1, 64),
        now=None if at is None else _time(at),
    )
    finish(result, as_json=as_json)


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read(16 << 20)
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read", id="cli.verify.file", found=error.strerror) from None


def _time(text: str) -> int:
    try:
        if text.isdigit():
            return int(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            "--at is not a time", id="cli.verify.time", found=text, expected="1767225600 or 2026-01-01T00:00:00Z"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

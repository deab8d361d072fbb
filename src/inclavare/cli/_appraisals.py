"""What the commands that challenge, verify and release share."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError

if TYPE_CHECKING:
    from ..attestation import Appraisal, CollateralSource, Evidence
    from ..attestation.policy import Policy

policy_option = click.option(
    "-p",
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Appraisal policy (TOML).",
)
root_option = click.option(
    "--root-ca",
    "root_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Root CA of a simulated platform, PEM or DER; as trust_anchor in the policy. Never used for hardware.",
)
collateral_option = click.option(
    "--collateral",
    "collateral_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Collateral for evidence that carries none: JSON; for an SEV-SNP report also the VCEK or VLEK, PEM or DER.",
)
pccs_option = click.option("--pccs", "url", metavar="URL", help="Ask this PCCS, for example https://localhost:8081.")
online_option = click.option(
    "--online", is_flag=True, help="Ask the manufacturer's service: Intel's PCS, or AMD's key distribution service."
)
report_data_option = click.option(
    "--report-data", help="What the report data must be, hexadecimal; zero-padded to 64 bytes."
)
at_option = click.option(
    "--at", help="Verify for this time instead of now: seconds since 1970 or 2026-01-31T12:00:00Z."
)


def read_evidence(name: str) -> bytes:
    """A file's bytes, or standard input's for ``-``.

    Raises:
        UsageError: unreadable.
    """
    if name == "-":
        return sys.stdin.buffer.read(16 << 20)
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read", id="cli.verify.file", found=error.strerror) from None


def read_collateral(path: Path) -> Any:
    """JSON of ``--collateral``.

    Raises:
        UsageError: it is none.
    """
    data = path.read_bytes()
    if data.startswith((b"-----BEGIN", b"\x30")):
        import ssl

        from ..attestation.collateral import SNP_CERTIFICATES_KEY

        pem = data.decode("ascii", "replace") if data.startswith(b"-") else ssl.DER_cert_to_PEM_cert(data)
        return {SNP_CERTIFICATES_KEY: pem}
    try:
        return json.loads(data)
    except ValueError as error:
        raise UsageError(
            f"{path} is not JSON", id="cli.verify.collateral", found=error, expected="collateral as JSON"
        ) from None


def collateral_source(url: str | None, *, online: bool) -> CollateralSource | None:
    """Where collateral is to come from that the evidence does not carry; what was fetched is kept on this node.

    Raises:
        UsageError: not a PCCS's URL.
    """
    from ..attestation.collateral import CachedSource, ChainSource, KdsSource, PccsSource
    from ..config import load

    sources: list[CollateralSource] = []
    if url is not None:
        if not url.startswith(("https://", "http://")):
            raise UsageError("not a PCCS's URL", id="cli.sgx.pccs", found=url, expected="https://HOST:8081")
        sources.append(PccsSource(url))
    if online:
        sources += [PccsSource(), KdsSource()]
    if not sources:
        return None
    state = load().state_dir
    directory = state / "collateral" if state.is_dir() and os.access(state, os.W_OK) else None
    # A PCCS that was named is asked each time: it is near, and the one to test.
    return ChainSource(sources) if url is not None else CachedSource(ChainSource(sources), directory)


def moment(text: str) -> int:
    """Seconds since 1970 of ``--at``.

    Raises:
        UsageError: not a time.
    """
    try:
        if text.isdigit():
            return int(datetime.fromtimestamp(int(text), UTC).timestamp())
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            "--at is not a time", id="cli.verify.time", found=text, expected="1767225600 or 2026-01-01T00:00:00Z"
        ) from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def hex_bytes(text: str, what: str, minimum: int, maximum: int) -> bytes:
    """Bytes of a hexadecimal option.

    Raises:
        UsageError: not hexadecimal, or too few or too many bytes.
    """
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = None
    if value is None or not minimum <= len(value) <= maximum:
        raise UsageError(
            f"{what} is not hexadecimal of the right length",
            id="cli.hex",
            found=text[:80],
            expected=f"{minimum} to {maximum} bytes",
        )
    return value


def load_policy(path: Path, root: Path | None) -> Policy:
    """The policy, with the root CA of the command line if one was named.

    Raises:
        UsageError: see :class:`~inclavare.attestation.policy.Policy`.
    """
    from ..attestation.policy import Policy

    policy = Policy.load(path)
    return policy if root is None else policy.with_trust_anchor(root.read_bytes())


def challenge(container: str, nonce: bytes | None = None) -> tuple[Path, bytes, Evidence]:
    """Challenge a running enclave container with a fresh nonce.

    Returns:
        the container's directory, the nonce (32 bytes where drawn here), the evidence.

    Raises:
        InclavareError: no such container, or its enclave does not answer.
    """
    from ..attestation import Evidence
    from ..config import load
    from ..runelet import client

    directory = client.find(load(), container)
    nonce = nonce or os.urandom(32)
    reply = client.call(directory, {"op": "attest", "nonce": base64.b64encode(nonce).decode()})
    return directory, nonce, Evidence.from_dict(reply["evidence"])


def show_appraisal(appraisal: Appraisal) -> None:
    """The verdict, every failed claim, and the claims."""
    from ._output import print_fields

    verdict = click.style("accepted", fg="green") if appraisal.accepted else click.style("refused", fg="red")
    click.echo(f"{verdict}: {_identity(appraisal.claims.to_dict())}")
    for failure in appraisal.failures:
        parts = ("found", "expected", "reference", "remedy", "id")
        print_fields([(part, getattr(failure, part)) for part in parts], title=f"failed claim: {failure.claim}")
    print_fields(_rows(appraisal.claims.to_dict()), title="claims")


def _identity(claims: dict[str, Any]) -> str:
    if "tdx" in claims:
        what, identity = "trust domain", f"MRTD {claims['tdx']['mr_td']}"
    elif "snp" in claims:
        what, identity = "SEV-SNP guest", f"launch digest {claims['snp']['measurement']}"
    else:
        what, identity = "enclave", f"MRENCLAVE {claims['mrenclave']}"
    article = "a SIMULATED" if claims["simulated"] else "an" if what[0] in "eS" else "a"
    return f"{article} {what} on {claims['tee']}, {identity}"


def _rows(claims: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; what is nested stands under the names of both."""
    for name, value in claims.items():
        if name == "event_log":
            yield name, f"{len(value)} events, which give the RTMRs" if value else "-"
        elif isinstance(value, dict):
            yield from ((f"{name}.{inner}", found) for inner, found in _rows(value))
        elif name == "endorsements":
            yield from ((f"checked with {one['name']}", _endorsement(one)) for one in value)
        else:
            yield name, "-" if value in (None, "", (), []) else _flat(value)


def _endorsement(one: dict[str, Any]) -> str:
    dates = (datetime.fromtimestamp(one[name], UTC).strftime("%Y-%m-%d") for name in ("issued", "next_update"))
    number = "" if one["number"] is None else f", number {one['number']}"
    return f"{' to '.join(dates)}{number}, by {one['issuer']}"


def _flat(value: Any) -> Any:
    return ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else value


def finish(appraisal: Appraisal, *, as_json: bool) -> None:
    """Print the result; exit code 3 if it is a refusal."""
    from ..errors import AppraisalError
    from ._output import print_json

    if as_json:
        print_json(appraisal.to_dict())
    else:
        show_appraisal(appraisal)
    if not appraisal.accepted:
        click.get_current_context().exit(AppraisalError.exit_code)

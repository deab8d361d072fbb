"""Appraisal policies: which authentic enclaves a relying party accepts. Everything that is not allowed is refused.

::

    mrenclave = ["<64 hex digits>"]   # accepted measurements; and/or
    mrsigner = ["<64 hex digits>"]    # accepted signers
    any_enclave = "deny"              # "allow" accepts enclaves of any identity: for looking at evidence only
    isv_prod_id = 0                   # exact product id
    min_isv_svn = 0                   # lowest security version
    debug = "deny"                    # "allow" accepts enclaves whose memory the host can read
    simulated = "deny"                # "allow" accepts enclaves without hardware protection
    trust_anchor = "root.pem"         # root CA of simulated platforms; never used for real ones
    tcb = ["UpToDate"]                # accepted TCB statuses
    max_age = "30d"                   # greatest age of the collateral (s, m, h, d)
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError

TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "NotRated",
)
_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Policy:
    """An appraisal policy; measurements are lower-case hexadecimal, ``max_age`` is in seconds, the anchor is DER."""

    mrenclave: tuple[str, ...] = ()
    mrsigner: tuple[str, ...] = ()
    any_enclave: bool = False
    isv_prod_id: int | None = None
    min_isv_svn: int = 0
    allow_debug: bool = False
    allow_simulated: bool = False
    trust_anchor: bytes | None = None
    tcb: tuple[str, ...] = ("UpToDate",)
    max_age: int | None = None

    @classmethod
    def parse(cls, text: str, name: str = "policy", *, directory: Path | None = None) -> Policy:
        """Read a policy from TOML.

        Args:
            name: what to call it in errors.
            directory: where a relative ``trust_anchor`` path starts; by default the working directory.

        Raises:
            UsageError: not TOML, an unknown key, a wrong type or value, an unreadable trust anchor.
        """
        import tomllib

        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{name}: {error}", id="policy.file.syntax", remedy="correct the file") from None
        values: dict[str, Any] = {}
        for key, value in document.items():
            if key not in _KEYS:
                raise UsageError(
                    f"{name}: unknown key {key}",
                    id="policy.key.unknown",
                    expected=", ".join(_KEYS),
                    remedy="remove it or correct its name; a policy never ignores what it does not understand",
                )
            field, convert = _KEYS[key]
            try:
                values[field] = convert(value)
            except ValueError as error:
                raise UsageError(
                    f"{name}: {key} is wrong", id="policy.key.value", found=repr(value), expected=str(error)
                ) from None
        anchor = values.pop("trust_anchor", None)
        policy = cls(**values)
        if anchor is None:
            return policy
        if anchor.startswith("-----BEGIN"):
            return policy.with_trust_anchor(anchor.encode())
        path = (directory or Path()) / anchor
        try:
            return policy.with_trust_anchor(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"{name}: trust anchor {path} cannot be read", id="policy.trust_anchor.unreadable", found=error.strerror
            ) from None

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy file; a relative ``trust_anchor`` is relative to it.

        Raises:
            UsageError: the file cannot be read, or see :meth:`parse`.
        """
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"policy {path} cannot be read", id="policy.file.unreadable", found=str(error)) from None
        return cls.parse(text, str(path), directory=path.parent)

    def with_trust_anchor(self, certificate: bytes) -> Policy:
        """The same policy with this root CA (PEM or DER) for simulated platforms.

        Raises:
            UsageError: not one certificate.
        """
        blocks = _PEM.findall(certificate)
        try:
            data = base64.b64decode(b"".join(blocks[0].split()), validate=True) if len(blocks) == 1 else certificate
        except binascii.Error:
            data = b""
        if len(blocks) > 1 or data[:1] != b"\x30":
            raise UsageError(
                "the trust anchor is not one certificate",
                id="policy.trust_anchor.malformed",
                found=f"{len(blocks)} PEM certificates, {len(certificate)} bytes",
                expected="one X.509 certificate, PEM or DER",
            )
        return replace(self, trust_anchor=data)


def _measurements(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(item, str) and re.fullmatch(r"[0-9a-fA-F]{64}", item) for item in value
    ):
        raise ValueError("a list of strings of 64 hexadecimal digits")
    return tuple(item.lower() for item in value)


def _allow(value: Any) -> bool:
    if value not in ("allow", "deny"):
        raise ValueError('"allow" or "deny"')
    return bool(value == "allow")


def _uint16(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 0xFFFF:
        raise ValueError("a number from 0 to 65535")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("the path of a PEM file")
    return value


def _statuses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(item in TCB_STATUSES for item in value):
        raise ValueError("a list of some of " + ", ".join(TCB_STATUSES))
    return tuple(value)


def _age(value: Any) -> int:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+)([smhd])", value)):
        return int(match[1]) * _AGE_UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError('seconds, or for example "12h" or "30d"')
    return value


_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "mrenclave": ("mrenclave", _measurements),
    "mrsigner": ("mrsigner", _measurements),
    "any_enclave": ("any_enclave", _allow),
    "isv_prod_id": ("isv_prod_id", _uint16),
    "min_isv_svn": ("min_isv_svn", _uint16),
    "debug": ("allow_debug", _allow),
    "simulated": ("allow_simulated", _allow),
    "trust_anchor": ("trust_anchor", _text),
    "tcb": ("tcb", _statuses),
    "max_age": ("max_age", _age),
}

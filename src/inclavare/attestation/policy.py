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
    image = "registry/app"            # accepted: what signed reference bundles say about this image
    reference_values = ["<id>"]       # accepted: these reference bundles, by id or image

Trust domains and SEV-SNP guests have tables of their own::

    [tdx]
    mr_td = ["<96 hex digits>"]       # accepted measurements; likewise rtmr_0 to rtmr_3, mr_config_id, mr_owner,
                                      # mr_owner_config, mr_seam (48 bytes) and xfam (8 bytes)
    migratable = "deny"               # "allow" accepts trust domains that may move to another platform

    [snp]
    measurement = ["<96 hex digits>"] # likewise id_key_digest, author_key_digest (48 bytes), host_data (32 bytes),
                                      # family_id, image_id (16 bytes)
    min_tcb = {bootloader = 4, tee = 0, snp = 24, microcode = 219}  # AMD rates no TCB: without it, none is accepted
    min_guest_svn = 0                 # lowest security version of the guest
    vmpl = [0]                        # privilege levels that may have asked for the report
    migrate_ma = "deny"               # "allow" accepts guests that a migration agent may move
    smt = "allow"                     # "deny" refuses platforms with simultaneous multithreading
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
from . import identity
from .claims import SnpTcb

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
class TdxPolicy:
    """``[tdx]``: accepted values by name, lower-case hexadecimal."""

    values: tuple[tuple[str, tuple[str, ...]], ...] = ()
    allow_migratable: bool = False


@dataclass(frozen=True, slots=True)
class SnpPolicy:
    """``[snp]``: accepted values by name, lower-case hexadecimal."""

    values: tuple[tuple[str, tuple[str, ...]], ...] = ()
    min_tcb: SnpTcb | None = None
    min_guest_svn: int = 0
    vmpl: tuple[int, ...] = (0,)
    allow_migrate_ma: bool = False
    allow_smt: bool = True


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
    image: str | None = None
    reference_values: tuple[str, ...] = ()
    tdx: TdxPolicy = TdxPolicy()
    snp: SnpPolicy = SnpPolicy()

    @property
    def named_references(self) -> tuple[str, ...]:
        """Images and bundle ids whose reference values are accepted."""
        return (*(() if self.image is None else (self.image,)), *self.reference_values)

    def accepted(self, family: str) -> dict[str, tuple[str, ...]]:
        """Accepted measured values of a family of TEEs, by name; what is not in it may have any value."""
        if family == "sgx":
            own = {"mrenclave": self.mrenclave, "mrsigner": self.mrsigner}
            return {name: values for name, values in own.items() if values}
        return dict(self.tdx.values if family == "tdx" else self.snp.values)

    def identities(self, family: str) -> tuple[str, ...]:
        """Names of the accepted values that say what runs in such a TEE."""
        named = self.accepted(family)
        return tuple(name for name in identity.IDENTIFYING[family] if name in named)

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
        for table, kind in (("tdx", TdxPolicy), ("snp", SnpPolicy)):
            if table in document:
                inner = document.pop(table)
                if not isinstance(inner, dict):
                    raise UsageError(
                        f"{name}: {table} is wrong",
                        id="policy.key.value",
                        found=repr(inner),
                        expected=f"a table [{table}]",
                    )
                values[table] = kind(**_table(inner, _TEE_KEYS[table], f"{name}: {table}."))
        values |= _table(document, _KEYS, f"{name}: ")
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


def _table(document: dict[str, Any], keys: _Keys, where: str) -> dict[str, Any]:
    """Fields of a policy; measured values are gathered in ``values``.

    Raises:
        UsageError: ``policy.key.unknown`` or ``policy.key.value``.
    """
    fields: dict[str, Any] = {}
    for key, value in document.items():
        if key not in keys:
            raise UsageError(
                f"{where.replace(': ', ': unknown key ')}{key}",
                id="policy.key.unknown",
                expected=", ".join([*keys, *(_TEE_KEYS if keys is _KEYS else ())]),
                remedy="remove it or correct its name; a policy never ignores what it does not understand",
            )
        field, convert = keys[key]
        try:
            converted = convert(value)
        except ValueError as error:
            raise UsageError(
                f"{where}{key} is wrong", id="policy.key.value", found=repr(value), expected=str(error)
            ) from None
        if field == "values":
            fields["values"] = (*fields.get("values", ()), (key, converted))
        else:
            fields[field] = converted
    return fields


def _measurements(length: int) -> Callable[[Any], tuple[str, ...]]:
    def convert(value: Any) -> tuple[str, ...]:
        try:
            if isinstance(value, list):
                return tuple(identity.hexadecimal(item, length) for item in value)
        except ValueError:
            pass
        raise ValueError(f"a list of strings of {2 * length} hexadecimal digits")

    return convert


def _some_measurements(length: int) -> Callable[[Any], tuple[str, ...]]:
    def convert(value: Any) -> tuple[str, ...]:
        if found := _measurements(length)(value):
            return found
        raise ValueError("a list that is not empty: it would refuse everything")

    return convert


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError("a list of names or ids of reference bundles")
    return tuple(value)


def _image(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("the name of an image")
    return value


def _levels(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of numbers from 0 to 3")
    return tuple(identity.number(item, 3) for item in value)


def _least_tcb(value: Any) -> SnpTcb:
    names = ("bootloader", "tee", "snp", "microcode")
    if not isinstance(value, dict) or not set(names) <= set(value) <= {*names, "fmc"}:
        raise ValueError("a table of bootloader, tee, snp, microcode and, from Turin on, fmc")
    return SnpTcb(**{name: identity.number(item, 255) for name, item in value.items()})


def _allow(value: Any) -> bool:
    if value not in ("allow", "deny"):
        raise ValueError('"allow" or "deny"')
    return bool(value == "allow")


def _at_most(greatest: int) -> Callable[[Any], int]:
    return lambda value: identity.number(value, greatest)


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


_Keys = dict[str, tuple[str, Callable[[Any], Any]]]
_KEYS: _Keys = {
    "mrenclave": ("mrenclave", _measurements(32)),
    "mrsigner": ("mrsigner", _measurements(32)),
    "any_enclave": ("any_enclave", _allow),
    "isv_prod_id": ("isv_prod_id", _at_most(0xFFFF)),
    "min_isv_svn": ("min_isv_svn", _at_most(0xFFFF)),
    "debug": ("allow_debug", _allow),
    "simulated": ("allow_simulated", _allow),
    "trust_anchor": ("trust_anchor", _text),
    "tcb": ("tcb", _statuses),
    "max_age": ("max_age", _age),
    "image": ("image", _image),
    "reference_values": ("reference_values", _names),
}
_TEE_KEYS: dict[str, _Keys] = {
    "tdx": {
        **{name: ("values", _some_measurements(length)) for name, length in identity.MEASURED["tdx"].items()},
        "migratable": ("allow_migratable", _allow),
    },
    "snp": {
        **{name: ("values", _some_measurements(length)) for name, length in identity.MEASURED["snp"].items()},
        "min_tcb": ("min_tcb", _least_tcb),
        "min_guest_svn": ("min_guest_svn", _at_most(0xFFFFFFFF)),
        "vmpl": ("vmpl", _levels),
        "migrate_ma": ("allow_migrate_ma", _allow),
        "smt": ("allow_smt", _allow),
    },
}

"""The trustworthiness vector: what appraisal says about eight aspects of an attester (draft-ietf-rats-ar4si).

A claim's value lies between -128 and 127. Its tier is what a relying party decides by: *affirming* (2 to 31, -32 to
-2), *warning* (32 to 95, -96 to -33), *contraindicated* (the rest) or *none* (-1 to 1: nothing was claimed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum

NO_CLAIM = 0


class Tier(IntEnum):
    """Tiers with the numbers that stand for them in CBOR; greater is worse."""

    NONE = 0
    AFFIRMING = 2
    WARNING = 32
    CONTRAINDICATED = 96

    @property
    def text(self) -> str:
        """As in ``ear.status``."""
        return self.name.lower()


def tier(value: int) -> Tier:
    """The tier of a claim's value."""
    if -1 <= value <= 1:
        return Tier.NONE
    if -32 <= value <= 31:
        return Tier.AFFIRMING
    return Tier.WARNING if -96 <= value <= 95 else Tier.CONTRAINDICATED


@dataclass(frozen=True, slots=True)
class TrustVector:
    """Values of the eight claims; 0 says nothing about an aspect."""

    instance_identity: int = NO_CLAIM
    configuration: int = NO_CLAIM
    executables: int = NO_CLAIM
    file_system: int = NO_CLAIM
    hardware: int = NO_CLAIM
    runtime_opaque: int = NO_CLAIM
    storage_opaque: int = NO_CLAIM
    sourced_data: int = NO_CLAIM

    def to_dict(self) -> dict[str, int]:
        """All eight, by the names that they have in JSON."""
        return {part.name.replace("_", "-"): getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrustVector:
        """From values by their names in JSON; those that are absent say nothing.

        Raises:
            ValueError: an unknown name, or a value that is not a number from -128 to 127; says which.
        """
        for name, value in values.items():
            if name not in CLAIMS:
                raise ValueError(f"unknown claim {name}")
            if isinstance(value, bool) or not isinstance(value, int) or not -128 <= value <= 127:
                raise ValueError(f"{name} is not a number from -128 to 127")
        return cls(**{name.replace("-", "_"): value for name, value in values.items()})  # type: ignore[arg-type]

    @property
    def tier(self) -> Tier:
        """The worst claim's."""
        return max(tier(value) for value in self.to_dict().values())

    def worse(self, **values: int) -> TrustVector:
        """The same, but each of these claims has the worse one of its two values."""
        kept = {part.name: getattr(self, part.name) for part in fields(self)}
        for name, value in values.items():
            if tier(value) >= tier(kept[name]):
                kept[name] = value
        return TrustVector(**kept)


#: Names in JSON, in the order of their CBOR keys 0 to 7.
CLAIMS = tuple(TrustVector().to_dict())

_COMMON = {
    -1: "the verifier malfunctioned",
    0: "no claim is made",
    1: "the evidence has elements that the verifier cannot parse",
    99: "cryptographic validation of the evidence failed",
}
_MEANINGS: dict[str, dict[int, str]] = {
    "instance-identity": {
        2: "recognized, not known to be compromised",
        96: "recognized, but not trustworthy",
        97: "not recognized, but should be",
    },
    "configuration": {
        2: "known and approved",
        3: "no known vulnerabilities",
        32: "known vulnerabilities",
        36: "elements relevant to security are unavailable",
        96: "unacceptable vulnerabilities",
    },
    "executables": {
        2: "only approved ones were loaded, during and after boot",
        3: "only approved ones were loaded during boot",
        32: "recognized, but with known bugs or vulnerabilities",
        33: "not recognized",
        96: "contraindicated",
    },
    "file-system": {2: "only approved files", 32: "unrecognized files", 96: "contraindicated files"},
    "hardware": {
        2: "genuine and supported",
        32: "genuine, with known vulnerabilities",
        96: "recognized, but contraindicated",
        97: "not recognized, but should be",
    },
    "runtime-opaque": {2: "encrypted memory", 32: "isolated memory", 96: "memory is visible to the host"},
    "storage-opaque": {
        2: "secrets encrypted by hardware keys",
        32: "secrets encrypted, not by hardware keys",
        96: "unencrypted secrets",
    },
    "sourced-data": {2: "from affirmed attesters", 32: "from unattested sources", 96: "from contraindicated sources"},
}


def meaning(claim: str, value: int) -> str:
    """What a value of a claim says, for people: ``33 (not recognized)``."""
    text = _COMMON.get(value) or _MEANINGS.get(claim, {}).get(value)
    return f"{value} ({text or tier(value).text})"

"""EREPORT: every field of who reports, and to whom (SDM vol. 3D, EREPORT and 38.15 to 38.16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from inclavare.errors import EvidenceError
from inclavare.sgx.keys import Identity, RootKeys
from inclavare.sgx.report import ereport, target_info, verify
from inclavare.sgx.structs import ATTRIBUTE_INIT, ATTRIBUTE_KSS, ATTRIBUTE_MODE64BIT, Attributes

ROOTS = RootKeys(provisioning=b"p" * 16, seal=b"s" * 16, owner_epoch=b"o" * 16, cpusvn=bytes(range(16)))
FLAGS = ATTRIBUTE_INIT | ATTRIBUTE_MODE64BIT | ATTRIBUTE_KSS
REPORTER = Identity(
    mrenclave=b"e" * 32,
    mrsigner=b"g" * 32,
    attributes=Attributes(FLAGS, 0xE7),
    isv_prod_id=0x1234,
    isv_svn=0x5678,
    miscselect=1,
    cet_attributes=2,
    config_id=b"c" * 64,
    config_svn=0x9ABC,
    isv_family_id=b"f" * 16,
    isv_ext_prod_id=b"x" * 16,
)
VERIFIER = replace(REPORTER, mrenclave=b"v" * 32, attributes=Attributes(FLAGS, 3), config_id=b"d" * 64, config_svn=7)


def test_report_has_every_field_of_its_enclave() -> None:
    body = verify(ROOTS, VERIFIER, ereport(ROOTS, REPORTER, target_info(VERIFIER), bytes(range(64)), b"k" * 32))
    assert body.attributes == REPORTER.attributes.to_bytes()
    assert (body.cpusvn, body.report_data) == (ROOTS.cpusvn, bytes(range(64)))
    for name in (
        "mrenclave", "mrsigner", "isv_prod_id", "isv_svn", "miscselect", "cet_attributes", "config_id", "config_svn",
        "isv_family_id", "isv_ext_prod_id",
    ):  # fmt: skip
        assert getattr(body, name) == getattr(REPORTER, name), name


def test_targetinfo_has_every_field_that_the_report_key_depends_on() -> None:
    target = target_info(VERIFIER)
    assert target.attributes == VERIFIER.attributes.to_bytes()
    for name in ("mrenclave", "miscselect", "cet_attributes", "config_id", "config_svn"):
        assert getattr(target, name) == getattr(VERIFIER, name), name


@pytest.mark.parametrize(
    "change",
    [
        {"mrenclave": b"w" * 32},
        {"attributes": Attributes(FLAGS, 7)},
        {"miscselect": 0},
        {"cet_attributes": 3},
        {"config_id": bytes(64)},
        {"config_svn": 8},
    ],
)
def test_only_the_target_can_check_a_report(change: dict[str, Any]) -> None:
    made = ereport(ROOTS, REPORTER, target_info(VERIFIER), bytes(64), b"k" * 32)
    with pytest.raises(EvidenceError) as caught:
        verify(ROOTS, replace(VERIFIER, **change), made)
    assert caught.value.id == "evidence.report.mac"
    with pytest.raises(EvidenceError):
        verify(replace(ROOTS, cpusvn=bytes(16)), VERIFIER, made)
    with pytest.raises(EvidenceError):
        verify(ROOTS, VERIFIER, replace(made, key_id=b"l" * 32))

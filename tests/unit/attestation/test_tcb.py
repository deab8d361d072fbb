"""TCB infos and QE identities as Intel publishes them, and the level that a platform reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inclavare.attestation.verifiers.tcb import PartLevels, Rating, TcbInfo, after_relaunch
from inclavare.errors import EvidenceError


def document(path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found.get(name, found)


@pytest.mark.parametrize(
    ("name", "tee"),
    [
        *[(f"eval-num-select-best/00606a000000-{number}.tcb", "SGX") for number in (8, 13, 14, 17, 18, 19)],
        ("gotdx_sample_tcbinfo_response_v5", "TDX"),
        ("phala_sgx_quote_collateral.json", "SGX"),
        ("phala_tdx_quote_collateral.json", "TDX"),
    ],
)
def test_published_tcb_infos(vectors: Path, name: str, tee: str) -> None:
    found = document(vectors / "collateral" / name, "tcbInfo")
    if isinstance(found.get("tcb_info"), str):
        found = json.loads(found["tcb_info"])
    if isinstance(found.get("raw_tcb_info"), str):
        found = json.loads(found["raw_tcb_info"])
    info = TcbInfo.parse(found, tee)
    assert info.levels and (info.module is not None) is (tee == "TDX")
    order = [(level.sgx, level.pce_svn, level.tdx) for level in info.levels]
    assert order == sorted(order, reverse=True)
    # The newest of everything reaches the highest level, and nothing reaches none.
    newest = bytes((255, max(info.modules, default=0))) + b"\xff" * 14
    found_rating = info.rate((255,) * 16, 0xFFFF, newest if tee == "TDX" else None)
    assert found_rating.status == info.levels[0].rating.status != "OutOfDate"
    with pytest.raises(EvidenceError) as caught:
        info.rate((0,) * 16, 0, bytes(16) if tee == "TDX" else None)
    assert caught.value.id == "evidence.tcb.unknown"
    with pytest.raises(EvidenceError) as caught:
        TcbInfo.parse(found, "TDX" if tee == "SGX" else "SGX")
    assert caught.value.id == "evidence.collateral.mismatch"


def test_each_level_is_reached_exactly(vectors: Path) -> None:
    collateral = json.loads((vectors / "collateral" / "phala_sgx_quote_collateral.json").read_text())
    info = TcbInfo.parse(json.loads(collateral["tcb_info"]), "SGX")
    for number, level in enumerate(info.levels):
        assert info.rate(level.sgx, level.pce_svn) == level.rating
        for at in (at for at in range(16) if level.sgx[at]):
            lower = (*level.sgx[:at], level.sgx[at] - 1, *level.sgx[at + 1 :])
            try:
                found = info.rate(lower, level.pce_svn)
            except EvidenceError:
                continue
            assert found in [other.rating for other in info.levels[number + 1 :]]


@pytest.mark.parametrize(
    "levels",
    [
        None,
        [{}],
        [{"tcb": {"isvsvn": "1"}, "tcbDate": "", "tcbStatus": "UpToDate"}],
        [{"tcb": {"isvsvn": -1}, "tcbDate": "", "tcbStatus": "UpToDate"}],
        [{"tcb": {"isvsvn": True}, "tcbDate": "", "tcbStatus": "UpToDate"}],
        [{"tcb": {"isvsvn": 1}, "tcbDate": 5, "tcbStatus": "UpToDate"}],
        [{"tcb": {"isvsvn": 1}, "tcbDate": "", "tcbStatus": "SWHardeningNeeded"}],
        [{"tcb": {"isvsvn": 1}, "tcbDate": "", "tcbStatus": []}],
    ],
)
def test_levels_that_no_quoting_enclave_has(levels: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        PartLevels.parse("the quoting enclave", levels)


@pytest.mark.parametrize(
    ("launched", "current", "expected"),
    [
        ("UpToDate", "OutOfDate", "UpToDate"),
        ("OutOfDate", "OutOfDate", "OutOfDate"),
        ("OutOfDate", "UpToDate", "TDRelaunchAdvised"),
        ("OutOfDate", "SWHardeningNeeded", "TDRelaunchAdvised"),
        ("OutOfDate", "ConfigurationNeeded", "TDRelaunchAdvisedConfigurationNeeded"),
        ("OutOfDateConfigurationNeeded", "UpToDate", "TDRelaunchAdvisedConfigurationNeeded"),
        ("OutOfDateConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
        ("SWHardeningNeeded", "UpToDate", "SWHardeningNeeded"),
    ],
)
def test_relaunch(launched: str, current: str, expected: str) -> None:
    old, new = (Rating(status, "2024-01-01", (status,)) for status in (launched, current))
    assert after_relaunch(old, new) == Rating(expected, "2024-01-01", (launched,))

"""Leaf numbers and error codes are the architecture's, as the Linux kernel and Intel's own code use them."""

from __future__ import annotations

from inclavare.sgx.codes import Encls, Enclu, Status


def test_encls() -> None:
    order = "ECREATE EADD EINIT EREMOVE EDBGRD EDBGWR EEXTEND ELDB ELDU EBLOCK EPA EWB ETRACK EAUG EMODPR EMODT"
    order += " ERDINFO ETRACKC ELDBC ELDUC"
    assert [leaf.name for leaf in Encls][:20] == order.split()
    assert [int(leaf) for leaf in Encls] == [*range(20), 0x18]


def test_enclu() -> None:
    order = "EREPORT EGETKEY EENTER ERESUME EEXIT EACCEPT EMODPE EACCEPTCOPY EVERIFYREPORT2 EDECCSSA"
    assert [leaf.name for leaf in Enclu] == order.split()
    assert [int(leaf) for leaf in Enclu] == list(range(10))


def test_status() -> None:
    """Names of the values that arch/x86/include/asm/sgx.h and the SDM give; no number twice."""
    for name, value in (
        ("SUCCESS", 0),
        ("INVALID_SIG_STRUCT", 1),
        ("EPC_PAGE_CONFLICT", 7),
        ("MAC_COMPARE_FAIL", 9),
        ("NOT_TRACKED", 11),
        ("VA_SLOT_OCCUPIED", 12),
        ("CHILD_PRESENT", 13),
        ("INVALID_EINITTOKEN", 16),
        ("PAGE_ATTRIBUTES_MISMATCH", 19),
        ("PAGE_NOT_MODIFIABLE", 20),
        ("PAGE_NOT_DEBUGGABLE", 21),
        ("INSUFFICIENT_ENTROPY", 29),
        ("INVALID_CPUSVN", 32),
        ("INVALID_ISVSVN", 64),
        ("UNMASKED_EVENT", 128),
        ("INVALID_KEYNAME", 256),
    ):
        assert Status[f"SGX_{name}"] == value
    assert len(Status) == len(Status.__members__) == 33

"""Numbers that the SGX instructions use: leaf functions and what they report in RAX (SDM vol. 3D, chapter 40)."""

from __future__ import annotations

from enum import IntEnum


class Encls(IntEnum):
    """Leaf functions of ENCLS, in EAX."""

    ECREATE = 0x00
    EADD = 0x01
    EINIT = 0x02
    EREMOVE = 0x03
    EDBGRD = 0x04
    EDBGWR = 0x05
    EEXTEND = 0x06
    ELDB = 0x07
    ELDU = 0x08
    EBLOCK = 0x09
    EPA = 0x0A
    EWB = 0x0B
    ETRACK = 0x0C
    EAUG = 0x0D
    EMODPR = 0x0E
    EMODT = 0x0F
    ERDINFO = 0x10
    ETRACKC = 0x11
    ELDBC = 0x12
    ELDUC = 0x13
    EUPDATESVN = 0x18


class Enclu(IntEnum):
    """Leaf functions of ENCLU, in EAX."""

    EREPORT = 0x00
    EGETKEY = 0x01
    EENTER = 0x02
    ERESUME = 0x03
    EEXIT = 0x04
    EACCEPT = 0x05
    EMODPE = 0x06
    EACCEPTCOPY = 0x07
    EVERIFYREPORT2 = 0x08
    EDECCSSA = 0x09


class Status(IntEnum):
    """Information and error codes of ENCLS and ENCLU, in RAX; zero is success."""

    SGX_SUCCESS = 0
    SGX_INVALID_SIG_STRUCT = 1
    SGX_INVALID_ATTRIBUTE = 2
    SGX_BLKSTATE = 3
    SGX_INVALID_MEASUREMENT = 4
    SGX_NOTBLOCKABLE = 5
    SGX_PG_INVLD = 6
    SGX_EPC_PAGE_CONFLICT = 7
    SGX_INVALID_SIGNATURE = 8
    SGX_MAC_COMPARE_FAIL = 9
    SGX_PAGE_NOT_BLOCKED = 10
    SGX_NOT_TRACKED = 11
    SGX_VA_SLOT_OCCUPIED = 12
    SGX_CHILD_PRESENT = 13
    SGX_ENCLAVE_ACT = 14
    SGX_ENTRYEPOCH_LOCKED = 15
    SGX_INVALID_EINITTOKEN = 16
    SGX_PREV_TRK_INCMPL = 17
    SGX_PG_IS_SECS = 18
    SGX_PAGE_ATTRIBUTES_MISMATCH = 19
    SGX_PAGE_NOT_MODIFIABLE = 20
    SGX_PAGE_NOT_DEBUGGABLE = 21
    SGX_INVALID_COUNTER = 25
    SGX_PG_NONEPC = 26
    SGX_TRACK_NOT_REQUIRED = 27
    SGX_INVALID_REPORTMACSTRUCT = 28
    SGX_INSUFFICIENT_ENTROPY = 29
    SGX_EPC_NOT_READY = 30
    SGX_NO_UPDATE = 31
    SGX_INVALID_CPUSVN = 32
    SGX_INVALID_ISVSVN = 64
    SGX_UNMASKED_EVENT = 128
    SGX_INVALID_KEYNAME = 256

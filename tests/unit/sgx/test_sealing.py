"""Sealed data against EGETKEY itself: who opens what, what is refused, and that no byte can be changed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import InclavareError, IntegrityError, PolicyError, UsageError
from inclavare.sgx import keys, sealing
from inclavare.sgx.keys import Identity, RootKeys
from inclavare.sgx.report import ereport, target_info
from inclavare.sgx.sealing import HEADER_SIZE, TAG_SIZE, CounterNumber, Sealed, new_request, parse_policy
from inclavare.sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_INIT,
    ATTRIBUTE_KSS,
    Attributes,
    KeyRequest,
    ReportBody,
)

ROOTS = RootKeys(provisioning=b"p" * 16, seal=b"s" * 16, owner_epoch=b"o" * 16, cpusvn=bytes([2] * 16))
ENCLAVE = Identity(
    mrenclave=b"e" * 32, mrsigner=b"g" * 32, attributes=Attributes(ATTRIBUTE_INIT | 4, 3), isv_prod_id=7, isv_svn=3
)
WITH_KSS = replace(
    ENCLAVE,
    attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_KSS | 4, 3),
    config_id=b"c" * 64,
    config_svn=5,
    isv_family_id=b"f" * 16,
    isv_ext_prod_id=b"x" * 16,
)
COUNTER = CounterNumber("state", b"i" * 16, 4)


class On:
    """An enclave on a processor."""

    def __init__(self, enclave: Identity = ENCLAVE, roots: RootKeys = ROOTS) -> None:
        self.enclave, self.roots = enclave, roots

    def key(self, request: KeyRequest) -> bytes:
        return keys.egetkey(self.roots, self.enclave, request)

    @property
    def body(self) -> ReportBody:
        made = ereport(self.roots, self.enclave, target_info(self.enclave), bytes(64), bytes(32))
        return ReportBody.from_bytes(made.body)

    def seal(self, data: bytes, policy: str = "mrenclave", **more: Any) -> bytes:
        return sealing.seal(data, new_request(self.body, parse_policy(policy)), self.key, **more)

    def open(self, blob: bytes, aad: bytes = b"") -> bytes:
        return Sealed.parse(blob).open(self.key, aad=aad)


def refused(id: str, call: Any, *arguments: Any, **more: Any) -> InclavareError:
    with pytest.raises(InclavareError) as caught:
        call(*arguments, **more)
    assert caught.value.id == id, caught.value.one_line()
    return caught.value


counters = st.none() | st.builds(
    CounterNumber,
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    st.binary(min_size=16, max_size=16).filter(any),
    st.integers(1, (1 << 64) - 1),
)


@given(
    st.binary(max_size=5000),
    st.binary(max_size=300),
    st.sampled_from(["mrenclave", "mrsigner", "mrenclave+mrsigner"]),
    counters,
)
@settings(deadline=None)
def test_round_trip(data: bytes, aad: bytes, policy: str, counter: CounterNumber | None) -> None:
    blob = On().seal(data, policy, aad=aad, counter=counter)
    assert len(blob) == HEADER_SIZE + len(data) + TAG_SIZE
    found = Sealed.parse(blob)
    assert (found.counter, found.data_size, found.aad_size) == (counter, len(data), len(aad))
    assert found.open(On().key, aad=aad) == data
    assert len(data) < 8 or data not in blob[HEADER_SIZE:]


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_arbitrary_bytes_are_not_sealed_data(data: bytes) -> None:
    for blob in (data, sealing.MAGIC + data, sealing.MAGIC + b"\1\0\0\0" + data.ljust(700, b"\0")):
        with pytest.raises(IntegrityError):
            Sealed.parse(blob)


@pytest.mark.parametrize("counter", [None, COUNTER])
def test_every_bit_is_covered(counter: CounterNumber | None) -> None:
    blob = On().seal(b"state of the application", "mrsigner", aad=b"file name", counter=counter)
    ids = set()
    for at, bit in itertools.product(range(len(blob)), range(8)):
        damaged = blob[:at] + bytes((blob[at] ^ 1 << bit,)) + blob[at + 1 :]
        with pytest.raises((IntegrityError, PolicyError)) as caught:
            On().open(damaged, b"file name")
        ids.add(caught.value.id)
    assert {"sealing.open.tag", "sealing.open.isvsvn", "sealing.open.cpusvn", "sealing.blob.version"} < ids


def test_every_length_but_the_right_one() -> None:
    blob = On().seal(b"state")
    for size in range(len(blob)):
        with pytest.raises(IntegrityError):
            Sealed.parse(blob[:size])
    refused("sealing.blob.size", Sealed.parse, blob + b"\0")
    assert On().open(memoryview(bytearray(blob))) == b"state"  # type: ignore[arg-type]


def test_two_blobs_share_neither_key_nor_nonce() -> None:
    blobs = [On().seal(b"same") for _ in range(50)]
    assert len({Sealed.parse(blob).request.key_id for blob in blobs}) == len({blob[24:36] for blob in blobs}) == 50
    assert len({blob[HEADER_SIZE:] for blob in blobs}) == 50


@pytest.mark.parametrize("wrong", [b"", b"other name", b"file namf", b"file nam", b"file name\0"])
def test_additional_data(wrong: bytes) -> None:
    blob = On().seal(b"state", aad=b"file name")
    assert b"file name" not in blob
    expected = "sealing.open.tag" if len(wrong) == 9 else "sealing.open.aad"
    refused(expected, On().open, blob, wrong)
    assert On().open(blob, b"file name") == b"state"


@pytest.mark.parametrize("size", [0, 7, 8, HEADER_SIZE - 17, HEADER_SIZE, HEADER_SIZE + 15])
def test_what_is_cut_short_is_told_so(size: int) -> None:
    refused("sealing.blob.magic", Sealed.parse, On().seal(b"")[:size])
    refused("sealing.blob.magic", Sealed.parse, b"X" + On().seal(b"state")[1:])


def test_header_and_additional_data_cannot_be_shifted_into_one_another() -> None:
    blob = On().seal(b"state", aad=b"\0" * 16)
    shorter = blob[:12] + b"\0\0\0\0" + blob[16:]
    refused("sealing.open.tag", On().open, shorter, b"")


# --- who gets the key

OTHERS = {
    "itself": ENCLAVE,
    "another image": replace(ENCLAVE, mrenclave=b"f" * 32),
    "another signer": replace(ENCLAVE, mrsigner=b"h" * 32),
    "another product": replace(ENCLAVE, isv_prod_id=8),
    "a debug enclave": replace(ENCLAVE, attributes=Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG | 4, 3)),
    "more extended state": replace(ENCLAVE, attributes=Attributes(ATTRIBUTE_INIT | 4, 0xE7)),
}
OPENS = {
    "mrenclave": {"itself", "another signer", "more extended state"},
    "mrsigner": {"itself", "another image", "more extended state"},
    "mrenclave+mrsigner": {"itself", "more extended state"},
}


@pytest.mark.parametrize("policy", OPENS)
@pytest.mark.parametrize("other", OTHERS)
def test_who_opens_what(policy: str, other: str) -> None:
    blob = On().seal(b"state", policy)
    if other in OPENS[policy]:
        assert On(OTHERS[other]).open(blob) == b"state"
    else:
        error = refused("sealing.open.tag", On(OTHERS[other]).open, blob)
        assert error.remedy is not None and "look alike" in error.remedy


@pytest.mark.parametrize("policy", OPENS)
@pytest.mark.parametrize(("sealer", "opener"), [*itertools.product((2, 3, 4), repeat=2)])
@pytest.mark.parametrize(("sealed_at", "opened_at"), [*itertools.product((1, 2, 3), repeat=2)])
def test_security_versions(policy: str, sealer: int, opener: int, sealed_at: int, opened_at: int) -> None:
    def on(isv_svn: int, cpusvn: int) -> On:
        return On(replace(ENCLAVE, isv_svn=isv_svn), replace(ROOTS, cpusvn=bytes([2] * 15 + [cpusvn])))

    blob = on(sealer, sealed_at).seal(b"state", policy)
    if sealer > opener and sealed_at <= opened_at:
        error = refused("sealing.open.isvsvn", on(opener, opened_at).open, blob)
        assert (error.found, error.expected) == (f"ISVSVN {sealer}", f"at most {opener}")
    elif sealed_at > opened_at:
        error = refused("sealing.open.cpusvn", on(opener, opened_at).open, blob)
        assert error.found == f"CPUSVN {bytes([2] * 15 + [sealed_at]).hex()}" and error.remedy
    else:
        assert on(opener, opened_at).open(blob) == b"state"


def test_a_forged_lower_version_opens_nothing() -> None:
    blob = bytearray(On().seal(b"state", "mrsigner"))
    blob[128 + 4] = 2  # KEYREQUEST.ISVSVN
    refused("sealing.open.tag", On(replace(ENCLAVE, isv_svn=2)).open, bytes(blob))


@pytest.mark.parametrize("roots", [replace(ROOTS, seal=b"t" * 16), replace(ROOTS, owner_epoch=b"t" * 16)])
def test_another_platform(roots: RootKeys) -> None:
    refused("sealing.open.tag", On(roots=roots).open, On().seal(b"state"))


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("configid", {"config_id": b"d" * 64}),
        ("isvfamilyid", {"isv_family_id": b"d" * 16}),
        ("isvextprodid", {"isv_ext_prod_id": b"d" * 16}),
    ],
)
def test_key_separation(option: str, change: dict[str, bytes]) -> None:
    other = On(replace(WITH_KSS, **change))
    assert other.open(On(WITH_KSS).seal(b"state", "mrsigner")) == b"state"
    blob = On(WITH_KSS).seal(b"state", f"mrsigner+{option}")
    assert On(WITH_KSS).open(blob) == b"state"
    refused("sealing.open.tag", other.open, blob)


def test_key_sharing_across_products() -> None:
    blob = On(WITH_KSS).seal(b"state", "mrsigner+noisvprodid")
    assert On(replace(WITH_KSS, isv_prod_id=9)).open(blob) == b"state"


def test_configuration_versions() -> None:
    blob = On(WITH_KSS).seal(b"state", "mrsigner+configid")
    assert Sealed.parse(blob).request.config_svn == 5
    assert On(replace(WITH_KSS, config_svn=6)).open(blob) == b"state"
    error = refused("sealing.open.isvsvn", On(replace(WITH_KSS, config_svn=4)).open, blob)
    assert error.found == "ISVSVN 3, CONFIGSVN 5"
    plain = On(WITH_KSS).seal(b"state", "mrsigner")
    assert On(replace(WITH_KSS, config_svn=4)).open(plain) == b"state"


def test_sharing_options_need_kss() -> None:
    for option in ("noisvprodid", "configid", "isvfamilyid", "isvextprodid"):
        with pytest.raises(keys.KeyRefused):
            On().seal(b"state", f"mrsigner+{option}")
        blob = On(WITH_KSS).seal(b"state", f"mrsigner+{option}")
        refused("sealing.open.refused", On().open, blob)


def test_policies_by_name() -> None:
    for text in (
        "mrenclave",
        "mrsigner",
        "mrenclave+mrsigner",
        "mrsigner+noisvprodid+configid",
        "mrsigner+isvfamilyid",
    ):
        assert sealing.policy_name(parse_policy(text)) == text
    for text in ("", "mrenclave+", "anyone", "noisvprodid", "configid+isvfamilyid", "MRENCLAVE", "mrenclave mrsigner"):
        with pytest.raises(UsageError) as caught:
            parse_policy(text)
        assert caught.value.id == "sealing.policy"
    assert [sealing.owner(parse_policy(text)) for text in OPENS] == ["mrenclave", "mrsigner", "mrenclave"]


# --- what somebody else may have made


def _forged(request: KeyRequest, forger: On) -> bytes:
    """A blob that is right in itself, under whatever key the forger can have."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    head = bytearray(On().seal(b"forged"))[:HEADER_SIZE]
    head[128:640] = request.to_bytes()
    return bytes(head) + AESGCM(forger.key(request)).encrypt(bytes(head[24:36]), b"forged", bytes(head))


def test_a_blob_under_a_key_that_every_enclave_gets() -> None:
    stranger = On(replace(ENCLAVE, mrenclave=b"z" * 32, mrsigner=b"z" * 32))
    request = replace(new_request(On().body, keys.POLICY_MRSIGNER), key_policy=0)
    assert stranger.key(request) == On().key(request)  # so it proves nothing
    refused("sealing.blob.keyrequest", Sealed.parse, _forged(request, stranger))
    report_key = replace(request, key_name=keys.KEY_REPORT, key_policy=keys.POLICY_MRSIGNER)
    refused("sealing.blob.keyrequest", Sealed.parse, _forged(report_key, On()))
    refused("sealing.blob.keyrequest", sealing.seal, b"x", request, On().key)


def test_what_the_caller_requires() -> None:
    def require(sealed_under: str, **more: Any) -> None:
        Sealed.parse(On(WITH_KSS).seal(b"state", sealed_under)).require(**more)

    for policy in ("mrenclave", "mrsigner", "mrsigner+configid"):
        require(policy)
        require(policy, policy=parse_policy(policy), minimum_isv_svn=3)
    for found, wanted in (("mrsigner", "mrenclave"), ("mrenclave", "mrsigner"), ("mrsigner+configid", "mrsigner")):
        error = refused("sealing.require.policy", require, found, policy=parse_policy(wanted))
        assert (error.found, error.expected) == (found, wanted)
    # Another product of the signer may have sealed it: only for those who ask for it.
    refused("sealing.require.policy", require, "mrsigner+noisvprodid")
    require("mrsigner+noisvprodid", policy=parse_policy("mrsigner+noisvprodid"))
    error = refused("sealing.require.isvsvn", require, "mrsigner", minimum_isv_svn=4)
    assert (error.found, error.expected) == (3, "ISVSVN 4 or above")


def test_a_blob_without_the_counter_that_is_asked_for() -> None:
    bound = Sealed.parse(On().seal(b"state", counter=COUNTER))
    free = Sealed.parse(On().seal(b"state"))
    bound.require(counter="state")
    bound.require()
    assert refused("sealing.require.counter", free.require, counter="state").found == "no counter"
    assert refused("sealing.require.counter", bound.require, counter="stat").found == "state"


def test_roll_back_by_number() -> None:
    found = Sealed.parse(On().seal(b"state", counter=COUNTER))
    for confirmed in (0, 3, 4):
        found.check_counter(COUNTER.id, confirmed)
    error = refused("sealing.counter.rollback", found.check_counter, COUNTER.id, 5)
    assert (error.found, error.expected) == ("counter 4", "counter 5 or above")
    refused("sealing.counter.id", found.check_counter, b"j" * 16, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        CounterNumber("", b"i" * 16, 4),
        CounterNumber("", bytes(16), 1),
        CounterNumber("a/b", b"i" * 16, 4),
        CounterNumber("state", bytes(16), 4),
        CounterNumber("state", b"i" * 16, 0),
    ],
)
def test_half_a_counter(wrong: CounterNumber) -> None:
    refused("sealing.blob.counter", On().seal, b"state", counter=wrong)


def test_a_header_that_changes_after_it_was_judged() -> None:
    # As a file that is mapped into memory and that the host goes on writing to.
    old = On().seal(b"old state", counter=COUNTER)
    new = On().seal(b"new state", counter=replace(COUNTER, value=9))
    buffer = bytearray(new)
    found = Sealed.parse(buffer)
    found.check_counter(COUNTER.id, 9)
    buffer[:] = old
    refused("sealing.open.tag", found.open, On().key)
    buffer[:HEADER_SIZE], buffer[HEADER_SIZE:] = old[:HEADER_SIZE], new[HEADER_SIZE:]
    assert found.open(On().key) == b"new state"


def test_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_SIZE", 10)
    assert On().open(On().seal(b"0123456789", aad=b"0123456789"), b"0123456789") == b"0123456789"
    for arguments in ({"data": b"0123456789a"}, {"data": b"", "aad": b"0123456789a"}):
        assert isinstance(refused("sealing.size", On().seal, **arguments), UsageError)
    monkeypatch.undo()
    blob = bytearray(On().seal(b"state"))
    blob[16:24] = ((1 << 30) + 1).to_bytes(8, "little")
    refused("sealing.blob.size", Sealed.parse, bytes(blob))


def test_the_header_for_people() -> None:
    shown = Sealed.parse(On().seal(b"state", "mrsigner", aad=b"name", counter=COUNTER)).describe()
    assert {key: shown[key] for key in ("version", "policy", "isv_svn", "cpusvn", "counter", "bytes", "aad_bytes")} == {
        "version": 1, "policy": "mrsigner", "isv_svn": 3, "cpusvn": "02" * 16, "bytes": 5, "aad_bytes": 4,
        "counter": {"name": "state", "id": "69" * 16, "value": 4},
    }  # fmt: skip
    assert Sealed.parse(On().seal(b"")).describe()["counter"] is None


def test_the_request_is_what_intels_sdk_asks_for() -> None:
    request = new_request(On().body, keys.POLICY_MRSIGNER)
    assert (request.attribute_mask, request.misc_mask) == (
        bytes.fromhex("0b000000000000ff") + bytes(8),
        0xF0000000,
    )


def test_no_key_in_what_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    blob = On().seal(b"the plaintext")
    found = Sealed.parse(blob)
    key = On().key(found.request)
    error = refused("sealing.open.tag", On(OTHERS["another image"]).open, blob)
    for text in (repr(found), error.one_line(), str(found.describe())):
        assert key.hex() not in text and repr(key)[2:-1] not in text and "plaintext" not in text

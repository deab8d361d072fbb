"""The AESM client against a service that reads and writes the wire format by itself."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aesm_service import AesmService, Field, decode, encode, key_id

from inclavare.errors import PlatformError, ResourceError
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx import aesm as module
from inclavare.tee.sgx.aesm import Aesm, algorithm
from inclavare.tee.sgx_sim import SimulatedPlatform

pytest.importorskip("google.protobuf", reason="the extra hardware is not installed")
ECDSA = key_id(2)


@pytest.fixture
def service(tmp_path: Path, platform: SimulatedPlatform) -> Iterator[AesmService]:
    """AESM with an EPID and an ECDSA key."""

    def quote(fields: dict[int, Field]) -> dict[int, Field]:
        report, size = fields[1], fields[4]
        assert isinstance(report, bytes) and isinstance(size, int) and fields[2] == ECDSA
        return {2: platform.quote(report).ljust(size, b"\0")}

    with AesmService(tmp_path / "aesm.socket") as made:
        made.answers = {
            21: lambda _: {2: 2},
            22: lambda fields: {2: key_id(0) + ECDSA},
            15: lambda fields: {2: platform.quote_target_info(), 3: 32, 4: bytes(32)},
            16: lambda fields: {2: 9000},
            17: quote,
            19: lambda fields: {2: ECDSA},
            1: lambda _: {2: bytes(512), 3: b"gid!"},
            2: lambda fields: {2: b"epid quote"},
            3: lambda fields: {2: bytes(304)},
        }
        yield made


@pytest.fixture
def client(service: AesmService) -> Aesm:
    return Aesm(service.path, timeout=10)


@pytest.fixture
def report(platform: SimulatedPlatform, load: Any) -> Iterator[bytes]:
    enclave = load()
    yield enclave.report(platform.quote_target_info(), bytes(range(64)))
    enclave.destroy()


def refused(call: Any, id: str, *, found: str = "", remedy: str = "") -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        call()
    assert caught.value.id == id
    assert found in str(caught.value.found) and remedy in str(caught.value.remedy)
    return caught.value


def test_a_quote(client: Aesm, service: AesmService, platform: SimulatedPlatform, report: bytes) -> None:
    chosen = client.ecdsa_key_id()
    assert chosen == ECDSA
    assert client.init_quote_ex(chosen) == platform.quote_target_info()
    quote = client.quote_ex(report, chosen)
    assert Quote.from_bytes(quote).body == report[:384], "what AESM filled up is cut off"
    assert service.asked == [
        (21, {}),
        (22, {1: 512}),
        (15, {1: ECDSA, 3: 1, 4: 32}),
        (16, {1: ECDSA}),
        (17, {1: report, 2: ECDSA, 4: 9000}),
    ]


def test_the_other_requests(client: Aesm, service: AesmService) -> None:
    assert client.supported_key_ids() == [key_id(0), ECDSA]
    assert [algorithm(found) for found in client.supported_key_ids()] == [0, 2]
    assert client.select_key_id() == ECDSA
    assert client.select_key_id([ECDSA]) == ECDSA
    assert client.init_quote() == (bytes(512), b"gid!")
    assert client.quote(bytes(432), linkable=True, spid=bytes(16), revocations=b"r") == b"epid quote"
    assert client.launch_token(bytes(32), bytes(384), bytes(16)) == bytes(304)
    asked = [fields for number, fields in service.asked if number in (19, 2, 3)]
    assert asked == [
        {},
        {1: struct.pack("<HHI", 0, 0, 1) + ECDSA},
        {1: bytes(432), 2: 1, 3: bytes(16), 5: b"r", 6: 4096},
        {1: bytes(32), 2: bytes(384), 3: bytes(16)},
    ]


def test_after_a_restart_of_aesm_the_key_is_made_again(client: Aesm, service: AesmService, report: bytes) -> None:
    codes = [42, 0]
    service.answers[16] = lambda _: {1: codes.pop(0), 2: 9000}
    assert client.quote_ex(report, ECDSA)
    assert [number for number, _ in service.asked] == [16, 15, 16, 17]
    codes += [42, 42]
    refused(lambda: client.quote_ex(report, ECDSA), "tee.aesm.error", found="AESM_ATT_KEY_NOT_INITIALIZED (42)")


@pytest.mark.parametrize("code", sorted(module._ERRORS))
def test_error_codes_have_names_and_remedies(client: Aesm, service: AesmService, code: int) -> None:
    service.answers[15] = lambda _: {1: code}
    if code == 29:
        with pytest.raises(ResourceError) as caught:
            client.init_quote_ex(ECDSA)
        assert caught.value.id == "tee.epc.full"
        return
    error = refused(lambda: client.init_quote_ex(ECDSA), "tee.aesm.error", found=f"({code})")
    assert str(error.found).startswith("AESM_") and error.remedy


#: ``aesm_error.h``, names by number, typed in a second time.
_HEADER = (
    "SUCCESS UNEXPECTED_ERROR NO_DEVICE_ERROR PARAMETER_ERROR EPIDBLOB_ERROR EPID_REVOKED_ERROR "
    "GET_LICENSETOKEN_ERROR SESSION_INVALID MAX_NUM_SESSION_REACHED PSDA_UNAVAILABLE EPH_SESSION_FAILED "
    "LONG_TERM_PAIRING_FAILED NETWORK_ERROR NETWORK_BUSY_ERROR PROXY_SETTING_ASSIST FILE_ACCESS_ERROR "
    "SGX_PROVISION_FAILED SERVICE_STOPPED BUSY BACKEND_SERVER_BUSY UPDATE_AVAILABLE OUT_OF_MEMORY_ERROR MSG_ERROR "
    "THREAD_ERROR SGX_DEVICE_NOT_AVAILABLE ENABLE_SGX_DEVICE_FAILED PLATFORM_INFO_BLOB_INVALID_SIG - KDF_MISMATCH "
    "OUT_OF_EPC SERVICE_UNAVAILABLE UNRECOGNIZED_PLATFORM ECDSA_ID_MISMATCH PATHNAME_BUFFER_OVERFLOW_ERROR "
    "ERROR_STORED_KEY PUB_KEY_ID_MISMATCH INVALID_PCE_SIG_SCHEME ATT_KEY_BLOB_ERROR UNSUPPORTED_ATT_KEY_ID "
    "UNSUPPORTED_LOADING_POLICY INTERFACE_UNAVAILABLE PLATFORM_LIB_UNAVAILABLE ATT_KEY_NOT_INITIALIZED "
    "ATT_KEY_CERT_DATA_INVALID NO_PLATFORM_CERT_DATA ERROR_REPORT ENCLAVE_LOST INVALID_REPORT ENCLAVE_LOAD_ERROR "
    "UNABLE_TO_GENERATE_QE_REPORT KEY_CERTIFICATION_ERROR"
)


def test_the_codes_are_those_of_intels_header() -> None:
    header = _HEADER.split()
    assert {code: name for code, (name, _) in module._ERRORS.items()} == {
        code: f"AESM_{header[code]}" for code in module._ERRORS
    }


def test_an_unknown_error_code(client: Aesm, service: AesmService) -> None:
    service.answers[15] = lambda _: {1: 1234}
    refused(lambda: client.init_quote_ex(ECDSA), "tee.aesm.error", found="error 1234", remedy="log")


def test_a_service_without_ecdsa(client: Aesm, service: AesmService) -> None:
    service.answers[22] = lambda _: {2: key_id(0) + key_id(3)}
    refused(client.ecdsa_key_id, "tee.aesm.ecdsa", found="[0, 3]", remedy="libsgx-aesm-ecdsa-plugin")


def test_a_service_that_does_not_know_a_request(client: Aesm, service: AesmService) -> None:
    del service.answers[21]
    refused(client.ecdsa_key_id, "tee.aesm.unsupported", remedy="sgx-aesm-service")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\4\0",
        struct.pack("<I", 10) + b"short",
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 4) + b"\xff" * 4,
        struct.pack("<I", 0),
        struct.pack("<I", 6) + encode({16: encode({1: 0, 2: 1})}),
        struct.pack("<I", 4) + encode({15: encode({2: b""})}),
    ],
    ids=["nothing", "half a length", "cut", "huge", "no protobuf", "empty", "another's", "without the required code"],
)
def test_answers_that_are_none(client: Aesm, service: AesmService, raw: bytes) -> None:
    service.raw = raw
    refused(lambda: client.init_quote_ex(ECDSA), "tee.aesm.malformed")


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (15, {2: bytes(511)}),
        (15, {}),
        (16, {2: 0}),
        (16, {2: 1 << 30}),
        (17, {2: b""}),
        (17, {2: bytes(435)}),
        (17, {2: bytes(1000)}),
        (17, {}),
        (21, {2: 0}),
        (21, {2: 65}),
        (22, {2: bytes(511)}),
    ],
)
def test_answers_of_the_wrong_size(client: Aesm, service: AesmService, number: int, fields: dict[int, Field]) -> None:
    service.answers[number] = lambda _: fields
    calls = {15: lambda: client.init_quote_ex(ECDSA), 21: client.supported_key_ids, 22: client.supported_key_ids}
    refused(calls.get(number, lambda: client.quote_ex(bytes(432), ECDSA)), "tee.aesm.malformed")


def test_a_quote_over_another_report(client: Aesm, report: bytes) -> None:
    """AESM answers with the quote that it was asked for, or with none."""
    other = bytes(384) + report[384:]
    service_report = report
    with pytest.MonkeyPatch.context() as patch:
        real = Aesm._call

        def swapped(self: Aesm, name: str, **fields: Any) -> Any:
            if name == "getQuoteEx":
                fields["report"] = service_report
            return real(self, name, **fields)

        patch.setattr(Aesm, "_call", swapped)
        refused(lambda: client.quote_ex(other, ECDSA), "tee.aesm.malformed", found="another report's")


def test_a_service_that_is_silent(service: AesmService) -> None:
    service.silent = True
    refused(lambda: Aesm(service.path, timeout=0.1).init_quote_ex(ECDSA), "tee.aesm.timeout", remedy="aesmd")


def test_no_service(tmp_path: Path) -> None:
    client = Aesm(tmp_path / "none.socket")
    refused(lambda: client.init_quote_ex(ECDSA), "tee.aesm.unreachable", remedy="apt-get install sgx-aesm-service")
    (tmp_path / "none.socket").write_text("")
    refused(lambda: client.init_quote_ex(ECDSA), "tee.aesm.unreachable", remedy="systemctl start")


def test_without_protobuf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module._types.cache_clear()
    monkeypatch.setitem(sys.modules, "google.protobuf.descriptor_pb2", None)
    try:
        refused(lambda: Aesm(tmp_path / "x").init_quote_ex(ECDSA), "tee.aesm.protobuf", remedy="inclavare[hardware]")
    finally:
        module._types.cache_clear()


def test_protobuf_is_imported_only_when_it_is_used() -> None:
    import subprocess

    code = "import sys, inclavare.tee.sgx, inclavare.tee.sgx.aesm; print([n for n in sys.modules if 'google' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_two_codecs_agree() -> None:
    """The client's messages, written and read back by the test's own codec."""
    request, response = (make() for make in module._types())
    request.getQuoteExReq.report, request.getQuoteExReq.buf_size = b"\0\1", 300
    assert decode(decode(request.SerializeToString())[17]) == {1: b"\0\1", 4: 300}  # type: ignore[arg-type]
    response.ParseFromString(encode({15: encode({1: 0, 3: 1 << 40})}))
    assert response.initQuoteExRes.pub_key_id_size == 1 << 40

"""Intel's AESM service: quotes from its quoting enclave, over a unix socket.

Each message is a 4-byte little-endian length and a protobuf ``aesm.message.Request`` or ``Response``; one connection
serves one request. Fields and numbers are those of Intel's ``messages.proto`` (linux-sgx,
``psw/ae/aesm_service/source/core/ipc``), error codes those of ``aesm_error.h``. Nothing that AESM says is trusted: a
verifier checks the quote.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InclavareError, PlatformError, ResourceError

SOCKET = "/var/run/aesmd/aesm.socket"
#: Seconds for one request. The first quote after a start may make AESM fetch a certificate from the network.
TIMEOUT = 30.0
#: Bytes of the largest answer that is read; a quote with its certificate chain has 5 to 10 KB.
MAX_MESSAGE = 1 << 20

REPORT_SIZE, TARGET_INFO_SIZE, TOKEN_SIZE = 432, 512, 304
#: ``sgx_att_key_id_t``; its ``algorithm_id`` lies behind the QE's identity.
KEY_ID_SIZE = 256
ALGORITHM_ECDSA_P256 = 2
_ALGORITHM_AT = 154
_LENGTH = struct.Struct("<I")
_ATT_KEY_NOT_INITIALIZED = 42
#: Bytes of a quote before its signature data, the length of that included.
_QUOTE_HEAD = 436

#: Fields by name: number, type, whether required. Types: b bytes, u uint32, U uint64, t bool.
_MESSAGES: dict[str, tuple[int, dict[str, tuple[int, str, bool]], dict[str, tuple[int, str, bool]]]] = {
    "initQuote": (1, {}, {"targetInfo": (2, "b", False), "gid": (3, "b", False)}),
    "getQuote": (
        2,
        {
            "report": (1, "b", True),
            "quote_type": (2, "u", True),
            "spid": (3, "b", True),
            "nonce": (4, "b", False),
            "sig_rl": (5, "b", False),
            "buf_size": (6, "u", True),
            "qe_report": (7, "t", False),
        },
        {"quote": (2, "b", False), "qe_report": (3, "b", False)},
    ),
    "getLicToken": (
        3,
        {"mr_enclave": (1, "b", True), "mr_signer": (2, "b", True), "se_attributes": (3, "b", True)},
        {"token": (2, "b", False)},
    ),
    "initQuoteEx": (
        15,
        {"att_key_id": (1, "b", False), "b_pub_key_id": (3, "t", True), "buf_size": (4, "U", False)},
        {"target_info": (2, "b", False), "pub_key_id_size": (3, "U", False), "pub_key_id": (4, "b", False)},
    ),
    "getQuoteSizeEx": (16, {"att_key_id": (1, "b", False)}, {"quote_size": (2, "u", False)}),
    "getQuoteEx": (
        17,
        {
            "report": (1, "b", True),
            "att_key_id": (2, "b", False),
            "qe_report_info": (3, "b", False),
            "buf_size": (4, "u", True),
        },
        {"quote": (2, "b", False), "qe_report_info": (3, "b", False)},
    ),
    "selectAttKeyID": (19, {"att_key_id_list": (1, "b", False)}, {"selected_att_key_id": (2, "b", False)}),
    "getSupportedAttKeyIDNum": (21, {}, {"att_key_id_num": (2, "u", False)}),
    "getSupportedAttKeyIDs": (22, {"buf_size": (1, "u", True)}, {"att_key_ids": (2, "b", False)}),
}
#: The answer of a service that does not know a request.
_UNSUPPORTED = ("unsupportedRequestResponse", 20)


@cache
def _types() -> tuple[Any, Any]:
    """The classes ``Request`` and ``Response``.

    Raises:
        PlatformError: the package protobuf is not installed.
    """
    try:
        pb = import_module("google.protobuf.descriptor_pb2")
        pool = import_module("google.protobuf.descriptor_pool").DescriptorPool()
        factory = import_module("google.protobuf.message_factory")
    except ImportError:
        raise PlatformError(
            "quotes of SGX hardware need the package protobuf",
            id="tee.aesm.protobuf",
            remedy="pip install 'inclavare[hardware]'",
        ) from None
    kind = pb.FieldDescriptorProto
    codes = {"b": kind.TYPE_BYTES, "u": kind.TYPE_UINT32, "U": kind.TYPE_UINT64, "t": kind.TYPE_BOOL}
    file = pb.FileDescriptorProto(name="aesm.proto", package="aesm.message", syntax="proto2")
    request, response = file.message_type.add(name="Request"), file.message_type.add(name="Response")

    def nest(parent: Any, name: str, member: str, number: int, fields: dict[str, tuple[int, str, bool]]) -> None:
        nested = parent.nested_type.add(name=name)
        for field, (at, code, required) in fields.items():
            label = kind.LABEL_REQUIRED if required else kind.LABEL_OPTIONAL
            nested.field.add(name=field, number=at, type=codes[code], label=label)
        parent.field.add(
            name=member,
            number=number,
            type=kind.TYPE_MESSAGE,
            label=kind.LABEL_OPTIONAL,
            type_name=f".aesm.message.{parent.name}.{name}",
        )

    code = {"errorCode": (1, "u", True)}
    for name, (number, asked, answered) in _MESSAGES.items():
        title = name[:1].upper() + name[1:]
        nest(request, f"{title}Request", f"{name}Req", number, asked)
        nest(response, f"{title}Response", f"{name}Res", number, {**code, **answered})
    nest(response, "UnsupportedRequestResponse", *_UNSUPPORTED, code)
    pool.Add(file)
    return tuple(
        factory.GetMessageClass(pool.FindMessageTypeByName(f"aesm.message.{name}")) for name in ("Request", "Response")
    )


class Aesm:
    """A client.

    Args:
        path: the service's socket.
        timeout: seconds for one request.
    """

    def __init__(self, path: str | Path = SOCKET, *, timeout: float = TIMEOUT) -> None:
        self._path = str(path)
        self._timeout = timeout

    def supported_key_ids(self) -> list[bytes]:
        """The attestation keys that the service has: 256-byte ids.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        count = self._call("getSupportedAttKeyIDNum").att_key_id_num
        if not 0 < count <= 64:
            raise _malformed("number of attestation keys", count, "1 to 64")
        ids = self._call("getSupportedAttKeyIDs", buf_size=count * KEY_ID_SIZE).att_key_ids
        if len(ids) != count * KEY_ID_SIZE:
            raise _malformed("list of attestation keys", f"{len(ids)} bytes", f"{count * KEY_ID_SIZE} bytes")
        return [ids[at : at + KEY_ID_SIZE] for at in range(0, len(ids), KEY_ID_SIZE)]

    def ecdsa_key_id(self) -> bytes:
        """The id of the service's ECDSA P-256 attestation key (DCAP).

        Raises:
            PlatformError: ``tee.aesm.ecdsa``: it has none; ``tee.aesm.*``.
        """
        found = {algorithm(key_id): key_id for key_id in self.supported_key_ids()}
        if ALGORITHM_ECDSA_P256 not in found:
            raise PlatformError(
                "AESM has no ECDSA P-256 attestation key",
                id="tee.aesm.ecdsa",
                found=f"algorithms {sorted(found)}",
                expected=ALGORITHM_ECDSA_P256,
                remedy="apt-get install libsgx-aesm-quote-ex-plugin libsgx-aesm-ecdsa-plugin libsgx-dcap-default-qpl",
            )
        return found[ALGORITHM_ECDSA_P256]

    def select_key_id(self, accepted: list[bytes] | None = None) -> bytes:
        """The id that the service chooses among ``accepted`` 256-byte ids, or among all that it has.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        fields = {}
        if accepted is not None:
            # sgx_ql_att_key_id_list_header_t: id, version, num_att_ids.
            fields["att_key_id_list"] = struct.pack("<HHI", 0, 0, len(accepted)) + b"".join(accepted)
        found = self._call("selectAttKeyID", **fields).selected_att_key_id
        return _sized(found, KEY_ID_SIZE, "attestation key id")

    def init_quote_ex(self, key_id: bytes) -> bytes:
        """Make the attestation key ready: the quoting enclave's TARGETINFO, 512 bytes.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        answer = self._call("initQuoteEx", att_key_id=key_id, b_pub_key_id=True, buf_size=32)
        return _sized(answer.target_info, TARGET_INFO_SIZE, "TARGETINFO")

    def quote_size_ex(self, key_id: bytes) -> int:
        """Bytes that the next quote needs.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        size: int = self._call("getQuoteSizeEx", att_key_id=key_id).quote_size
        if not _QUOTE_HEAD < size <= MAX_MESSAGE:
            raise _malformed("size of the quote", size, f"{_QUOTE_HEAD + 1} to {MAX_MESSAGE}")
        return size

    def quote_ex(self, report: bytes, key_id: bytes) -> bytes:
        """A quote over a 432-byte REPORT that is directed at the quoting enclave.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        for attempt in (1, 2):
            try:
                size = self.quote_size_ex(key_id)
                quote = bytes(self._call("getQuoteEx", report=report, att_key_id=key_id, buf_size=size).quote)
                break
            except AesmError as error:
                if error.code != _ATT_KEY_NOT_INITIALIZED or attempt == 2:
                    raise
                self.init_quote_ex(key_id)  # AESM was started again in the meantime
        # The service fills its answer up to the size that was asked for; the quote itself says where it ends.
        end = _QUOTE_HEAD + _LENGTH.unpack_from(quote, _QUOTE_HEAD - 4)[0] if len(quote) >= _QUOTE_HEAD else 0
        if not _QUOTE_HEAD < end <= len(quote):
            raise _malformed("quote", f"{len(quote)} bytes", f"{end or 'more'} bytes")
        if not hmac.compare_digest(quote[48:432], report[:384]):
            raise _malformed("quote", "another report's", "this report's")
        return quote[:end]

    def launch_token(self, mrenclave: bytes, mrsigner: bytes, attributes: bytes) -> bytes:
        """An EINITTOKEN, 304 bytes, of the launch enclave; processors with flexible launch control need none.

        Args:
            mrenclave: 32 bytes.
            mrsigner: the signer's modulus, 384 bytes, as the launch enclave wants it.
            attributes: ATTRIBUTES, 16 bytes.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        answer = self._call("getLicToken", mr_enclave=mrenclave, mr_signer=mrsigner, se_attributes=attributes)
        return _sized(answer.token, TOKEN_SIZE, "EINITTOKEN")

    def init_quote(self) -> tuple[bytes, bytes]:
        """EPID: the quoting enclave's TARGETINFO, 512 bytes, and the group id, 4 bytes.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        answer = self._call("initQuote")
        return _sized(answer.targetInfo, TARGET_INFO_SIZE, "TARGETINFO"), _sized(answer.gid, 4, "EPID group id")

    def quote(self, report: bytes, *, linkable: bool, spid: bytes, size: int = 4096, revocations: bytes = b"") -> bytes:
        """EPID: a quote over a 432-byte REPORT, ``size`` bytes at most.

        Args:
            linkable: the kind of signature.
            spid: service provider id, 16 bytes.
            revocations: signature revocation list.

        Raises:
            PlatformError: ``tee.aesm.*``.
        """
        fields: dict[str, Any] = {"report": report, "quote_type": int(linkable), "spid": spid, "buf_size": size}
        if revocations:
            fields["sig_rl"] = revocations
        return bytes(self._call("getQuote", **fields).quote)

    def _call(self, name: str, **fields: Any) -> Any:
        request, response = (make() for make in _types())
        part = getattr(request, f"{name}Req")
        part.SetInParent()
        for field, value in fields.items():
            setattr(part, field, value)
        data = self._exchange(request.SerializeToString())
        try:
            response.ParseFromString(data)
        except Exception as error:  # protobuf's DecodeError, without importing its module here
            raise _malformed("answer", error, "aesm.message.Response") from None
        if response.HasField(_UNSUPPORTED[0]):
            raise PlatformError(
                f"AESM does not know the request {name}",
                id="tee.aesm.unsupported",
                remedy="use the current sgx-aesm-service with libsgx-aesm-quote-ex-plugin",
            )
        if not response.HasField(f"{name}Res"):
            raise _malformed("answer", "another request's", f"{name}Res")
        answer = getattr(response, f"{name}Res")
        if answer.errorCode:
            raise _failure(name, answer.errorCode)
        return answer

    def _exchange(self, request: bytes) -> bytes:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._timeout)
            connection.connect(self._path)
            connection.sendall(_LENGTH.pack(len(request)) + request)
            (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
            if size > MAX_MESSAGE:
                raise _malformed("answer", f"{size} bytes", f"at most {MAX_MESSAGE}")
            return _receive(connection, size)
        except TimeoutError:
            raise PlatformError(
                "AESM does not answer",
                id="tee.aesm.timeout",
                found=f"nothing within {self._timeout:g} s",
                remedy="systemctl restart aesmd, and see its log: it may wait for the PCCS",
            ) from None
        except OSError as error:
            raise _unreachable(self._path, error) from None
        finally:
            connection.close()


def algorithm(key_id: bytes) -> int:
    """``algorithm_id`` of a 256-byte attestation key id: 0 EPID, 2 ECDSA P-256, 3 ECDSA P-384."""
    return int.from_bytes(key_id[_ALGORITHM_AT : _ALGORITHM_AT + 4], "little")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise _malformed("answer", f"{len(data)} bytes", f"{size} bytes")
        data += piece
    return bytes(data)


def _sized(value: bytes, size: int, what: str) -> bytes:
    if len(value) != size:
        raise _malformed(what, f"{len(value)} bytes", f"{size} bytes")
    return bytes(value)


def _malformed(what: str, found: object, expected: object) -> PlatformError:
    return PlatformError(
        f"AESM's {what} is malformed",
        id="tee.aesm.malformed",
        found=found,
        expected=expected,
        remedy="check that the socket is Intel's sgx-aesm-service, and restart it",
    )


def _unreachable(path: str, error: OSError) -> PlatformError:
    if isinstance(error, FileNotFoundError):
        remedy = (
            "apt-get install sgx-aesm-service libsgx-aesm-quote-ex-plugin libsgx-aesm-ecdsa-plugin, then start aesmd"
        )
    elif isinstance(error, PermissionError):
        remedy = f"give this user access to {os.path.dirname(path)}"
    else:
        remedy = "systemctl start aesmd"
    return PlatformError(
        "AESM, which makes the quotes, cannot be reached",
        id="tee.aesm.unreachable",
        found=f"{path}: {error.strerror}",
        remedy=remedy,
    )


class AesmError(PlatformError):
    """AESM answered with an error code (``aesm_error.h``)."""

    def __init__(self, *args: Any, code: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.code = code


_PCCS = "configure a PCCS in /etc/sgx_default_qcnl.conf, and register this platform there"
_RESTART = "systemctl restart aesmd"
#: Names and remedies of the codes that a quote may meet.
_ERRORS = {
    1: ("AESM_UNEXPECTED_ERROR", _RESTART),
    2: ("AESM_NO_DEVICE_ERROR", "give aesmd the device /dev/sgx_enclave"),
    3: ("AESM_PARAMETER_ERROR", "report this"),
    6: ("AESM_GET_LICENSETOKEN_ERROR", "use a processor with flexible launch control, which needs no token"),
    12: ("AESM_NETWORK_ERROR", _PCCS),
    13: ("AESM_NETWORK_BUSY_ERROR", "try again"),
    15: ("AESM_FILE_ACCESS_ERROR", "check the permissions of /var/opt/aesmd"),
    16: ("AESM_SGX_PROVISION_FAILED", "add aesmd to the group sgx_prv"),
    17: ("AESM_SERVICE_STOPPED", _RESTART),
    18: ("AESM_BUSY", "try again"),
    21: ("AESM_OUT_OF_MEMORY_ERROR", _RESTART),
    22: ("AESM_MSG_ERROR", _PCCS),
    24: ("AESM_SGX_DEVICE_NOT_AVAILABLE", "give aesmd the device /dev/sgx_enclave"),
    28: ("AESM_KDF_MISMATCH", "report this"),
    29: ("AESM_OUT_OF_EPC", "stop an enclave"),
    30: ("AESM_SERVICE_UNAVAILABLE", "install libsgx-aesm-quote-ex-plugin and libsgx-aesm-ecdsa-plugin, restart aesmd"),
    31: ("AESM_UNRECOGNIZED_PLATFORM", _PCCS),
    32: ("AESM_ECDSA_ID_MISMATCH", _RESTART),
    34: ("AESM_ERROR_STORED_KEY", _RESTART),
    37: ("AESM_ATT_KEY_BLOB_ERROR", _RESTART),
    38: ("AESM_UNSUPPORTED_ATT_KEY_ID", "install libsgx-aesm-ecdsa-plugin, restart aesmd"),
    40: ("AESM_INTERFACE_UNAVAILABLE", "install libsgx-aesm-quote-ex-plugin, restart aesmd"),
    41: ("AESM_PLATFORM_LIB_UNAVAILABLE", "apt-get install libsgx-dcap-default-qpl"),
    42: ("AESM_ATT_KEY_NOT_INITIALIZED", "try again"),
    43: ("AESM_ATT_KEY_CERT_DATA_INVALID", _PCCS),
    44: ("AESM_NO_PLATFORM_CERT_DATA", _PCCS),
    45: ("AESM_ERROR_REPORT", "make the report with the quoting enclave's current TARGETINFO"),
    46: ("AESM_ENCLAVE_LOST", _RESTART),
    47: ("AESM_INVALID_REPORT", "make the report on this machine, with the quoting enclave's current TARGETINFO"),
    48: ("AESM_ENCLAVE_LOAD_ERROR", "give aesmd /dev/sgx_enclave and /dev/sgx_provision (group sgx_prv)"),
    49: ("AESM_UNABLE_TO_GENERATE_QE_REPORT", "report this"),
    50: ("AESM_KEY_CERTIFICATION_ERROR", "add aesmd to the group sgx_prv"),
}
_OUT_OF_EPC = 29


def _failure(request: str, code: int) -> InclavareError:
    name, remedy = _ERRORS.get(code, (f"error {code}", "see aesmd's log"))
    if code == _OUT_OF_EPC:
        return ResourceError("enclave memory (EPC) is used up", id="tee.epc.full", found=name, remedy=remedy)
    return AesmError(f"AESM refuses {request}", id="tee.aesm.error", found=f"{name} ({code})", remedy=remedy, code=code)

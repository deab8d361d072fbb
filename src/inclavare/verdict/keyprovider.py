"""ocicrypt's key provider: keys of encrypted images, wrapped for whoever builds, unwrapped for whoever is attested.

::

    builder                                              verdictd
    skopeo --encryption-key ─ unix socket ─ Forwarder ─ TLS, operator's token ─ Wrapper      (the key stays here)

    enclave                                              verdictd
    containerd, skopeo ─ unix socket ─ Unwrapper ─ key broker protocol: evidence, policy, JWE

A layer's key is encrypted (A256GCM) with a key-encryption key, which is a secret of verdictd's store, ``kid`` =
``kbs:///repo/type/tag``. Wrapping happens in verdictd, so that no builder ever has that key; unwrapping happens in the
enclave that the key was released to, by the one release decision that there is. ocicrypt's clients know neither TLS
that can be used nor tokens: they reach the local half by a unix socket (0600), and nothing listens in the clear.

Sources: ocicrypt ``utils/keyprovider/keyprovider.proto`` and ``keywrap/keyprovider``; guest-components
``AnnotationPacket``.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..enclave.kbs_uri import Resource
from ..errors import AppraisalError, EvidenceError, InclavareError, PlatformError, PolicyError, UsageError
from ..serving import missing
from .auth import Authenticator, Forbidden, Unauthenticated
from .limits import Rate, client_key
from .store import names
from .store.errors import Invalid, NotFound
from .telemetry import event

if TYPE_CHECKING:
    from .config import VerdictConfig
    from .store import Store

SERVICE = "keyprovider.KeyProviderService"
#: Name of the key provider in images' annotations, as Confidential Containers has it.
PROVIDER = "attestation-agent"
ANNOTATION = f"org.opencontainers.image.enc.keys.provider.{PROVIDER}"
WRAP_TYPE = "A256GCM"
KEY_BYTES = 32
#: Secrets with this metadata are key-encryption keys; no other secret encrypts anything here.
METADATA = {"use": "image-key"}
#: What may be such a key: an image that is not opened yet is not trusted to choose among all that an enclave may have.
KEYS = r"[^/]+/image_key/[^/]+"
_IV_BYTES = 12
_MAX_MESSAGE = 256 << 10
_THREADS = 4
_SECONDS = 30.0
_SHUTDOWN_SECONDS = 5.0


class Packet(msgspec.Struct, frozen=True):
    """What an image carries for each layer, all in base64 but the names."""

    kid: str
    wrapped_data: str
    iv: str
    wrap_type: str


class _WrapParams(msgspec.Struct):
    ec: Any = None
    optsdata: str | None = None


class _UnwrapParams(msgspec.Struct):
    dc: Any = None
    annotation: str | None = None


class _Input(msgspec.Struct):
    op: str
    keywrapparams: _WrapParams = msgspec.field(default_factory=_WrapParams)
    keyunwrapparams: _UnwrapParams = msgspec.field(default_factory=_UnwrapParams)


_INPUT = msgspec.json.Decoder(_Input)
_PACKET = msgspec.json.Decoder(Packet)


# --- formats


def encode(data: bytes) -> bytes:
    """The protocol's one message: a protobuf with field 1, bytes."""
    length, size = bytearray(), len(data)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return b"\x0a" + bytes([*length, size]) + data


def decode(raw: bytes) -> bytes:
    """Field 1 of the protocol's one message; nothing else may be in it.

    Raises:
        UsageError: ``keyprovider.message``.
    """
    size = at = 0
    if raw[:1] == b"\x0a":
        for at, byte in enumerate(raw[1:6], 2):
            size |= (byte & 0x7F) << 7 * (at - 2)
            if byte < 0x80 and at + size == len(raw):
                return raw[at:]
    raise _malformed("not a message with one field of bytes")


def wrap(kek: bytes, data: bytes, kid: str) -> bytes:
    """Encrypt a layer's key.

    Args:
        kek: 32 bytes.
        data: what ocicrypt wants to have kept.

    Returns:
        the annotation: :class:`Packet`, JSON.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    iv = os.urandom(_IV_BYTES)
    return msgspec.json.encode(Packet(kid, _b64(AESGCM(kek).encrypt(iv, data, None)), _b64(iv), WRAP_TYPE))


def unwrap(kek: bytes, packet: Packet) -> bytes:
    """Decrypt a layer's key.

    Raises:
        EvidenceError: ``keyprovider.packet`` or ``keyprovider.key``: malformed, changed, or of another key.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    iv, data = _unb64(packet.iv), _unb64(packet.wrapped_data)
    if packet.wrap_type != WRAP_TYPE or len(iv) != _IV_BYTES:
        raise EvidenceError(
            "the image's annotation is not one that this key provider writes",
            id="keyprovider.packet",
            found=f"{packet.wrap_type[:32]!r}, {len(iv)} bytes of iv",
            expected=f"{WRAP_TYPE}, {_IV_BYTES} bytes",
        )
    try:
        if len(kek) == KEY_BYTES:
            return AESGCM(kek).decrypt(iv, data, None)
    except InvalidTag:
        pass
    raise EvidenceError(
        "the key that was released does not open this layer's key",
        id="keyprovider.key",
        found=packet.kid,
        remedy="the annotation was changed, or the secret has a new version since: encrypt the image again",
    )


# --- the three who answer


class Answerer(Protocol):
    """What answers calls. An operation that it has not is refused."""

    def wrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """WrapKey: JSON in, JSON out."""

    def unwrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """UnWrapKey: JSON in, JSON out."""


class _Neither:
    def wrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """Refused."""
        raise PolicyError(
            "this key provider does not wrap keys",
            id="keyprovider.wrap",
            remedy="on the builder's machine: inclavare keyprovider wrap",
        )

    def unwrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """Refused."""
        raise PolicyError(
            "this key provider does not unwrap keys: they are released to attested enclaves only",
            id="keyprovider.unwrap",
            remedy="in the enclave: inclavare keyprovider unwrap",
        )


class Wrapper(_Neither):
    """verdictd's half: wraps, for operators of the tenant, with a key that stays in the store."""

    def __init__(self, config: VerdictConfig, store: Store) -> None:
        self._store = store
        self._limits = config.limits
        self._authenticator = Authenticator(config, store)
        self._clients = Rate()
        self._lock = threading.Lock()

    def wrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """Wrap with the key that ``keyid=`` names, which is made if there is none; without a name, with a new one."""
        host = peer.partition(":")[2].rpartition(":")[0]
        with self._lock:
            wait = self._clients.wait(client_key(host.strip("[]")), self._limits.client_requests)
        if wait:
            raise PlatformError("too many requests", id="keyprovider.limit", expected=f"none for {wait:.0f} seconds")
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        tenant = metadata.get("tenant", "default")
        principal = self._authenticator.authenticate(token.strip() if scheme.lower() == "bearer" else None, None)
        try:
            principal.require(tenant, "operator")
        except Forbidden as error:
            refused = {"peer": peer, "tenant": tenant[:64], "reasons": [{"id": error.id, "found": str(error.found)}]}
            self._store.audit.append(principal.home, principal.actor, "keyprovider.wrap", "denied", refused)
            raise
        data, parameters = _wrap_request(message)
        kid = parameters.get("keyid") or f"kbs:///default/image_key/{secrets.token_hex(16)}"
        path = _path(kid)
        if not re.fullmatch(KEYS, path):
            raise _other_secret(path, KEYS)
        kek, version = self._key(tenant, path, parameters.get("policy"))
        detail = {"peer": peer, "resource": path, "version": version}
        self._store.audit.append(tenant, principal.actor, "keyprovider.wrap", "allowed", detail)
        return _output("keywrapresults", "annotation", wrap(kek, data, f"kbs:///{path}"))

    def _key(self, tenant: str, path: str, policy: str | None) -> tuple[bytes, int]:
        try:
            info = self._store.secrets.info(tenant, path)
        except NotFound:
            fresh = secrets.token_bytes(KEY_BYTES)
            info = self._store.secrets.put(tenant, path, fresh, policy=policy, metadata=METADATA)
            if info.version > 1:
                # Somebody else has made it meanwhile: the first one counts, or their image could not be opened.
                older = [
                    one.version for one in self._store.secrets.versions(tenant, path) if one.version < info.version
                ]
                if older:
                    self._store.secrets.delete(tenant, path, info.version)
                    info = self._store.secrets.info(tenant, path)
        if info.release_once or info.size != KEY_BYTES or info.metadata.get("use") != METADATA["use"]:
            raise UsageError(
                "this secret is not a key for images",
                id="keyprovider.secret",
                found=path,
                expected=f"{KEY_BYTES} bytes with the metadata use=image-key, not to be released once only",
                remedy="name a path at which there is no secret yet: the key is made",
            )
        if policy is not None and info.policy != policy:
            raise UsageError(
                "this key is released by another policy",
                id="keyprovider.policy",
                found=info.policy or "the tenant's default",
                expected=policy,
                remedy="leave the policy out, or name another key",
            )
        # The holder is nobody who could be released to: what is not release-once is not claimed by it.
        reader = sha256(b"keyprovider").hexdigest()
        return self._store.secrets.read(tenant, path, holder=reader, version=info.version), info.version


class Forwarder(_Neither):
    """The builder's half: hands WrapKey on to verdictd, with the operator's token. The caller is this user.

    Args:
        address: ``host:port`` of verdictd's key provider.
        trust_anchor: PEM; only its certificates are trusted.
        token: is called for each wrapping, so that a replaced token counts.
        tenant: whose key.
    """

    def __init__(self, address: str, trust_anchor: bytes, token: Callable[[], str], *, tenant: str = "default") -> None:
        grpc = _grpc()
        self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(trust_anchor), options=_OPTIONS)
        self._call = self._channel.unary_unary(f"/{SERVICE}/WrapKey", _registered_method=True)
        self._token = token
        self._tenant = tenant

    def wrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """Hand it on."""
        grpc = _grpc()
        sent = (("authorization", f"Bearer {self._token()}"), ("tenant", self._tenant))
        try:
            return decode(self._call(encode(message), timeout=_SECONDS, metadata=sent))
        except grpc.RpcError as error:
            codes = grpc.StatusCode
            denied = error.code() in (codes.PERMISSION_DENIED, codes.UNAUTHENTICATED, codes.INVALID_ARGUMENT)
            raise (PolicyError if denied else PlatformError)(
                "verdictd does not wrap the key" if denied else "verdictd's key provider cannot be reached",
                id="keyprovider.denied" if denied else "keyprovider.unreachable",
                found=error.details(),
            ) from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


class KeyBroker(Protocol):
    """What keys are released by: :class:`inclavare.attestation.kbs_client.KbsClient`."""

    def get(self, uri: str) -> bytes:
        """What a URI names, released to this enclave."""


class Unwrapper(_Neither):
    """The enclave's half: has the key released to this enclave, and unwraps with it.

    Args:
        broker: attests this enclave.
        keys: what images may name as keys, a regular expression over ``repo/type/tag``.
    """

    def __init__(self, broker: KeyBroker, *, keys: str = KEYS) -> None:
        self._broker = broker
        self._keys = re.compile(keys)
        self._lock = threading.Lock()

    def unwrap_key(self, message: bytes, metadata: dict[str, str], peer: str) -> bytes:
        """Unwrap."""
        request = _request(message, "keyunwrap")
        try:
            packet = _PACKET.decode(_unb64(request.keyunwrapparams.annotation or ""))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise EvidenceError("the image's annotation is malformed", id="keyprovider.packet") from None
        path = _path(packet.kid)
        if not self._keys.fullmatch(path):
            raise _other_secret(path, self._keys.pattern)
        with self._lock:
            kek = self._broker.get(f"kbs:///{path}")
        return _output("keyunwrapresults", "optsdata", unwrap(kek, packet))


# --- serving


class Server:
    """A gRPC server of the protocol.

    Args:
        answerer: who answers.
        address: ``host:port`` (port 0 for any) with ``certificate``, or a path: a unix socket for this user only.
        certificate: PEM chain and key.

    Raises:
        UsageError: ``keyprovider.listen``: the address is taken, or its directory is others' to write to.
        PlatformError: ``serving.missing``.
    """

    def __init__(self, answerer: Answerer, address: str | Path, certificate: tuple[Path, Path] | None = None) -> None:
        grpc = _grpc()
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="keyprovider"),
            options=[*_OPTIONS, ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=64,
        )
        methods = {"WrapKey": answerer.wrap_key, "UnWrapKey": answerer.unwrap_key}
        handlers = {name: grpc.unary_unary_rpc_method_handler(_handler(call)) for name, call in methods.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._socket = address if isinstance(address, Path) else None
        try:
            if isinstance(address, Path):
                _private_directory(address.parent)
                address.unlink(missing_ok=True)
                before = os.umask(0o177)
                try:
                    self._server.add_insecure_port(f"unix:{address}")
                finally:
                    os.umask(before)
                self.address = f"unix://{address}"
            else:
                assert certificate is not None
                chain, key = certificate
                credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
                port = self._server.add_secure_port(address, credentials)
                self.address = f"{address.rpartition(':')[0]}:{port}"
        except (RuntimeError, OSError) as error:
            raise UsageError(
                f"cannot listen on {address}",
                id="keyprovider.listen",
                found=getattr(error, "strerror", None) or str(error),
                remedy="name an address of this machine and a free port, or a socket below a directory of your own",
            ) from None

    def __enter__(self) -> Server:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(_SHUTDOWN_SECONDS).wait()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)


_OPTIONS = (("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.max_send_message_length", _MAX_MESSAGE))


def _handler(call: Callable[[bytes, dict[str, str], str], bytes]) -> Callable[[bytes, Any], bytes]:
    grpc = _grpc()
    codes = grpc.StatusCode
    by_class = (
        (Unauthenticated, codes.UNAUTHENTICATED),
        ((PolicyError, AppraisalError), codes.PERMISSION_DENIED),
        (EvidenceError, codes.FAILED_PRECONDITION),
        (UsageError, codes.INVALID_ARGUMENT),
    )

    def answer(raw: bytes, context: Any) -> bytes:
        metadata = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
        try:
            return encode(call(decode(raw), metadata, context.peer()))
        except InclavareError as error:
            event("keyprovider.refused", reason=error.id, peer=context.peer())
            code = next((code for kind, code in by_class if isinstance(error, kind)), codes.UNAVAILABLE)
            context.abort(code, error.one_line())
        except Exception as error:
            # Not with its text, which may quote what must not be seen.
            event("keyprovider.fault", kind=type(error).__name__)
            context.abort(codes.INTERNAL, "the key provider failed")
        raise AssertionError

    return answer


def _private_directory(directory: Path) -> None:
    """The socket has its mode from the first moment on; that nobody replaces it, the directory has to see to."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UsageError(
            f"others may write to {directory}",
            id="keyprovider.listen",
            found=f"owner {found.st_uid}, mode {found.st_mode & 0o7777:04o}",
            expected=f"owner {os.geteuid()}, mode 0700",
        )


def _grpc() -> Any:
    try:
        import grpc  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing(error) from None
    return grpc


def _request(message: bytes, operation: str) -> _Input:
    try:
        found = _INPUT.decode(message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise _malformed("not ocicrypt's JSON") from None
    if found.op != operation:
        raise _malformed(f"op {found.op[:32]!r}")
    return found


def _wrap_request(message: bytes) -> tuple[bytes, dict[str, str]]:
    """What is to be wrapped, and the parameters: ``provider:attestation-agent:name=value::name=value``."""
    request = _request(message, "keywrap")
    ec = request.keywrapparams.ec
    given = ec.get("Parameters") if isinstance(ec, dict) else None
    own = given.get(PROVIDER) if isinstance(given, dict) else None
    text = ""
    if isinstance(own, list) and own and isinstance(own[0], str):
        text = _unb64(own[0]).decode("utf-8", "replace")
    found = dict(part.partition("=")[::2] for part in text.split("::") if "=" in part)
    strange = set(found) - {"keyid", "policy", "algorithm"}
    if strange or found.get("algorithm", WRAP_TYPE) != WRAP_TYPE:
        raise UsageError(
            "the encryption key's parameters are not understood",
            id="keyprovider.parameters",
            found=text[:300],
            expected=f"provider:{PROVIDER}:keyid=kbs:///repo/image_key/tag[::policy=ID]",
        )
    data = _unb64(request.keywrapparams.optsdata or "")
    if not data:
        raise _malformed("nothing to wrap")
    return data, found


def _path(kid: str) -> str:
    resource = Resource.parse(kid)
    if resource.plugin != "resource" or resource.query:
        raise UsageError(
            "not a key in verdictd's store", id="keyprovider.kid", found=kid[:300], expected="kbs:///repo/type/tag"
        )
    try:
        return names.path("/".join(resource.path))
    except Invalid as error:
        raise UsageError(error.message, id="keyprovider.kid", found=kid[:300], expected=error.expected) from None


def _other_secret(path: str, expected: str) -> PolicyError:
    return PolicyError("this secret is not one for images", id="keyprovider.kid", found=path, expected=expected)


def _output(results: str, name: str, value: bytes) -> bytes:
    return msgspec.json.encode({results: {name: _b64(value)}})


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unb64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed("not base64") from None


def _malformed(found: str) -> UsageError:
    return UsageError("the call is not one of ocicrypt's key provider protocol", id="keyprovider.message", found=found)

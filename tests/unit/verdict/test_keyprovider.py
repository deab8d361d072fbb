"""ocicrypt's key provider, with skopeo, with containerd, and call by call.

Debian 12 builds its skopeo 1.9.3 with ocicrypt 1.0, which knows no key providers: the environment's ``SKOPEO`` names
another one, built with ocicrypt 1.1 or later (``-tags containers_image_openpgp``, no C needed). ``IMGCRYPT`` names the
directory with containerd/imgcrypt's ``ctr`` and ``ctd-decoder``, which Debian does not have.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from verdict_service import Service

from inclavare.attestation.kbs_client import KbsClient
from inclavare.errors import EvidenceError, InclavareError, PolicyError, UsageError
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform
from inclavare.verdict import auth, keyprovider
from inclavare.verdict.keyprovider import Forwarder, Packet, Server, Unwrapper, Wrapper

KID = "kbs:///default/image_key/shop"
SKOPEO = os.environ.get("SKOPEO", "skopeo")
PATH = "default/image_key/shop"


class Quoting:
    """Quotes of an enclave on the simulated platform."""

    def __init__(self, platform: SimulatedPlatform, enclave: SimulatedEnclave) -> None:
        self._platform, self._enclave = platform, enclave

    def quote(self, report_data: bytes) -> bytes:
        report = self._enclave.report(self._platform.quote_target_info(), report_data)
        return self._platform.quote(report)

    def collateral(self) -> dict[str, Any] | None:
        return self._platform.collateral()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wrapping(parameters: str = f"keyid={KID}", data: bytes = b"a layer's key") -> bytes:
    ec = {"Parameters": {"attestation-agent": [b64(parameters.encode())]}}
    return json.dumps({"op": "keywrap", "keywrapparams": {"ec": ec, "optsdata": b64(data)}}).encode()


def unwrapping(annotation: bytes) -> bytes:
    parameters = {"dc": {"Parameters": {}}, "annotation": b64(annotation)}
    return json.dumps({"op": "keyunwrap", "keywrapparams": {"ec": None}, "keyunwrapparams": parameters}).encode()


def annotation(output: bytes) -> bytes:
    return base64.b64decode(json.loads(output)["keywrapresults"]["annotation"])


def token(service: Service, role: str = "operator", tenant: str = "default") -> str:
    return auth.issue(service.store, tenant, "builder", role, 600)[1]  # type: ignore[arg-type]


@pytest.fixture
def wrapper(service: Service) -> Iterator[Server]:
    """verdictd's half."""
    answerer = Wrapper(service.config, service.store)
    certificate = (service.config.certificate, service.config.certificate_key)
    with Server(answerer, "127.0.0.1:0", certificate) as server:
        yield server


@pytest.fixture
def builder(service: Service, wrapper: Server, tmp_path: Path) -> Iterator[Server]:
    """The builder's half."""
    known = token(service)
    forwarder = Forwarder(wrapper.address, service.config.certificate.read_bytes(), lambda: known)
    with Server(forwarder, tmp_path / "builder" / "sock") as server:
        yield server
    forwarder.close()


def unwrapper(service: Service, content: bytes = b"workload") -> Unwrapper:
    """An enclave's half; the policy accepts the enclave ``workload``."""
    anchor = service.config.certificate.read_text()
    quoting = Quoting(service.platform, service.enclave(content))
    return Unwrapper(KbsClient(service.url, anchor, quoting, tee="sgx-sim"))


def call(server: Server, method: str, message: bytes) -> bytes:
    with grpc.insecure_channel(server.address) as channel:
        return keyprovider.decode(channel.unary_unary(f"/{keyprovider.SERVICE}/{method}")(keyprovider.encode(message)))


# --- the whole, with skopeo


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OCI image."""
    for program in (SKOPEO, "umoci"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if b"OCICRYPT_KEYPROVIDER_CONFIG" not in Path(str(shutil.which(SKOPEO))).read_bytes():
        pytest.skip(f"this {SKOPEO} was built without key providers; SKOPEO=<path> names another one")
    base = tmp_path_factory.mktemp("image")
    content = base / "content"
    content.mkdir()
    (content / "secret.txt").write_text("TOP-SECRET recipe\n" * 100)
    layout = base / "plain"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:v1"], check=True)
    subprocess.run(["umoci", "insert", "--rootless", "--image", f"{layout}:v1", content, "/data"], check=True)
    return layout


def skopeo(directory: Path, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = directory / "ocicrypt.json"
    config.write_text(json.dumps({"key-providers": {keyprovider.PROVIDER: {"grpc": server.address}}}))
    environment = {**os.environ, "OCICRYPT_KEYPROVIDER_CONFIG": str(config)}
    command = [SKOPEO, "--insecure-policy", "copy", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def layers(layout: Path) -> list[dict[str, Any]]:
    index = json.loads((layout / "index.json").read_text())
    manifest = layout / "blobs" / "sha256" / index["manifests"][0]["digest"].partition(":")[2]
    found: list[dict[str, Any]] = json.loads(manifest.read_text())["layers"]
    return found


def test_skopeo_encrypts_for_an_enclave_and_decrypts_in_it(
    service: Service, builder: Server, image: Path, tmp_path: Path
) -> None:
    key = f"provider:{keyprovider.PROVIDER}:keyid={KID}"
    plain, sealed, opened = f"oci:{image}:v1", f"oci:{tmp_path}/sealed:v1", f"oci:{tmp_path}/opened:v1"
    made = skopeo(tmp_path, builder, "--encryption-key", key, plain, sealed)
    assert made.returncode == 0, made.stderr
    for layer in layers(tmp_path / "sealed"):
        assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
        packet = json.loads(base64.b64decode(layer["annotations"][keyprovider.ANNOTATION]))
        assert packet.keys() == {"kid", "wrapped_data", "iv", "wrap_type"}
        assert (packet["kid"], packet["wrap_type"]) == (KID, "A256GCM")
        blob = (tmp_path / "sealed" / "blobs" / "sha256" / layer["digest"].partition(":")[2]).read_bytes()
        assert blob[:2] != b"\x1f\x8b"
    entry = service.last_decision()
    assert (entry.action, entry.decision, entry.actor) == ("keyprovider.wrap", "allowed", "token:builder")
    assert entry.detail["resource"] == PATH

    decrypt = ["--decryption-key", f"provider:{keyprovider.PROVIDER}:x"]
    with Server(unwrapper(service), tmp_path / "enclave" / "sock") as server:
        done = skopeo(tmp_path, server, *decrypt, sealed, opened)
    assert done.returncode == 0, done.stderr
    assert [layer["digest"] for layer in layers(tmp_path / "opened")] == [layer["digest"] for layer in layers(image)]
    assert service.last_decision().action == "kbs.release"

    with Server(unwrapper(service, b"another"), tmp_path / "other" / "sock") as server:
        done = skopeo(tmp_path, server, *decrypt, sealed, f"oci:{tmp_path}/stolen:v1")
    assert done.returncode != 0
    assert "policy.mrenclave" in done.stderr
    assert not list((tmp_path / "stolen").glob("blobs/sha256/*"))

    # Where images are built they cannot be opened, not even by who has encrypted them.
    done = skopeo(tmp_path, builder, *decrypt, sealed, f"oci:{tmp_path}/again:v1")
    assert done.returncode != 0
    assert "released to attested enclaves only" in done.stderr


# --- the same with containerd


@pytest.mark.daemon
@pytest.mark.crun
def test_containerd_encrypts_for_an_enclave_and_runs_what_it_decrypts(
    service: Service, builder: Server, tmp_path: Path
) -> None:
    """containerd hands encrypted layers to imgcrypt's ``ctd-decoder``, which asks the enclave's half for their keys."""
    if "IMGCRYPT" not in os.environ:
        pytest.skip("IMGCRYPT=<directory> names no ctr and ctd-decoder of containerd/imgcrypt 1.1")
    sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
    from daemons import Containerd, Workspace

    tools, found = Path(os.environ["IMGCRYPT"]), tmp_path / "ocicrypt.json"
    decoded = "application/vnd.oci.image.layer.v1.tar"
    config = f"""version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar"]
accepts = ["{decoded}+encrypted"]
returns = "{decoded}"
path = "{tools}/ctd-decoder"
env = ["OCICRYPT_KEYPROVIDER_CONFIG={found}"]
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
accepts = ["{decoded}+gzip+encrypted"]
returns = "{decoded}+gzip"
path = "{tools}/ctd-decoder"
env = ["OCICRYPT_KEYPROVIDER_CONFIG={found}"]
"""
    containerd = Containerd(Workspace("ctr"), config)
    sealed = "docker.io/inclavare/sealed:1"

    def ctr(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
        found.write_text(json.dumps({"key-providers": {keyprovider.PROVIDER: {"grpc": server.address}}}))
        argv = [str(tools / "ctr"), *containerd.argv(*words)[1:]]
        env = {**containerd.work.env, "OCICRYPT_KEYPROVIDER_CONFIG": str(found)}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)

    def run(server: Server) -> subprocess.CompletedProcess[str]:
        key = f"provider:{keyprovider.PROVIDER}:x"
        return ctr(server, "run", "--rm", "--key", key, "--runc-binary", "runc", sealed, "c", "cat", "/home/user/hello")

    try:
        recipient = f"provider:{keyprovider.PROVIDER}:keyid={KID}"
        made = ctr(builder, "images", "encrypt", "--recipient", recipient, containerd.image, sealed)
        assert made.returncode == 0, made.stderr
        assert ctr(builder, "images", "remove", "--sync", containerd.image).returncode == 0
        # What was unpacked before it was encrypted must not be what runs.
        for line in containerd("snapshots", "ls").stdout.splitlines()[1:]:
            assert containerd("snapshots", "rm", line.split()[0]).returncode == 0
        with Server(unwrapper(service, b"another"), tmp_path / "other" / "sock") as server:
            refused = run(server)
        assert refused.returncode != 0
        assert "policy.mrenclave" in refused.stderr
        assert containerd("snapshots", "ls", "-q").stdout.count("sha256:") == 0
        with Server(unwrapper(service), tmp_path / "enclave" / "sock") as server:
            done = run(server)
        assert done.stdout == "hello\n", done.stderr
        assert service.last_decision().action == "kbs.release"
    finally:
        containerd.close()


def test_the_commands_serve_until_sigterm(service: Service, tmp_path: Path) -> None:
    known = tmp_path / "token"
    known.touch(mode=0o600)
    known.write_text(token(service))
    config = tmp_path / "verdictd.toml"
    config.write_text(f'state_dir = "{service.config.state_dir}"\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    inclavare = [str(Path(sys.executable).with_name("inclavare"))]
    where = tmp_path / "run" / "sock"
    given = ["--verdictd", address, "--trust-anchor", str(service.config.certificate), "--token-file", str(known)]
    commands = (
        [*inclavare, "verdictd", "keyprovider", "--config", str(config), "--listen", address],
        [*inclavare, "keyprovider", "wrap", "--socket", str(where), *given],
    )
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("listening on ")
        assert stat.S_IMODE(where.stat().st_mode) == 0o600
        with grpc.insecure_channel(f"unix://{where}") as channel:
            method = channel.unary_unary(f"/{keyprovider.SERVICE}/WrapKey")
            packet = json.loads(annotation(keyprovider.decode(method(keyprovider.encode(wrapping())))))
        assert packet["kid"] == KID
        for process in running:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in running] == [0, 0]
        assert not where.exists()
    finally:
        for process in running:
            process.kill()
            process.communicate()


# --- who may call what


def test_nobody_wraps_without_an_operators_token(service: Service, wrapper: Server) -> None:
    roots = grpc.ssl_channel_credentials(service.config.certificate.read_bytes())
    message = keyprovider.encode(wrapping())

    def attempt(*metadata: tuple[str, str]) -> Any:
        with grpc.secure_channel(wrapper.address, roots) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{keyprovider.SERVICE}/WrapKey")(message, metadata=metadata)
            return caught.value

    codes = grpc.StatusCode
    assert attempt().code() == codes.UNAUTHENTICATED
    assert attempt(("authorization", "Bearer eyJ.x.y")).code() == codes.UNAUTHENTICATED
    auditor = ("authorization", f"Bearer {token(service, 'auditor')}")
    assert attempt(auditor).code() == codes.PERMISSION_DENIED
    assert (service.last_decision().action, service.last_decision().decision) == ("keyprovider.wrap", "denied")
    other = ("authorization", f"Bearer {token(service)}")
    foreign, unknown = (attempt(other, ("tenant", name)) for name in ("other", "nobody"))
    assert foreign.code() == unknown.code() == codes.PERMISSION_DENIED
    assert foreign.details() == unknown.details()
    with pytest.raises(InclavareError) as caught:
        service.store.secrets.info("default", PATH)
    assert caught.value.id == "verdict.store.secret.unknown"
    with grpc.insecure_channel(wrapper.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/{keyprovider.SERVICE}/WrapKey")(message, timeout=2)


def test_a_server_with_another_certificate_gets_no_token(wrapper: Server, tmp_path: Path) -> None:
    from inclavare.serving import own_certificate

    foreign, _ = own_certificate(tmp_path / "tls", (), common_name="verdictd")
    asked: list[str] = []
    forwarder = Forwarder(wrapper.address, foreign.read_bytes(), lambda: asked.append("x") or "token")  # type: ignore[func-returns-value]
    with pytest.raises(InclavareError) as caught:
        forwarder.wrap_key(wrapping(), {}, "")
    forwarder.close()
    assert caught.value.id == "keyprovider.unreachable"


def test_only_keys_for_images_are_wrapped_with(service: Service, builder: Server) -> None:
    store = service.store

    def refused(parameters: str) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            call(builder, "WrapKey", wrapping(parameters))
        return str(caught.value.details())

    assert "keyprovider.kid" in refused("keyid=kbs:///app/key/1")
    assert "keyprovider.kid" in refused("keyid=kbs+vault:///a/image_key/c")
    store.secrets.put("default", "app/image_key/1", bytes(32))
    assert "keyprovider.secret" in refused("keyid=kbs:///app/image_key/1")
    store.secrets.put("default", "app/image_key/2", bytes(32), release_once=True, metadata=keyprovider.METADATA)
    assert "keyprovider.secret" in refused("keyid=kbs:///app/image_key/2")
    assert store.secrets.info("default", "app/image_key/2").released is None
    assert "keyprovider.parameters" in refused("keypath=/etc/shadow")
    assert "keyprovider.parameters" in refused("algorithm=A256CTR")
    call(builder, "WrapKey", wrapping())
    assert "keyprovider.policy" in refused(f"keyid={KID}::policy=other")


def test_each_image_without_a_name_has_a_key_of_its_own(builder: Server) -> None:
    kids = {json.loads(annotation(call(builder, "WrapKey", wrapping(""))))["kid"] for _ in range(3)}
    assert len(kids) == 3


def test_an_image_cannot_ask_for_other_secrets(service: Service) -> None:
    service.store.secrets.put("default", "app/once/1", bytes(32), release_once=True)
    for kid in ("kbs:///app/once/1", "kbs+ca:///default/image_key/x", "kbs:///a/image_key/../x", "http://x/", ""):
        packet = json.dumps({"kid": kid, "wrapped_data": "", "iv": b64(bytes(12)), "wrap_type": "A256GCM"}).encode()
        with pytest.raises((PolicyError, UsageError)) as caught:
            unwrapper(service).unwrap_key(unwrapping(packet), {}, "")
        assert caught.value.id in ("keyprovider.kid", "kbs.uri")
    assert service.store.secrets.info("default", "app/once/1").released is None


def test_the_socket_is_this_users_alone(builder: Server, tmp_path: Path) -> None:
    where = Path(builder.address.removeprefix("unix://"))
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    assert stat.S_IMODE(where.parent.stat().st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError) as caught:
        Server(keyprovider._Neither(), shared / "sock")
    assert caught.value.id == "keyprovider.listen"


# --- formats


def protobuf(data: bytes) -> bytes:
    """The same message by Google's library."""
    file = descriptor_pb2.FileDescriptorProto(name="keyprovider.proto", package="keyprovider", syntax="proto3")
    message = file.message_type.add(name="keyProviderKeyWrapProtocolInput")
    kind = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="Input", number=1, type=kind.TYPE_BYTES, label=kind.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName("keyprovider.keyProviderKeyWrapProtocolInput")
    return bytes(message_factory.GetMessageClass(descriptor)(Input=data).SerializeToString())


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, 100_000])
def test_messages_are_protobufs(size: int) -> None:
    data = os.urandom(size)
    assert keyprovider.encode(data) == protobuf(data)
    assert keyprovider.decode(protobuf(data)) == data


@given(st.binary(max_size=40))
def test_other_messages_are_refused(raw: bytes) -> None:
    try:
        found = keyprovider.decode(raw)
    except UsageError as error:
        assert error.id == "keyprovider.message"
    else:
        assert raw.endswith(found)
        assert raw[:1] == b"\x0a"


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_changed_annotation_is_not_opened(data: bytes, draw: st.DataObject) -> None:
    import msgspec

    kek = os.urandom(32)
    packet = msgspec.json.decode(keyprovider.wrap(kek, data, KID), type=Packet)
    assert keyprovider.unwrap(kek, packet) == data
    raw = bytearray(base64.b64decode(packet.wrapped_data))
    raw[draw.draw(st.integers(0, len(raw) - 1))] ^= draw.draw(st.integers(1, 255))
    for changed in (
        Packet(KID, b64(bytes(raw)), packet.iv, packet.wrap_type),
        Packet(KID, packet.wrapped_data, b64(os.urandom(12)), packet.wrap_type),
        Packet(KID, packet.wrapped_data, packet.iv, "A256CTR"),
    ):
        with pytest.raises(EvidenceError):
            keyprovider.unwrap(kek, changed)
    with pytest.raises(EvidenceError):
        keyprovider.unwrap(os.urandom(32), packet)


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.text(max_size=8), st.lists).map(json.dumps)))
def test_malformed_calls_are_refused(message: bytes | str) -> None:
    raw = message.encode() if isinstance(message, str) else message

    class Nothing:
        def get(self, uri: str) -> bytes:
            raise AssertionError

    with pytest.raises(InclavareError):
        Unwrapper(Nothing()).unwrap_key(raw, {}, "")

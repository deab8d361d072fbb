"""The control socket: challenges, releases, and whatever else somebody may send; and the client's side of it."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inclavare.attestation import Evidence
from inclavare.attestation.channel import encrypt, report_data
from inclavare.config import Config
from inclavare.errors import EvidenceError, InclavareError, PlatformError, UsageError
from inclavare.runelet import client, control
from inclavare.runelet.control import ControlServer
from inclavare.runelet.job import CONTROL, write_meta
from inclavare.shield.secrets import SecretStore
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform


@dataclass
class Running:
    """A served container."""

    directory: Path
    enclave: SimulatedEnclave
    secrets: SecretStore
    server: ControlServer

    def ask(self, **request: Any) -> dict[str, Any]:
        return client.call(self.directory, request)

    def refused(self, **request: Any) -> InclavareError:
        with pytest.raises(InclavareError) as caught:
            self.ask(**request)
        return caught.value

    def raw(self, data: bytes) -> dict[str, Any]:
        """The reply to bytes that no client of ours would send."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self.directory / CONTROL))
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has heard enough
            reply = b""
            while chunk := connection.recv(65536):
                reply += chunk
        found: dict[str, Any] = json.loads(reply)
        return found

    def challenge(self) -> Evidence:
        nonce = base64.b64encode(os.urandom(32)).decode()
        return Evidence.from_dict(self.ask(op="attest", nonce=nonce)["evidence"])


@pytest.fixture
def running(tmp_path: Path, platform: SimulatedPlatform, load: Any) -> Iterator[Running]:
    # Longer than a socket's address may be.
    directory = tmp_path / ("d" * 90) / "c1"
    directory.mkdir(parents=True)
    enclave, secrets = load(), SecretStore()
    server = ControlServer(directory / CONTROL, "c1", enclave, platform, secrets)
    server.start()
    yield Running(directory, enclave, secrets, server)
    server.close()
    enclave.destroy()


@pytest.fixture
def short(tmp_path: Path, platform: SimulatedPlatform, load: Any) -> Iterator[Running]:
    enclave, secrets = load(), SecretStore()
    server = ControlServer(tmp_path / CONTROL, "c1", enclave, platform, secrets)
    server.start()
    yield Running(tmp_path, enclave, secrets, server)
    server.close()
    enclave.destroy()


def test_info(running: Running) -> None:
    running.secrets.put(b"token", b"x")
    info = running.ask(op="info")
    assert info["mrenclave"] == running.enclave.mrenclave.hex()
    assert (info["container"], info["tee"], info["simulated"], info["secrets"]) == ("c1", "sgx-sim", True, ["token"])
    assert (running.directory / CONTROL).stat().st_mode & 0o777 == 0o600


def test_a_challenge_and_a_release(running: Running, platform: SimulatedPlatform) -> None:
    nonce = os.urandom(32)
    reply = running.ask(op="attest", nonce=base64.b64encode(nonce).decode())
    evidence = Evidence.from_dict(reply["evidence"])
    assert base64.b64decode(evidence.runtime_data["nonce"]) == nonce
    assert evidence.quote[48 + 320 : 48 + 384] == report_data(evidence.runtime_data)
    key = evidence.runtime_data["tee-pubkey"]
    release = {"op": "release", "name": "a.token", "tee_pubkey": key, "jwe": encrypt(key, b"\0 the secret \xff")}
    assert running.ask(**release) == {"released": "a.token"}
    assert running.secrets.get(b"a.token") == b"\0 the secret \xff"
    assert running.refused(**release).id == "control.release.key"  # once


def test_each_challenge_has_a_key_of_its_own_and_old_ones_are_dropped(running: Running) -> None:
    keys = [running.challenge().runtime_data["tee-pubkey"] for _ in range(control._CHANNELS + 1)]
    assert len({key["x"] for key in keys}) == len(keys)
    first = running.refused(op="release", name="n", tee_pubkey=keys[0], jwe=encrypt(keys[0], b"x"))
    assert isinstance(first, EvidenceError) and first.id == "control.release.key"
    # Encrypted to one key and sent as for another.
    assert isinstance(
        running.refused(op="release", name="n", tee_pubkey=keys[2], jwe=encrypt(keys[3], b"x")), InclavareError
    )
    assert running.ask(op="release", name="n", tee_pubkey=keys[-1], jwe=encrypt(keys[-1], b"x")) == {"released": "n"}


@pytest.mark.parametrize("nonce", [
    None, 7, "", "AAAA", base64.b64encode(bytes(15)).decode(), base64.b64encode(bytes(65)).decode(), "not base64!", "ä" * 24,
    base64.b64encode(bytes(32)).decode() + "\n", ["x"], {"a": 1},
])  # fmt: skip
def test_nonces_that_are_refused(short: Running, nonce: Any) -> None:
    error = short.refused(op="attest", nonce=nonce)
    assert (error.id, type(error)) == ("control.nonce.malformed", UsageError)


@pytest.mark.parametrize("size", [16, 64])
def test_nonces_of_the_smallest_and_largest_size(short: Running, size: int) -> None:
    assert short.ask(op="attest", nonce=base64.b64encode(bytes(size)).decode())["evidence"]["tee"] == "sgx-sim"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/abs", ".", "..", "", "x" * 129, "a\0b", "a b", "\ud800", 7, None, ["a"], {}]
)
def test_names_that_are_refused(short: Running, name: Any) -> None:
    key = short.challenge().runtime_data["tee-pubkey"]
    error = short.refused(op="release", name=name, tee_pubkey=key, jwe=encrypt(key, b"x"))
    assert (error.id, short.secrets.names()) == ("control.release.malformed", [])
    # The challenge is still open.
    assert short.ask(op="release", name="good", tee_pubkey=key, jwe=encrypt(key, b"x")) == {"released": "good"}


@pytest.mark.parametrize("key", [None, 7, "x", [], {}, {"x": "a"}])
def test_keys_that_are_none(short: Running, key: Any) -> None:
    assert short.refused(op="release", name="n", tee_pubkey=key, jwe={}).id == "control.release.malformed"


@pytest.mark.parametrize("jwe", [None, "text", 7, [], {}, {"protected": "x"}])
def test_messages_that_are_no_jwe(short: Running, jwe: Any) -> None:
    key = short.challenge().runtime_data["tee-pubkey"]
    error = short.refused(op="release", name="n", tee_pubkey=key, jwe=jwe)
    assert error.id != "control.fault"
    assert short.secrets.names() == []


@pytest.mark.parametrize("line", [
    b"", b"\n", b"nonsense\n", b"[]\n", b"7\n", b'"op"\n', b"null\n", b"{}\n", b'{"op": "info"} x\n', b"\xff\xfe\n",
    b"[" * 200_000 + b"\n", b'{"op": "info"}\n{"op": "info"}\n',
])  # fmt: skip
def test_requests_that_are_none(short: Running, line: bytes) -> None:
    assert short.raw(line)["error"]["id"] == "control.request.malformed"


@pytest.mark.parametrize("operation", ["other", "", None, 7, [], {}])
def test_operations_that_are_unknown(short: Running, operation: Any) -> None:
    assert short.refused(op=operation).id == "control.request.unknown"


def test_a_request_without_its_final_newline(short: Running) -> None:
    assert short.raw(b'{"op": "info"}')["container"] == "c1"


def test_a_request_that_is_too_large(short: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert short.raw(b" " * (control._REQUEST + (1 << 20)))["error"]["id"] == "control.request.size"
    assert short.refused(op="info", more="x" * control._REQUEST).id == "control.request.size"
    with monkeypatch.context() as patch:
        patch.setattr(control, "_DRAINED", control._REQUEST + 1)
        # Not read to the end: whether the sender still comes to read the refusal depends on who is quicker.
        try:
            reply = short.raw(b" " * (16 << 20))
        except ConnectionError:
            pass
        else:
            assert reply["error"]["id"] == "control.request.size"
    # A secret of a megabyte is none.
    key = short.challenge().runtime_data["tee-pubkey"]
    large = os.urandom(1 << 20)
    short.ask(op="release", name="large", tee_pubkey=key, jwe=encrypt(key, large))
    assert short.secrets.get(b"large") == large
    key = short.challenge().runtime_data["tee-pubkey"]
    error = short.refused(op="release", name="larger", tee_pubkey=key, jwe=encrypt(key, large + b"xx"))
    assert error.id == "evidence.channel.jwe" and "size" in str(error.found)


def test_one_that_says_nothing_holds_up_nobody(short: Running) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for connection in silent:
        connection.connect(str(short.directory / CONTROL))
    assert short.ask(op="info")["container"] == "c1"
    for connection in silent:
        connection.close()


def test_many_at_once(short: Running) -> None:
    found: list[str] = []

    def ask() -> None:
        found.append(short.challenge().runtime_data["tee-pubkey"]["x"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_nothing_is_answered_after_the_close(short: Running) -> None:
    key = short.challenge().runtime_data["tee-pubkey"]
    short.server.close()
    for _ in range(2):
        with pytest.raises(PlatformError, match="does not answer"):
            short.ask(op="release", name="n", tee_pubkey=key, jwe=encrypt(key, b"x"))
    assert short.secrets.names() == []
    short.server.close()


def test_a_fault_tells_its_kind_and_not_its_text(short: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[bytes]:
        raise RuntimeError("what was decrypted")

    monkeypatch.setattr(short.secrets, "names", fail)
    error = short.refused(op="info")
    assert error.id == "control.fault"
    assert "RuntimeError" in error.message and "decrypted" not in json.dumps(error.to_dict())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


requests = st.fixed_dictionaries(
    {"op": st.sampled_from(["attest", "release"])},
    optional={"nonce": json_values, "name": json_values, "tee_pubkey": json_values, "jwe": json_values},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests)
def test_any_request_is_refused_by_name(short: Running, fields: dict[str, Any]) -> None:
    error = short.refused(**fields)
    assert error.id.startswith("control.") and error.id != "control.fault"


# --- the client


@pytest.fixture
def node(tmp_path: Path) -> Config:
    base = tmp_path / "run/enclaves"
    for root, name in (("%2Frun%2Frune", "abcdef"), ("%2Frun%2Frune", "abcxyz"), ("%2Frun%2Frune", "solo"),
                       ("%2Fother", "solo"), ("%2Frun%2Frune", "so")):  # fmt: skip
        (base / root / name).mkdir(parents=True)
    (base / "%2Frun%2Frune/file").touch()
    write_meta(base / "%2Frun%2Frune/abcdef", tee="sgx-sim")
    (base / "%2Frun%2Frune/abcxyz/meta.json").write_bytes(b"\xff damaged")
    return Config(run_dir=tmp_path / "run")


def test_containers_are_found_by_id_or_a_unique_beginning(node: Config) -> None:
    assert client.find(node, "abcd").name == "abcdef"
    assert client.find(node, "abcxyz").name == "abcxyz"
    assert client.find(node, "so").name == "so"  # exact, though others begin so
    assert [(path.name, meta) for path, meta in client.containers(node)][:2] == [
        ("abcdef", {"tee": "sgx-sim"}),
        ("abcxyz", {}),
    ]


@pytest.mark.parametrize(("name", "id"), [
    ("", "container.name.unknown"), ("x", "container.name.unknown"), ("abcdefg", "container.name.unknown"),
    ("*", "container.name.unknown"), ("../abcdef", "container.name.unknown"), ("abc", "container.name.ambiguous"),
    ("solo", "container.name.ambiguous"), ("sol", "container.name.ambiguous"), ("file", "container.name.unknown"),
])  # fmt: skip
def test_none_and_several(node: Config, name: str, id: str) -> None:
    with pytest.raises(UsageError) as caught:
        client.find(node, name)
    assert caught.value.id == id
    assert caught.value.remedy


def test_a_node_without_containers(tmp_path: Path) -> None:
    assert client.containers(Config(run_dir=tmp_path)) == []
    with pytest.raises(UsageError, match="there is no"):
        client.find(Config(run_dir=tmp_path), "c1")


def test_a_container_that_does_not_answer(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PlatformError) as caught:
            client.call(directory, {"op": "info"})
        assert caught.value.id == "runelet.socket.unreachable"


@pytest.mark.parametrize("answer", [b"", b'{"contai', b"nonsense"])
def test_a_runelet_that_dies_while_it_answers(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / CONTROL))
        server.listen()

        def answer_one() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=answer_one)
        thread.start()
        with pytest.raises(PlatformError) as caught:
            client.call(tmp_path, {"op": "info"})
        thread.join()
    assert caught.value.id == "runelet.socket.closed"

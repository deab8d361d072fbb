"""A container gets its secrets from verdictd before it starts; then each link of the chain is broken in turn."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap
from test_first_light import Node

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit/verdict"))
from kbs_client import Client, Key
from runebox import wait_for

from inclavare.rune import launcher
from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.store import FileKey, Store

pytestmark = pytest.mark.crun

SECRET = b"correct horse battery staple"
WORD = "an open word"
VOLUME_KEY = hashlib.sha256(b"volume").digest()
#: What the application shows: the file and its mode, its environment, the volume, and what it reads through REST.
SCRIPT = """cat /run/keys/app | md5sum; stat -c '%a %u:%g' /run/keys/app; echo "word=$WORD"
test -e /vault/state && cat /vault/state; echo "kept" > /vault/state
echo changed > /run/keys/app || echo "read-only"
while ! test -e /data/stop; do cat /run/keys/app | md5sum > /data/new; mv /data/new /data/now; sleep 0.1; done"""
FRESH = 1.2  # seconds after which verdictd decides by changed policies


class World(Node):
    """A node, a relying party, and its verdictd: a process with TLS and a database."""

    def open(self) -> None:
        """Start everything."""
        self.file = self.base / "verdictd.toml"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        made = self.inclavare(
            "verdictd", "init", "-c", self.file, "--state-dir", self.base / "verdictd",
            "--listen", f"127.0.0.1:{self.port}", "--json",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        self.fingerprint = json.loads(made.stdout)["fingerprint"]
        with self.file.open("a") as text:
            text.write('[tokens]\nlifetime = "2s"\n[limits]\nclient_requests = 100000\n')
        self.verdict = VerdictConfig.load(self.file)
        self.store = Store.open(self.verdict.store_url(), FileKey.load(self.verdict.master_key_file))
        self.process: subprocess.Popen[bytes] | None = None
        self.serve()

    def serve(self) -> None:
        """Start verdictd, and wait until it listens."""
        with (self.base / "verdictd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from inclavare.cli import main; main()", "verdictd", "serve", "-c", self.file],
                env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert b"listening" in said, (self.base / "verdictd.log").read_text()

    def halt(self) -> None:
        """Stop verdictd."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def close(self) -> None:
        """Stop everything."""
        self.store.close()
        self.halt()

    def manifest(self, *, anchor: str | None = None, policy: str = "", extra: str = "") -> str:
        """An ``enclave.toml`` with all kinds of secrets."""
        return f"""
[attestation]
verdictd = "https://127.0.0.1:{self.port}"
trust_anchor = '''{self.fingerprint if anchor is None else anchor}'''
policy = "{policy}"
[[secrets]]
uri = "kbs:///default/key/app"
path = "/run/keys/app"
[[secrets]]
uri = "kbs:///default/word/app"
env = "WORD"
[[secrets]]
uri = "kbs:///default/key/absent"
path = "/run/keys/absent"
required = false
[files]
allowed = ["/data"]
[[files.encrypted]]
path = "/vault"
key = "kbs:///default/key/vault"
[exec]
commands = ["/bin/sh"]
{extra}"""

    def secrets(self) -> None:
        """Everything that the manifest wants, as it was at first."""
        values = (("key/app", SECRET), ("word/app", WORD.encode()), ("key/vault", VOLUME_KEY))
        for path, value in values:
            self.store.secrets.put("default", f"default/{path}", value)

    def accept(self, **changes: str) -> None:
        """Make a policy for the last image that was built the tenant's; see :meth:`Node.policy`."""
        root = self.inclavare("sgx", "platform", "show", "--root-ca").stdout
        keys = {"trust_anchor": f"'''{root}'''", **changes}
        self.store.policies.put("default", "prod", "toml", self.policy(**keys).read_text())
        self.store.policies.set_default("default", "prod")
        time.sleep(FRESH)

    def case(
        self, image: Path, id: str, *, args: list[str] | None = None, mounts: dict[str, Path] | None = None
    ) -> Path:
        """A bundle of an enclave image, as :meth:`Node.start` makes it, with bind mounts."""
        process = json.loads((image / ".inclavare/manifest.json").read_text())["process"]

        def change(config: dict[str, Any]) -> None:
            config["process"]["args"] = args or process["args"]
            config["process"]["env"] = ["PATH=/bin"]
            for destination, source in (mounts or {}).items():
                source.mkdir(exist_ok=True)
                bind = {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", "rw"]}
                config["mounts"].append(bind)

        return self.bundle(name=f"{id}-bundle", tee="sgx-sim", change=change, rootfs=image)

    def begin(self, image: Path, id: str = "c1") -> tuple[Path, Path]:
        """Run an image in the background, its volume and ``/data`` on the host; output and ``/data``."""
        data = self.base / "data"
        shutil.rmtree(data, ignore_errors=True)
        bundle = self.case(image, id, mounts={"/data": data, "/vault": self.base / "vault-cipher"})
        output = self.base / f"{id}.out"
        with output.open("wb") as handle:
            done = subprocess.run(
                [self.rune, "--root", self.root, "run", "--detach", "--bundle", bundle, id],
                env=self.env, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, timeout=120,
            )  # fmt: skip
        assert done.returncode == 0, output.read_text()
        return output, data

    def end(self, data: Path, id: str = "c1") -> None:
        """Have the application end."""
        (data / "stop").touch()
        assert wait_for(lambda: self.status(id) in ("stopped", "gone"), 20, lambda: self.status(id)) == []
        self.call("delete", "--force", id)

    def refused(self, image: Path, id: str = "refused", **case: Any) -> str:
        """The start has to fail: standard error."""
        done = self.run(self.case(image, id, **case), id)
        assert done.returncode == 1, done.stdout + done.stderr
        assert self.settled() == []
        return done.stderr

    def last(self, event: str) -> dict[str, Any]:
        """The newest event of a name in the runelets' log."""
        return [entry for entry in self.events() if entry["event"] == event][-1]

    def leftovers(self) -> list[str]:
        """verdictd stays."""
        return [line for line in super().leftovers() if "verdictd serve" not in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    missing = [name for name in ("crun", "runc", "gocryptfs", "busybox") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing)}")
    base = tmp_path_factory.mktemp("world")
    made = World(base, launcher.write(base / "rune"))
    made.open()
    yield made
    made.close()


@pytest.fixture(scope="module")
def built(world: World) -> tuple[Path, dict[str, Any]]:
    image = world.build(manifest=world.manifest(), script=SCRIPT)
    return image, world.identity


@pytest.fixture
def image(world: World, built: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The application's image, accepted, its secrets in the store; whatever a test leaves running fails it."""
    made, world.identity = built
    world.secrets()
    world.accept()
    yield made
    for path in world.root.glob("*"):
        world.call("delete", "--force", path.name)
    assert world.settled() == []


def md5(value: bytes) -> str:
    return hashlib.md5(value).hexdigest()


# --- the flow


def test_secrets_are_there_before_the_application_starts(world: World, image: Path) -> None:
    output, data = world.begin(image)
    said = output.read_text
    assert wait_for((data / "now").exists, 10, said) == []
    assert md5(SECRET) in said()
    assert "400 0:0" in said() and f"word={WORD}" in said() and "read-only" in said()
    assert world.last("secret.refused")["uri"] == "kbs:///default/key/absent"
    allowed = [entry.action for entry in world.store.audit.entries("default") if entry.decision == "allowed"]
    assert {"kbs.attest", "kbs.release"} <= set(allowed)
    for place in (world.log_dir, world.run_dir, world.state_dir, world.base / "vault-cipher"):
        for path in place.rglob("*"):
            assert not path.is_file() or SECRET not in path.read_bytes()
    assert "kept" not in said()
    world.end(data)
    # Another container of the image has another enclave, and the volume's key from verdictd opens what the first wrote.
    output, data = world.begin(image)
    assert wait_for((data / "now").exists, 10, said) == []
    assert "kept" in said()
    world.end(data)


def test_rotation_updates_the_file_in_place(world: World, image: Path) -> None:
    output, data = world.begin(image)
    now = data / "now"
    assert wait_for(lambda: now.exists() and md5(SECRET) in now.read_text(), 10, output.read_text) == []
    world.store.secrets.put("default", "default/key/app", b"a new one")
    assert wait_for(lambda: md5(b"a new one") in now.read_text(), 15, now.read_text) == []
    assert world.last("secret.renewed")["uri"] == "kbs:///default/key/app"
    # Denied afterwards, the application keeps what it has; the log says why there is nothing newer.
    world.accept(mrenclave=json.dumps(["00" * 32]))

    def denied() -> bool:
        return any(e["event"] == "secret.refused" and e["reason"] == "kbs.attest.denied" for e in world.events())

    assert wait_for(denied, 15, world.events) == []
    assert md5(b"a new one") in now.read_text()
    world.end(data)


def test_confidential_containers_interface(world: World, image: Path) -> None:
    _, data = world.begin(image)

    def ask(path: str, *, host: str = "127.0.0.1:8006") -> str:
        line = f"busybox wget -qO- --header 'Host: {host}' 'http://127.0.0.1:8006{path}' 2>&1"
        return world.call("exec", "c1", "/bin/sh", "-c", line).stdout

    assert wait_for(lambda: "sgx-sim" in ask("/info"), 10, lambda: ask("/info")) == []
    assert ask("/cdh/resource/default/key/app").encode() == SECRET
    evidence = json.loads(ask("/aa/evidence?runtime_data=hello"))
    assert b"hello".ljust(64, b"\0") in base64.b64decode(evidence["quote"])
    assert b"hello".ljust(64, b"\0") in base64.b64decode(
        json.loads(ask("/aa/evidence?runtime_data=aGVsbG8&encoding=base64"))["quote"]
    )
    assert "400" in ask("/aa/evidence?runtime_data=" + 65 * "x")
    assert "403" in ask("/cdh/resource/default/key/absent")
    assert "404" in ask("/cdh/resource/default") and "404" in ask("/nothing")
    assert "403" in ask("/info", host="attacker.example")
    token = json.loads(ask("/aa/token?token_type=kbs"))
    # What the application got is a session of its own: token and key open a resource by the bearer.
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = Key()
    key.private = load_pem_private_key(token["tee_keypair"].encode(), None)
    client = Client(f"https://127.0.0.1:{world.port}", str(world.verdict.certificate), lambda _: None, key=key)
    reply = client.resource("default/key/app", bearer=token["token"])
    assert reply.status == 200 and key.open(reply.json) == SECRET
    # A process that shares the network, but not the container: a pod's neighbour.
    for path in ("/cdh/resource/default/key/app", "/info"):
        foreign = subprocess.run(
            ["nsenter", "-t", str(world.pid()), "-n", "curl", "-s", f"http://127.0.0.1:8006{path}"],
            capture_output=True, timeout=30,
        )  # fmt: skip
        assert foreign.stdout.startswith(b"refused"), foreign
    assert world.last("guest_api.refused")["found"] == "a process of another container"
    extended = world.call(
        "exec", "c1", "/bin/sh", "-c", "busybox wget -qO- --post-data '{}' http://127.0.0.1:8006/aa/aael 2>&1"
    )
    assert "501" in extended.stdout
    world.end(data)


def test_the_host_network_is_not_used(world: World, image: Path) -> None:
    bundle = world.case(image, "shared", mounts={"/data": world.base / "data", "/vault": world.base / "vault-cipher"})
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    # sysfs of a network namespace that is not the container's own cannot be mounted
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/sys"]
    (bundle / "config.json").write_text(json.dumps(config))
    (world.base / "data" / "stop").touch()
    done = world.run(bundle, "shared")
    assert done.returncode == 0, done.stderr
    assert "host's network" in world.last("guest_api.off")["reason"]


def test_a_container_without_secrets_does_not_pay(world: World, image: Path) -> None:
    """Its runelet has neither TLS nor HTTP in its memory; with secrets it has."""

    def has_tls() -> bool:
        runelet = next((world.run_dir / "epc").glob("[0-9]*")).name.partition("-")[0]
        return "/_ssl." in Path(f"/proc/{runelet}/maps").read_text()

    world.create(world.bundle("/bin/sleep", "30", name="plain"), "plain")
    assert not has_tls()
    world.call("delete", "--force", "plain")
    assert world.settled() == []
    _, data = world.begin(image)
    assert has_tls()
    world.end(data)


# --- each link broken


def test_another_image(world: World, image: Path) -> None:
    other = world.build("other", manifest=world.manifest(), script=SCRIPT + " ")
    error = world.refused(other)
    assert "kbs.attest.denied" in error and "kbs:///default/key/vault" not in error
    assert "the secret kbs:///default/key/app is required before the start" in error
    assert world.identity["mrenclave"] in error  # what was found
    assert world.last("secret.refused")["reason"] == "kbs.attest.denied"
    assert world.identity["mrenclave"] in world.last("secret.refused")["found"]


def test_other_arguments(world: World, image: Path) -> None:
    assert "admission.args.refused" in world.refused(image, args=["/bin/cat", "/run/keys/app"])
    # Measured at first use they are part of the measurement.
    template = world.base / "template.toml"
    template.write_text(world.manifest())
    world.configure(f'[signing]\ndefault_manifest = "{template}"\n')
    try:
        bundle = world.bundle("/bin/cat", "/run/keys/app", name="first-use", tee="sgx-sim")
        done = world.run(bundle, "first-use")
    finally:
        world.configure("")
    assert done.returncode == 1 and "kbs.attest.denied" in done.stderr


def test_a_debug_enclave(world: World, image: Path) -> None:
    debug = world.build("debug", manifest=world.manifest() + "\n[enclave]\ndebug = true\n", script=SCRIPT)
    world.accept()
    error = world.refused(debug)
    assert "kbs.attest.denied" in error and "debug" in error


def test_a_revoked_reference_value(world: World, image: Path) -> None:
    bundle, source = world.base / "bundle.json", world.base / "image-source/rootfs"
    toml = world.base / "image.toml"
    done = world.inclavare(
        "build", source, world.base / "again", "-m", toml, "--tee", "sgx-sim", "--force",
        "--reference-bundle", bundle, "--reference-name", "registry/app", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    public = next((world.base / "owner").rglob("reference-key.pub.pem")).read_text()
    world.store.references.trust("default", "builder", public)
    registered = world.store.references.register("default", bundle.read_bytes()).digest
    world.accept(mrenclave="", image='"registry/app"')
    output, data = world.begin(world.base / "again")
    assert wait_for(lambda: md5(SECRET) in output.read_text(), 10, output.read_text) == []
    world.end(data)
    world.store.references.revoke("default", registered, "the base image has a hole")
    time.sleep(FRESH)
    error = world.refused(world.base / "again")
    assert "kbs.attest.denied" in error and "the base image has a hole" in error


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--status", "OutOfDate"], "OutOfDate"),
        (["--collateral-expired"], "expired"),
        (["--pck-revoked"], "revoked"),
    ],
)
def test_the_platform(world: World, image: Path, words: list[str], reason: str) -> None:
    try:
        assert world.inclavare("sgx", "platform", "set-tcb", *words).returncode == 0
        error = world.refused(image)
    finally:
        world.inclavare("sgx", "platform", "set-tcb", "--status", "UpToDate", "--collateral-fresh", "--pck-valid")
    assert "kbs.attest.denied" in error and reason.lower() in error.lower()


def test_a_foreign_root(world: World, image: Path) -> None:
    (world.base / "stranger").mkdir()
    stranger = Node(world.base / "stranger", world.rune)
    foreign = stranger.inclavare("sgx", "platform", "show", "--root-ca").stdout
    world.accept(trust_anchor=f"'''{foreign}'''")
    error = world.refused(image)
    assert "kbs.attest.denied" in error and "root" in error


def test_a_policy_that_was_not_asked(world: World, image: Path) -> None:
    strict = world.build("strict", manifest=world.manifest(policy="stricter"), script=SCRIPT)
    world.accept()
    error = world.refused(strict)
    assert "kbs.policy.other" in error and "prod@" in error and "stricter" in error


def test_a_secret_with_a_policy_of_its_own(world: World, image: Path) -> None:
    world.store.policies.put("default", "nobody", "toml", f'mrenclave = ["{"00" * 32}"]\n')
    world.store.secrets.put("default", "default/key/app", SECRET, policy="nobody")
    error = world.refused(image)
    assert "kbs.resource.denied" in error and "default/key/app" in error


def attester(world: World) -> Any:
    """Evidence of the running container's enclave, made by a process in it."""

    def attest(report_data: bytes) -> dict[str, Any]:
        octets = "".join(f"\\{byte:03o}" for byte in report_data)
        line = f"printf '{octets}' > /dev/attestation/user_report_data; busybox base64 -w0 /dev/attestation/quote"
        done = world.call("exec", "c1", "/bin/sh", "-c", line)
        collateral = world.inclavare("sgx", "platform", "show", "--collateral").stdout
        return {"quote": done.stdout.strip(), "collateral": json.loads(collateral)}

    return attest


def test_replays_and_stolen_tokens(world: World, image: Path) -> None:
    _, data = world.begin(image)
    honest = Client(f"https://127.0.0.1:{world.port}", str(world.verdict.certificate), attester(world))
    assert honest.auth().status == 200
    sent = honest.attestation()
    assert honest.attest(sent).status == 200
    assert honest.key.open(honest.resource("default/key/app", bearer=honest.token).json) == SECRET
    # The same evidence again, in its session and in another one.
    again = honest.attest(sent)
    assert again.status == 401 and "session" in again.detail
    thief = Client(honest.url, honest.ca, honest.attester)
    assert thief.auth().status == 200
    replayed = thief.attest(sent)
    assert replayed.status == 401 and "nonce" in replayed.detail
    # Evidence for the enclave's key, presented with the thief's.
    assert thief.auth().status == 200
    forged = honest.attestation(nonce=thief.nonce)
    forged["runtime-data"] = {"nonce": thief.nonce, "tee-pubkey": thief.key.jwk}
    bound = thief.attest(forged)
    assert bound.status == 401 and "report_data" in bound.detail
    # A stolen token is of no use without the key.
    stolen = thief.resource("default/key/app", bearer=honest.token)
    assert stolen.status == 200
    with pytest.raises(InvalidUnwrap):
        thief.key.open(stolen.json)
    assert honest.key.open(stolen.json) == SECRET
    world.end(data)


def test_somebody_else_in_verdictds_place(world: World, image: Path) -> None:
    """Another certificate at the same address: the host's own service, say."""
    world.halt()
    kept = {path: path.read_bytes() for path in (world.verdict.certificate, world.verdict.certificate_key)}
    for path in kept:
        path.unlink()
    try:
        assert world.inclavare("verdictd", "init", "-c", world.file).returncode == 0
        world.serve()
        error = world.refused(image)
        world.halt()
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
        world.serve()
    assert "kbs.tls.certificate" in error
    assert world.fingerprint.replace(":", "").lower() in error


def test_verdictd_out_of_reach(world: World, image: Path) -> None:
    world.halt()
    try:
        began = time.monotonic()
        error = world.refused(image)
        assert time.monotonic() - began > 10  # it was tried again
    finally:
        world.serve()
    assert "kbs.unreachable" in error and "refused" in error.lower()


def test_an_authority_as_trust_anchor(world: World, image: Path) -> None:
    """A PEM certificate instead of a fingerprint; then an authority that did not issue verdictd's certificate."""
    pem = world.build("pem", manifest=world.manifest(anchor=world.verdict.certificate.read_text()), script=SCRIPT)
    world.accept()
    output, data = world.begin(pem)
    assert wait_for(lambda: md5(SECRET) in output.read_text(), 10, output.read_text) == []
    world.end(data)
    other = world.inclavare("sgx", "platform", "show", "--root-ca").stdout
    foreign = world.build("foreign", manifest=world.manifest(anchor=other), script=SCRIPT)
    assert "kbs.tls.certificate" in world.refused(foreign)


def test_the_host_cannot_take_a_secrets_place(world: World, image: Path) -> None:
    for destination in ("/run/keys/app", "/run/keys", "/run"):
        error = world.refused(image, mounts={destination: world.base / "hosts"})
        assert "admission.mount" in error, (destination, error)

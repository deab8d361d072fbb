"""The main job through the user's commands, each link then broken in turn."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
from runebox import RuneBox, wait_for

from inclavare.cli import run as run_command
from inclavare.rune import launcher

pytestmark = pytest.mark.crun

APPLICATION = """while ! test -e /dev/attestation/secrets/key; do sleep 0.05; done
echo "the key has $(wc -c < /dev/attestation/secrets/key) bytes"; md5sum < /dev/attestation/secrets/key"""
SECRET = b"correct horse battery staple"


BROKER = '[attestation]\nverdictd = "https://verdictd"\ntrust_anchor = "system"\n'


class Node(RuneBox):
    """A node and a relying party."""

    def inclavare(self, *words: str | Path, input: bytes = b"") -> subprocess.CompletedProcess[str]:
        """``inclavare WORDS``; output as text."""
        done = subprocess.run(
            [sys.executable, "-c", "from inclavare.cli import main; main()", *map(str, words)],
            env={**self.env, "XDG_CONFIG_HOME": str(self.base / "owner"), "XDG_DATA_HOME": str(self.base / "owner")},
            input=input,
            capture_output=True,
            timeout=120,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def build(self, name: str = "image", *, script: str = APPLICATION, manifest: str = "") -> Path:
        """An enclave image as a root file system directory; its manifest is ``manifest`` and the command."""
        source = self.bundle(name=f"{name}-source") / "rootfs"
        toml = self.base / f"{name}.toml"
        toml.write_text(
            manifest + f'\n[process]\nargs = ["/bin/sh", "-c", {json.dumps(script)}]\nenv = {{PATH = "/bin"}}\n'
        )
        done = self.inclavare("build", source, self.base / name, "-m", toml, "--tee", "sgx-sim", "--json")
        assert done.returncode == 0, done.stderr
        self.identity = json.loads(done.stdout)
        return self.base / name

    def policy(self, **changes: str) -> Path:
        """A policy that accepts the last image that was built; each change is a TOML value or empty to leave it out."""
        root = self.base / "root.pem"
        root.write_text(self.inclavare("sgx", "platform", "show", "--root-ca").stdout)
        values = {
            "mrenclave": f'["{self.identity["mrenclave"]}"]',
            "simulated": '"allow"',
            "trust_anchor": '"root.pem"',
            **changes,
        }
        path = self.base / "policy.toml"
        path.write_text("".join(f"{key} = {value}\n" for key, value in values.items() if value))
        return path

    def start(self, image: Path, id: str = "c1", *, env: tuple[str, ...] = ()) -> Path:
        """Run an enclave image in the background; returns the file that its output goes to."""
        manifest = json.loads((image / ".inclavare/manifest.json").read_text())["process"]

        def change(config: dict[str, object]) -> None:
            process = config["process"]
            assert isinstance(process, dict)
            process["args"], process["env"] = manifest["args"], ["PATH=/bin", *env]

        bundle = self.bundle(name=f"{id}-bundle", tee=None, change=change, rootfs=image)
        output = self.base / f"{id}.out"
        with output.open("wb") as handle:
            done = subprocess.run(
                [self.rune, "--root", self.root, "run", "--detach", "--bundle", bundle, id],
                env=self.env, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, timeout=60,
            )  # fmt: skip
        assert done.returncode == 0, output.read_text()
        return output


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    missing = [name for name in ("crun", "runc", "gocryptfs", "busybox") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing)}")
    made = Node(tmp_path, launcher.write(tmp_path / "rune"))
    yield made
    for path in made.root.glob("*"):
        made.call("delete", "--force", path.name)
    assert made.settled() == []


def test_built_run_attested_and_given_a_secret(node: Node) -> None:
    image = node.build()
    output = node.start(image)
    policy = node.policy()
    assert node.inclavare("secret", "put", "key", "--policy", policy, input=SECRET).returncode == 0
    attested = node.inclavare("attest", "c1", "--policy", policy, "--json")
    assert attested.returncode == 0, attested.stderr
    claims = json.loads(attested.stdout)["claims"]
    assert claims["mrenclave"] == node.identity["mrenclave"] == node.meta()["mrenclave"]
    assert (claims["simulated"], claims["tcb_status"], claims["debug"]) == (True, "UpToDate", False)
    assert "the key" not in output.read_text()
    released = node.inclavare("secret", "get", "key", "--container", "c1")
    assert released.returncode == 0, released.stderr
    assert wait_for(lambda: hashlib.md5(SECRET).hexdigest() in output.read_text(), 10, output.read_text) == []
    listed = json.loads(node.inclavare("list", "--json").stdout)
    assert [row["id"] for row in listed] == ["c1"]
    for place in (node.log_dir, node.run_dir, node.state_dir):
        for path in place.rglob("*"):
            assert not path.is_file() or SECRET not in path.read_bytes()


def test_evidence_is_verified_later_and_elsewhere(node: Node) -> None:
    node.start(node.build())
    policy, evidence = node.policy(), node.base / "evidence.json"
    nonce = "ab" * 32
    assert node.inclavare("attest", "c1", "--nonce", nonce, "-o", evidence).returncode == 0
    assert node.inclavare("verify", evidence, "--policy", policy, "--nonce", nonce).returncode == 0
    stale = node.inclavare("verify", evidence, "--policy", policy, "--nonce", "cd" * 32, "--json")
    assert stale.returncode == 3
    assert [failure["id"] for failure in json.loads(stale.stdout)["failures"]] == ["freshness.nonce"]
    late = node.inclavare("verify", evidence, "--policy", policy, "--at", str(int(time.time()) + 400 * 86400), "--json")
    assert late.returncode == 4
    assert json.loads(late.stdout)["error"]["id"].endswith("expired")
    piped = node.inclavare("verify", "-", "--policy", policy, input=evidence.read_bytes())
    assert piped.returncode == 0


@pytest.mark.parametrize(
    ("changes", "code", "id"),
    [
        ({"mrenclave": f'["{"00" * 32}"]'}, 3, "policy.mrenclave"),
        ({"mrsigner": f'["{"00" * 32}"]'}, 3, "policy.mrsigner"),
        ({"min_isv_svn": "2"}, 3, "policy.min_isv_svn"),
        ({"isv_prod_id": "9"}, 3, "policy.isv_prod_id"),
        ({"simulated": ""}, 3, "policy.simulated"),
        ({"trust_anchor": ""}, 4, "evidence.root.untrusted"),
    ],
)
def test_a_policy_that_does_not_accept(node: Node, changes: dict[str, str], code: int, id: str) -> None:
    output = node.start(node.build())
    policy = node.policy(**changes)
    assert node.inclavare("secret", "put", "key", "--policy", policy, input=SECRET).returncode == 0
    refused = node.inclavare("secret", "get", "key", "--container", "c1", "--json")
    assert refused.returncode == code
    error = json.loads(refused.stdout)["error"]
    assert error["id"] == id and error["found"] and error["expected"] and error["remedy"]
    assert "the key" not in output.read_text()
    assert not (Path(f"/proc/{node.pid()}/root/dev/attestation/secrets/key")).exists()


def test_a_debug_enclave_gets_nothing(node: Node) -> None:
    node.start(node.build(manifest="[enclave]\ndebug = true\n"))
    policy = node.policy()
    refused = node.inclavare("attest", "c1", "--policy", policy, "--json")
    assert refused.returncode == 3
    assert [failure["id"] for failure in json.loads(refused.stdout)["failures"]] == ["policy.debug"]


def test_a_foreign_platform_is_not_trusted(node: Node, tmp_path: Path) -> None:
    node.start(node.build())
    policy = node.policy()
    (tmp_path / "elsewhere").mkdir()
    other = Node(tmp_path / "elsewhere", node.rune)
    (node.base / "root.pem").write_text(other.inclavare("sgx", "platform", "show", "--root-ca").stdout)
    refused = node.inclavare("attest", "c1", "--policy", policy, "--json")
    assert refused.returncode == 4
    assert json.loads(refused.stdout)["error"]["id"] == "evidence.root.untrusted"


def test_a_sigstruct_over_another_enclave_does_not_start(node: Node) -> None:
    image, other = node.build(), node.build("other", script="echo other")
    shutil.copy(other / ".inclavare/sigstruct", image / ".inclavare/sigstruct")
    done = node.run(node.bundle(name="mixed", tee="sgx-sim", rootfs=image))
    assert done.returncode == 1
    assert node.settled() == []


def test_what_the_host_adds_is_refused(node: Node) -> None:
    image = node.build()
    manifest = json.loads((image / ".inclavare/manifest.json").read_text())["process"]

    def with_args(*args: str, env: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return node.run(node.bundle(*(args or manifest["args"]), tee="sgx-sim", env=env, rootfs=image))

    for done, id in (
        (with_args("/bin/cat", "/etc/passwd"), "admission.args.refused"),
        (with_args(env=("LD_PRELOAD=/evil.so",)), "admission.env.refused"),
        (with_args(env=("ENCLAVE_DEBUG=1",)), "admission.debug.refused"),
    ):
        assert done.returncode == 1
        assert id in done.stderr, done.stderr


def test_an_image_that_names_several_platforms_asks_which(node: Node) -> None:
    source = node.bundle(name="several-source") / "rootfs"
    toml = node.base / "several.toml"
    toml.write_text('[enclave]\ntee = ["sgx", "sgx-sim"]\n[process]\nargs = ["/bin/true"]\nenv = {PATH = "/bin"}\n')
    assert node.inclavare("build", source, node.base / "several", "-m", toml).returncode == 0
    done = node.run(node.bundle(tee=None, rootfs=node.base / "several"))
    assert "tee.type.ambiguous" in done.stderr
    assert node.run(node.bundle(tee="sgx-sim", rootfs=node.base / "several")).returncode == 0


def test_inclavare_run(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.base / "bin").mkdir()
    (node.base / "bin/rune").symlink_to(node.rune)
    wrapper = f"import sys; sys.prefix = {str(node.base)!r}; from inclavare.cli import main; main()"

    def run(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", wrapper, "run", *map(str, words)]
        return subprocess.run(command, env=node.env, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)

    image = node.build(script="echo hello; exit 5")
    done = run(image)
    assert (done.returncode, done.stdout) == (5, b"hello\n"), done.stderr
    plain = node.bundle(name="plain") / "rootfs"
    assert b"cli.run.tee" in run(plain, "/bin/echo", "x").stderr
    done = run("--tee", "sgx-sim", plain, "/bin/sh", "-c", "cat /dev/attestation/attestation_type; id -u")
    assert done.stdout == b"dcap0\n", done.stderr
    volume = node.base / "volume"
    volume.mkdir()
    (volume / "file").write_text("in\n")
    done = run("--tee", "sgx-sim", "-e", "A=1", "-v", f"{volume}:/data:ro", "--network", "none", plain,
               "/bin/sh", "-c", "cat /data/file; echo $A; touch /data/x || echo ro")  # fmt: skip
    assert done.stdout == b"in\n1\nro\n", done.stderr
    assert b"cli.run.volume" in run("--tee", "sgx-sim", "-v", "/nowhere:/x", plain, "/bin/true").stderr
    refused = run(image, "/bin/cat", "/etc/shadow")
    assert refused.returncode == 8 and b"admission.args.refused" in refused.stderr
    assert run("--name", "a/b", image).returncode == 2
    assert b"cli.run.env" in run("--tee", "sgx-sim", "-e", "A", plain, "/bin/true").stderr
    greeting = image / "etc/greeting"
    greeting.write_text(greeting.read_text().replace("m", "M"))
    image2 = node.build("reader", script="cat /etc/greeting || true")
    (image2 / "etc/greeting").write_text("Measured\n")
    done = run(image2)
    assert done.returncode == 7
    assert b"/etc/greeting was refused" in done.stderr and b"easured" not in done.stdout
    assert run_command.rune_program()


def test_secret_vault(node: Node) -> None:
    node.build()
    policy = node.policy()
    vault = node.base / "vault"
    assert node.inclavare("secret", "put", "key", "-p", policy, "--vault", vault, input=SECRET).returncode == 0
    assert (vault.stat().st_mode & 0o777, (vault / "key.json").stat().st_mode & 0o777) == (0o700, 0o600)
    listed = node.inclavare("secret", "list", "--vault", vault, "--json")
    assert json.loads(listed.stdout)[0]["bytes"] == len(SECRET)
    assert SECRET.decode() not in listed.stdout
    for name in ("../x", "a/b", "..", ""):
        assert node.inclavare("secret", "put", name, "-p", policy, "--vault", vault, input=b"x").returncode == 2
    open_policy = node.base / "open.toml"
    for text in ('any_enclave = "allow"\n', 'simulated = "allow"\n'):
        open_policy.write_text(text)
        refused = node.inclavare("secret", "put", "x", "-p", open_policy, "--vault", vault, input=b"x")
        assert refused.returncode == 2 and "secret.policy.open" in refused.stderr
    assert node.inclavare("secret", "put", "empty", "-p", policy, "--vault", vault, input=b"").returncode == 2
    assert node.inclavare("secret", "get", "none", "--container", "c1", "--vault", vault).returncode == 2
    assert node.inclavare("secret", "get", "key", "--container", "nowhere", "--vault", vault).returncode == 2
    (vault / "key.json").write_text("{}")
    damaged = node.inclavare("secret", "get", "key", "--container", "c1", "--vault", vault)
    assert damaged.returncode == 2 and "damaged" in damaged.stderr
    assert node.inclavare("secret", "delete", "key", "--vault", vault).returncode == 0
    assert node.inclavare("secret", "delete", "key", "--vault", vault).returncode == 2


@pytest.mark.parametrize(
    ("manifest", "id"),
    [
        ('[[secrets]]\nuri = "kbs:///default/key/app"\npath = "/run/key"\n', "runelet.secret.unavailable"),
        ('[attestation]\nverdictd = "http://verdictd"\ntrust_anchor = "system"\n', "kbs.url"),
        ('[attestation]\nverdictd = "https://verdictd"\n', "kbs.trust_anchor"),
        ('[attestation]\nverdictd = "https://verdictd"\ntrust_anchor = "verdictd.pem"\n', "kbs.trust_anchor"),
        ('[[files.encrypted]]\npath = "/data"\nkey = "kbs:///a/b/c"\n', "runelet.secret.unavailable"),
        (f'{BROKER}policy = "an app"\n', "kbs.policy.name"),
        *(
            (
                BROKER + "".join(f'[[secrets]]\nuri = "kbs:///a/b/c"\n{place}\n' for place in places),
                "runelet.secret.place",
            )
            for places in (
                ('path = "/run/k"', 'path = "/run/k"'),
                ('env = "K"', 'env = "K"'),
                ('path = "/run/k"', 'path = "/run/k/x"'),
                ('path = "/run/k/x"', 'path = "/run/k"'),
                ('path = "/dev/attestation/quote"',),
                ('path = "/bin/true"',),
                ('path = "/bin"',),
            )
        ),
    ],
)
def test_images_that_could_never_start_are_not_built(node: Node, manifest: str, id: str) -> None:
    source, toml = node.bundle() / "rootfs", node.base / "enclave.toml"
    toml.write_text(manifest + '\n[process]\nargs = ["/bin/true"]\n')
    done = node.inclavare("build", source, node.base / "image", "-m", toml, "--tee", "sgx-sim", "--json")
    assert done.returncode != 0
    refusal = json.loads(done.stdout)["error"]
    assert (refusal["id"], bool(refusal["remedy"])) == (id, True)
    assert not (node.base / "image").exists()


def test_a_link_of_the_image_does_not_lead_to_the_hosts_directories(node: Node) -> None:
    source = node.bundle() / "rootfs"
    (source / "etc2").symlink_to("/etc")
    (source / "real").mkdir()
    (source / "linked").symlink_to("/real")
    for path, code in (("/etc2/ssl", 0), ("/linked", 2)):
        toml = node.base / "enclave.toml"
        # Any policy id that verdictd's store takes will do, an @ of its own included.
        secret = f'policy = "_team@app+1@3"\n[[secrets]]\nuri = "kbs:///a/b/c"\npath = "{path}"\n'
        toml.write_text(f'{BROKER}{secret}[process]\nargs = ["/bin/true"]\n')
        done = node.inclavare("build", source, node.base / f"image{code}", "-m", toml, "--tee", "sgx-sim", "--json")
        assert done.returncode == code, done.stdout


def test_required_secret_without_a_broker_stops_the_start(node: Node) -> None:
    """An image may be older than the build's own check."""
    template = node.base / "default.toml"
    template.write_text('[[secrets]]\nuri = "kbs:///default/key/app"\npath = "/run/key"\n')
    node.configure(f'[signing]\ndefault_manifest = "{template}"')
    done = node.run(node.bundle("/bin/true", tee="sgx-sim"))
    assert done.returncode == 1
    assert "runelet.secret.unavailable" in done.stderr


def test_who_may_not_look_is_told_so(node: Node) -> None:
    node.start(node.build())
    # The configuration has to be within reach; the temporary directories above it are private until then.
    closed = {path: path.stat().st_mode for path in (node.base, *node.base.parents) if not path.stat().st_mode & 0o001}
    for path, mode in closed.items():
        path.chmod(mode | 0o011)
    program = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534); from inclavare.cli import main; main()"
    for words in (["list"], ["attest", "c1"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], env=node.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 5, done.stdout + done.stderr
        assert "run as root" in done.stderr
    for path, mode in closed.items():
        path.chmod(mode)


def test_ordinary_mistakes_are_not_called_defects(node: Node) -> None:
    node.start(node.build())
    done = node.inclavare("attest", "c1", "-o", "/nowhere/evidence.json")
    assert done.returncode == 2 and "/nowhere/evidence.json" in done.stderr
    assert "defect" not in done.stderr

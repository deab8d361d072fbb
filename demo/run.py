"""The main job, end to end: an ordinary image becomes an enclave container, is attested and gets a secret.

Everything below the work directory is the demonstration's own: image, keys, platform, containers. It leaves nothing
running. ``--keep`` keeps the work directory, ``--rebuild`` makes the base image anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sys.prefix) / "bin"
PACKAGES = "python3-minimal,openssl"


class Demo:
    """One run; every step prints what it does, in plain words, and the command that did it."""

    def __init__(self, cache: Path, work: Path) -> None:
        self.cache, self.work = cache, work
        self.started = time.monotonic()
        self.step_number = 0
        self.started_containers: list[subprocess.Popen[bytes]] = []
        self.verdictd: subprocess.Popen[bytes] | None = None
        config = work / "config.toml"
        config.write_text("".join(f'{name}_dir = "{work / name}"\n' for name in ("state", "run", "log")))
        self.env = {**os.environ, "INCLAVARE_CONFIG": str(config), "XDG_CONFIG_HOME": str(work / "owner")}

    def step(self, text: str) -> None:
        """Say what comes now."""
        self.step_number += 1
        print(f"\n[{self.step_number}] {text}  ({time.monotonic() - self.started:.1f} s)", flush=True)

    def inclavare(self, *words: str | Path, quiet: bool = False, fails: bool = False, data: bytes = b"") -> str:
        """Run the inclavare command; its standard output."""
        print("    $ inclavare " + " ".join(str(word) for word in words), flush=True)
        done = subprocess.run([BIN / "inclavare", *words], env=self.env, input=data, capture_output=True)
        if (done.returncode != 0) != fails:
            sys.stdout.write(done.stdout.decode() + done.stderr.decode())
            sys.exit(f"demo: that should have {'been refused' if fails else 'succeeded'} (exit code {done.returncode})")
        if not quiet:
            for line in (done.stdout + (done.stderr if fails else b"")).decode().splitlines():
                print(f"      {line}")
        if fails:
            print(f"      exit code {done.returncode}")
        return done.stdout.decode()

    def build(self, *words: str | Path) -> dict[str, str]:
        """``inclavare build`` for sgx-sim; the enclave's identity."""
        made: dict[str, str] = json.loads(self.inclavare("build", *words, "--tee", "sgx-sim", "--json", quiet=True))
        return made

    # --- the image

    def base_image(self, rebuild: bool) -> Path:
        """A Debian image with Python, as an OCI layout; kept for the next run."""
        layout = self.cache / "base"
        if layout.exists() and not rebuild:
            print(f"    there from an earlier run: {layout}")
            return layout
        shutil.rmtree(layout, ignore_errors=True)
        making = self.cache / "making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        log = self.cache / "debootstrap.log"
        print(f"    debootstrap: Debian with {PACKAGES.replace(',', ', ')} (downloads about 50 MB; log in {log})")
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", *_suite_and(making / "rootfs")]
        with log.open("wb") as handle:
            process = subprocess.Popen(
                command, stdout=handle, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}
            )
            while process.poll() is None:
                time.sleep(1)
                _progress(log)
        print()
        if process.returncode != 0:
            sys.exit(f"demo: debootstrap failed, see {log}")
        for junk in (
            "var/cache/apt/archives",
            "var/lib/apt/lists",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
        ):
            shutil.rmtree(making / "rootfs" / junk, ignore_errors=True)
        _pack(making / "rootfs", making / "layout", ["/usr/bin/python3"])
        (making / "layout").rename(layout)
        shutil.rmtree(making)
        return layout

    def application_image(self, base: Path, key: Path) -> Path:
        """The application and its encrypted data on top of the base image, as any image build would put them."""
        layout, bundle = self.work / "image", self.work / "unpacked"
        shutil.copytree(base, layout)
        umoci("unpack", "--image", f"{layout}:latest", bundle)
        app = bundle / "rootfs/app"
        app.mkdir()
        shutil.copy(HERE / "app.py", app / "app.py")
        plain = "name,diagnosis\n" + "".join(f"patient {n},{secrets.token_hex(4)}\n" for n in range(1000))
        self.expected = hashlib.sha256(plain.encode()).hexdigest()
        subprocess.run(
            ["openssl", "enc", "-aes-256-cbc", "-pbkdf2", "-out", app / "patients.csv.enc", "-pass", f"file:{key}"],
            input=plain.encode(),
            check=True,
        )
        umoci("repack", "--image", f"{layout}:latest", bundle)
        command = [word for part in ("/usr/bin/python3", "-u", "/app/app.py") for word in ("--config.cmd", part)]
        umoci("config", "--image", f"{layout}:latest", *command, "--config.env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
        shutil.rmtree(bundle)
        return layout

    # --- the container

    def start(self, name: str, image: str) -> subprocess.Popen[bytes]:
        """``inclavare run`` in the background."""
        print(f"    $ inclavare run --name {name} {image} &", flush=True)
        process = subprocess.Popen(
            [BIN / "inclavare", "run", "--name", name, image],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started_containers.append(process)
        return process

    # --- the relying party's service

    def serve(self) -> tuple[str, str]:
        """verdictd on a free port, and its owner logged in; its address and its certificate's fingerprint."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        file, token = self.work / "verdictd.toml", self.work / "token"
        state = self.work / "verdictd"
        made = self.inclavare(
            "verdictd", "init", "-c", file, "--state-dir", state, "--listen", address, "--json", quiet=True
        )
        print(f"    $ inclavare verdictd serve -c {file} &", flush=True)
        self.verdictd = subprocess.Popen(
            [BIN / "inclavare", "verdictd", "serve", "-c", file],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.work / "verdictd.log").open("wb"),
        )
        assert self.verdictd.stdout is not None
        if b"listening" not in self.verdictd.stdout.readline():
            sys.exit(f"demo: verdictd did not start, see {self.work / 'verdictd.log'}")
        fingerprint = str(json.loads(made)["fingerprint"])
        self.inclavare("verdictd", "token", "create", "owner", "-c", file, "-o", token, quiet=True)
        self.inclavare(
            "verdict", "login", f"https://{address}", "--fingerprint", fingerprint, "--token-file", token, quiet=True
        )
        return address, fingerprint

    def stop(self) -> None:
        """Stop verdictd."""
        if self.verdictd is not None:
            self.verdictd.terminate()
            self.verdictd.wait(20)


def umoci(*words: str | Path) -> None:
    """Run umoci quietly."""
    done = subprocess.run(["umoci", *words], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"demo: umoci {words[0]} failed: {done.stderr}")


def _suite_and(target: Path) -> list[str | Path]:
    """Suite, target and mirror: what this machine's own apt uses, else Debian's."""
    listed = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(SUITE) $(CODENAME) $(COMPONENT)",
            "Created-By: Packages",
        ],
        capture_output=True,
        text=True,
    ).stdout
    for line in listed.splitlines():
        uri, _, codename, component = [*line.split(), "", "", "", ""][:4]
        if codename == "bookworm" and component == "main":
            return ["bookworm", target, uri]
    return ["bookworm", target, "http://deb.debian.org/debian"]


def _progress(log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()
    if lines and sys.stdout.isatty():
        print(f"\r\033[K      {lines[-1][:100]}", end="", flush=True)


def _pack(rootfs: Path, layout: Path, command: list[str]) -> None:
    bundle = layout.with_name("bundle")
    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:latest")
    umoci("unpack", "--image", f"{layout}:latest", bundle)
    shutil.rmtree(bundle / "rootfs")
    rootfs.rename(bundle / "rootfs")
    umoci("repack", "--image", f"{layout}:latest", bundle)
    words = [word for part in command for word in ("--config.cmd", part)]
    umoci("config", "--image", f"{layout}:latest", *words)


def follow(process: subprocess.Popen[bytes], until: str) -> str:
    """Print what the application says until a line has this in it; returns that line."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        print(f"      {line}", flush=True)
        if until in line:
            return line
    sys.exit(f"demo: the container ended (exit code {process.wait()}) before it said {until!r}")


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".cache/demo", help="where the base image is kept")
    parser.add_argument("--rebuild", action="store_true", help="make the base image anew")
    parser.add_argument("--keep", action="store_true", help="keep the work directory")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("demo: run it as root; it makes an image, mounts and containers")
    options.cache.mkdir(parents=True, exist_ok=True)
    work = Path(f"/var/tmp/inclavare-demo-{os.getpid()}")
    work.mkdir(mode=0o700)
    demo = Demo(options.cache.resolve(), work)
    container = f"demo-{os.getpid()}"
    try:
        tell(demo, container, options.rebuild)
    finally:
        for name in (container, f"{container}-tampered", f"{container}-served"):
            subprocess.run([BIN / "rune", "delete", "--force", name], env=demo.env, capture_output=True)
        for process in demo.started_containers:
            process.wait(20)
        demo.stop()
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(
        f"\nDone in {time.monotonic() - demo.started:.1f} s. Everything ran on sgx-sim, a SIMULATION: real formats, no"
    )
    print("protection against this machine's root. See docs/threat-model.md. Nothing is left running.")


def tell(demo: Demo, container: str, rebuild: bool) -> None:
    """The story."""
    work = demo.work
    demo.step("An ordinary image: Debian with Python")
    base = demo.base_image(rebuild)
    demo.started = time.monotonic()  # downloads do not count

    demo.step("The owner of the data draws a key, and encrypts the data that goes into the image with it")
    key = work / "data-key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    image = demo.application_image(base, key)
    print(f"    {image}: the application, and 1000 records that nobody can read without {key.name}")

    demo.step("The image becomes an enclave image: every file measured, manifest and signature put into it")
    built = demo.build(f"oci:{image}:latest", f"oci:{work / 'enclave'}:latest")
    print(f"      MRENCLAVE {built['mrenclave']}\n      MRSIGNER  {built['mrsigner']}")

    demo.step(
        "The owner writes down who may have the key: this enclave, and as this is a demonstration, a simulated one"
    )
    (work / "root.pem").write_text(demo.inclavare("sgx", "platform", "show", "--root-ca", quiet=True))
    policy = work / "policy.toml"
    policy.write_text(f'mrenclave = ["{built["mrenclave"]}"]\nsimulated = "allow"\ntrust_anchor = "root.pem"\n')
    print("".join(f"      {line}\n" for line in policy.read_text().splitlines()), end="")
    demo.inclavare("secret", "put", "data-key", "--policy", policy, "--vault", work / "vault", data=key.read_bytes())

    demo.step("The container starts, in an enclave")
    process = demo.start(container, f"oci:{work / 'enclave'}:latest")
    follow(process, "no key")

    demo.step("It is challenged with a nonce; its quote is verified against the owner's policy")
    demo.inclavare("attest", container, "--policy", policy)
    print("    and against the default policy, which accepts real hardware only:")
    strict = work / "strict.toml"
    strict.write_text(f'mrenclave = ["{built["mrenclave"]}"]\n')
    demo.inclavare("attest", container, "--policy", strict, fails=True)

    demo.step("The key is released over a channel that a fresh quote vouches for, and the application uses it")
    demo.inclavare("secret", "get", "data-key", "--container", container, "--vault", work / "vault")
    said = follow(process, "decrypted")
    if demo.expected not in said or process.wait(20) != 0:
        sys.exit("demo: the application did not decrypt what the owner encrypted")

    demo.step("Somebody changes the application in the image: it must not run under this identity")
    tampered, bundle = work / "tampered", work / "tampering"
    shutil.copytree(work / "enclave", tampered)
    umoci("unpack", "--image", f"{tampered}:latest", bundle)
    changed = (bundle / "rootfs/app/app.py").read_text().replace("my data", "your data")
    (bundle / "rootfs/app/app.py").write_text(changed)
    umoci("repack", "--image", f"{tampered}:latest", bundle)
    demo.inclavare("measure", f"oci:{tampered}:latest", fails=True)
    refused = demo.start(f"{container}-tampered", f"oci:{tampered}:latest")
    output = refused.communicate(timeout=60)[0].decode()
    print("".join(f"      {line}\n" for line in output.splitlines()), end="")
    if refused.returncode == 0 or "application:" in output:
        sys.exit("demo: the tampered image ran")
    print(f"      exit code {refused.returncode}: the enclave was given no byte that was not measured")

    demo.step("Built and signed anew it does run, but it is another enclave, and gets no key")
    other = demo.build(bundle / "rootfs", work / "other", "--manifest", _manifest(work))
    print(f"      MRENCLAVE {other['mrenclave']}")
    another = demo.start(container, str(work / "other"))
    follow(another, "no key")
    demo.inclavare("secret", "get", "data-key", "--container", container, "--vault", work / "vault", fails=True)
    serve(demo, container, image, key)


def serve(demo: Demo, container: str, image: Path, key: Path) -> None:
    """The same with verdictd, which asks and answers when its owner sleeps."""
    work = demo.work
    demo.step("The owner has better things to do, and starts verdictd, which verifies and releases by itself")
    address, fingerprint = demo.serve()

    demo.step("The image says whom to ask; building it gives signed reference values, too")
    manifest, bundle = work / "served.toml", work / "references.json"
    manifest.write_text(
        f'[attestation]\nverdictd = "https://{address}"\ntrust_anchor = "{fingerprint}"\n'
        '[[secrets]]\nuri = "kbs:///patients/key/1"\npath = "/run/data-key"\n'
    )
    print("".join(f"      {line}\n" for line in manifest.read_text().splitlines()), end="")
    served = work / "served"  # a directory, which starts without being unpacked
    references = ("--reference-bundle", bundle, "--reference-name", "demo/patients")
    demo.build(f"oci:{image}:latest", served, "--manifest", manifest, *references)

    demo.step("verdictd is told whose reference values count, a policy that needs no measurement any more, and the key")
    public = work / "owner/inclavare/reference-key.pub.pem"
    demo.inclavare("verdict", "reference", "trust", "builder", public, quiet=True)
    demo.inclavare("verdict", "reference", "register", bundle, quiet=True)
    policy = work / "served-policy.toml"
    root = (work / "root.pem").read_text()
    policy.write_text(f"image = \"demo/patients\"\nsimulated = \"allow\"\ntrust_anchor = '''{root}'''\n")
    demo.inclavare("verdict", "policy", "set", "patients", policy, "--default", quiet=True)
    demo.inclavare("verdict", "secret", "put", "patients/key/1", "--from", key, quiet=True)

    demo.step("The container starts; before the application does, its enclave has proven itself and got the key")
    name = f"{container}-served"
    process = demo.start(name, str(served))
    said = follow(process, "decrypted")
    if demo.expected not in said or process.wait(20) != 0:
        sys.exit("demo: the application did not decrypt what the owner encrypted")

    demo.step("A hole is found in the image. Its reference values are revoked, and it gets no key any more")
    listed = json.loads(demo.inclavare("verdict", "reference", "list", "--json", quiet=True))
    digest = listed[0]["digest"]
    demo.inclavare("verdict", "reference", "revoke", digest, "--reason", "the base image has a hole", quiet=True)
    time.sleep(1)  # so long verdictd may decide by what it knows
    refused = demo.start(name, str(served))
    output = refused.communicate(timeout=60)[0].decode()
    print("".join(f"      {line}\n" for line in output.splitlines()), end="")
    if refused.returncode == 0 or "a hole" not in output:
        sys.exit("demo: the revoked image got its key")

    demo.step("Every decision is in the audit trail")
    demo.inclavare("verdict", "audit", "list", "-n", "4")


def _manifest(work: Path) -> Path:
    path = work / "other.toml"
    process = {"args": ["/usr/bin/python3", "-u", "/app/app.py"], "cwd": "/"}
    path.write_text("[process]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in process.items()))
    return path


if __name__ == "__main__":
    main()

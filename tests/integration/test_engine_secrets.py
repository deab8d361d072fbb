"""Engines: secrets are there before the application starts; a denial's reasons are in the engine's own error."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import Containerd, Docker, Podman, Result, Workspace, wait_for

from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.store import FileKey, Store

pytestmark = [pytest.mark.daemon, pytest.mark.crun]

SECRET = "correct horse battery staple"
PROGRAM = [sys.executable, "-c", "from inclavare.cli import main; main()"]
Engine = Docker | Podman | Containerd


@contextmanager
def verdictd(work: Workspace) -> Iterator[tuple[Store, str, str]]:
    """verdictd beside an engine: its store, URL and fingerprint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    file = work.root / "verdictd.toml"
    words = ["verdictd", "init", "-c", file, "--state-dir", work.root / "verdictd", "--listen", address, "--json"]
    made = work.run(*PROGRAM, *words)
    assert made.returncode == 0, made.stderr
    config = VerdictConfig.load(file)
    with (work.root / "verdictd.log").open("wb") as log:
        process = subprocess.Popen(
            [*PROGRAM, "verdictd", "serve", "-c", file], env=work.env, stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    try:
        assert b"listening" in process.stdout.readline(), (work.root / "verdictd.log").read_text()
        with Store.open(config.store_url(), FileKey.load(config.master_key_file)) as store:
            yield store, f"https://{address}", json.loads(made.stdout)["fingerprint"]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def built(engine: Engine, name: str, text: str, script: str) -> dict[str, Any]:
    """An enclave image in the engine's store; its identity."""
    root = engine.work.root
    manifest = root / f"{name}.toml"
    args = json.dumps(["/bin/sh", "-c", script])
    manifest.write_text(f'{text}\n[process]\nargs = {args}\nenv = {{PATH = "/bin"}}\nuser = "1000:1000"\n')
    source, destination = root / f"{name}-in.tar", root / f"{name}-out.tar"
    if isinstance(engine, Containerd):
        source, scheme, load = root / "image/image.tar", "oci-archive", ["image", "import", str(destination)]
    else:
        scheme, load = "docker-archive", ["load", "-i", str(destination)]
        assert engine("save", "-o", str(source), engine.image).returncode == 0
    words = ["build", f"{scheme}:{source}", f"{scheme}:{destination}:{image(engine, name)}"]
    done = engine.work.run(*PROGRAM, *words, "-m", manifest, "--tee", "sgx-sim", "--json")
    assert done.returncode == 0, done.stderr
    loaded = engine(*load)
    assert loaded.returncode == 0, loaded.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def image(engine: Engine, name: str) -> str:
    """An image's name, as the engine spells it."""
    return f"{'docker.io/inclavare' if isinstance(engine, Containerd) else 'localhost'}/{name}:1"


def run(engine: Engine, rune: Path, name: str) -> Result:
    """Start a container of this image to its end, without a network."""
    if isinstance(engine, Containerd):
        return engine("run", "--rm", "--runc-binary", str(rune), image(engine, name), "c")
    if isinstance(engine, Podman):
        return engine("--runtime", "rune", "run", "--rm", image(engine, name))
    return engine("run", "--rm", "--runtime", "rune", "--network", "none", image(engine, name))


@pytest.mark.parametrize(("kind", "refusal"), [("docker", 125), ("podman", 126), ("containerd", 1)])
def test_a_secret_before_the_start_and_the_reasons_without(
    kind: str, refusal: int, rune: Path, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(kind)
    work = engine.work
    with verdictd(work) as (store, url, fingerprint):
        manifest = f"""
[attestation]
verdictd = "{url}"
trust_anchor = "{fingerprint}"
[[secrets]]
uri = "kbs:///app/key/1"
path = "/run/app-key"
[[secrets]]
uri = "kbs:///app/word/1"
env = "WORD"
"""
        script = "id -u; stat -c %a,%u /run/app-key; cat /run/app-key; echo; echo $WORD; busybox wget -qO- {}"
        api = "http://127.0.0.1:8006/cdh/resource/app/key/1"
        identity = built(engine, "secrets", manifest, script.format(api))
        root = work.run(*PROGRAM, "sgx", "platform", "show", "--root-ca").stdout
        policy = f"mrenclave = [\"{identity['mrenclave']}\"]\nsimulated = \"allow\"\ntrust_anchor = '''{root}'''\n"
        store.policies.put("default", "engine", "toml", policy)
        store.policies.set_default("default", "engine")
        store.secrets.put("default", "app/key/1", SECRET.encode())
        store.secrets.put("default", "app/word/1", b"open")
        done = run(engine, rune, "secrets")
        assert done.stdout.startswith(f"1000\n400,1000\n{SECRET}\nopen\n{SECRET}"), done.stdout + done.stderr
        wait_for(lambda: not work.enclaves(), "the enclave's end", 15)
        if not isinstance(engine, Containerd):
            assert SECRET not in engine("image", "inspect", image(engine, "secrets")).stdout

        other = built(engine, "other", manifest, "cat /run/app-key")
        refused = run(engine, rune, "other")
        assert refused.returncode == refusal, refused.stderr
        assert "kbs.attest.denied" in refused.stderr and other["mrenclave"] in refused.stderr
        assert SECRET not in refused.stdout
        log = (work.root / "log/runelet.log").read_text()
        events = [json.loads(line) for line in log.splitlines()]
        assert any(e["event"] == "secret.refused" and other["mrenclave"] in e["found"] for e in events)
        assert SECRET not in log
        wait_for(lambda: not work.enclaves(), "the enclave's end", 15)

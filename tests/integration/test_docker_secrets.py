"""docker: secrets are there before the application starts; a denial's reasons are in docker's own error."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Docker, wait_for

from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.store import FileKey, Store

pytestmark = [pytest.mark.daemon, pytest.mark.crun]

SECRET = "correct horse battery staple"
PROGRAM = [sys.executable, "-c", "from inclavare.cli import main; main()"]


@pytest.fixture(scope="module")
def verdictd(docker: Docker) -> Iterator[tuple[Store, str, str]]:
    """verdictd beside docker: its store, URL and fingerprint."""
    work = docker.work
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
    assert b"listening" in process.stdout.readline(), (work.root / "verdictd.log").read_text()
    with Store.open(config.store_url(), FileKey.load(config.master_key_file)) as store:
        yield store, f"https://{address}", json.loads(made.stdout)["fingerprint"]
    process.terminate()
    process.wait(30)
    process.stdout.close()


def built(docker: Docker, name: str, text: str, script: str) -> dict[str, Any]:
    """An enclave image in docker; its identity."""
    work = docker.work
    manifest = work.root / f"{name}.toml"
    args = json.dumps(["/bin/sh", "-c", script])
    manifest.write_text(f'{text}\n[process]\nargs = {args}\nenv = {{PATH = "/bin"}}\nuser = "1000:1000"\n')
    source, destination = work.root / f"{name}-in.tar", work.root / f"{name}-out.tar"
    assert docker("save", "-o", str(source), docker.image).returncode == 0
    words = ["build", f"docker-archive:{source}", f"docker-archive:{destination}:{name}:latest"]
    done = work.run(*PROGRAM, *words, "-m", manifest, "--tee", "sgx-sim", "--json")
    assert done.returncode == 0, done.stderr
    assert docker("load", "-i", str(destination)).returncode == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_secret_before_the_start_and_the_reasons_without(docker: Docker, verdictd: tuple[Store, str, str]) -> None:
    store, url, fingerprint = verdictd
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
    identity = built(docker, "secrets", manifest, f"sleep 1; {script.format(api)}")
    root = docker.work.run(*PROGRAM, "sgx", "platform", "show", "--root-ca").stdout
    policy = f"mrenclave = [\"{identity['mrenclave']}\"]\nsimulated = \"allow\"\ntrust_anchor = '''{root}'''\n"
    store.policies.put("default", "docker", "toml", policy)
    store.policies.set_default("default", "docker")
    store.secrets.put("default", "app/key/1", SECRET.encode())
    store.secrets.put("default", "app/word/1", b"open")
    done = docker("run", "--rm", "--runtime", "rune", "--network", "none", "secrets:latest")
    assert done.stdout.startswith(f"1000\n400,1000\n{SECRET}\nopen\n{SECRET}"), done.stdout + done.stderr
    inspected = docker("image", "inspect", "secrets:latest").stdout
    assert SECRET not in inspected
    wait_for(lambda: not docker.work.enclaves(), "the enclave's end", 15)

    other = built(docker, "other", manifest, "cat /run/app-key")
    refused = docker("run", "--rm", "--runtime", "rune", "--network", "none", "other:latest")
    assert refused.returncode == 125
    assert "kbs.attest.denied" in refused.stderr and other["mrenclave"] in refused.stderr
    assert SECRET not in refused.stdout
    events = [json.loads(line) for line in (docker.work.root / "log/runelet.log").read_text().splitlines()]
    assert any(e["event"] == "secret.refused" and other["mrenclave"] in e["found"] for e in events)
    assert SECRET not in Path(docker.work.root / "log/runelet.log").read_text()

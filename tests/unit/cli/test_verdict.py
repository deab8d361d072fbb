"""``inclavare verdict …`` against a verdictd on loopback."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "verdict"))

from verdict_service import Service, make_config, make_store, running

from inclavare import serving
from inclavare.attestation.references import Subject, sign, statement
from inclavare.attestation.signers import KeySigner
from inclavare.cli import main
from inclavare.cli.verdict._client import Login
from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict.auth import issue
from inclavare.verdict.store import SYSTEM, Quotas

VALUE = b"very secret \x00\xff"


@pytest.fixture(scope="module")
def verdictd(tmp_path_factory: pytest.TempPathFactory, platform: SimulatedPlatform, signers: Any) -> Iterator[Service]:
    config = make_config(tmp_path_factory.mktemp("verdictd"), "[limits]\nclient_requests = 1000000\n")
    with make_store(config) as store:
        for tenant in ("default", "other"):
            store.tenants.create(tenant, quotas=Quotas())
        with running(config, store, platform, signers) as service:
            yield service


def invoke(*words: str, input: bytes | str | None = None) -> Result:
    return CliRunner().invoke(main, ["verdict", *words], input=input)


def good(*words: str, input: bytes | str | None = None) -> Any:
    """JSON that a command prints."""
    found = invoke(*words, "--json", input=input)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout) if found.stdout.strip() else None


def refused(*words: str, code: int, input: bytes | str | None = None) -> str:
    """Id of the error."""
    found = invoke(*words, "--json", input=input)
    assert found.exit_code == code, found.output
    return str(json.loads(found.stdout)["error"]["id"])


def fingerprint(service: Service) -> str:
    return serving.fingerprint(service.config.certificate)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


@pytest.fixture
def login(home: Path, verdictd: Service) -> Callable[..., str]:
    """Log in with a new token for a role."""

    def log_in(role: Any, tenant: str = SYSTEM, of: str = "default") -> str:
        token = issue(verdictd.store, tenant, "cli", role, 3600)[1]
        good("login", verdictd.url, "--fingerprint", fingerprint(verdictd), "--tenant", of, input=token)
        return token

    return log_in


def test_login_keeps_what_it_needs_for_its_user_only(home: Path, verdictd: Service, login: Callable[..., str]) -> None:
    token = login("admin")
    path = Login.path()
    assert path == home / "config/inclavare/verdict.json"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = json.loads(path.read_text())
    assert kept["token"] == token and token not in repr(Login.load())
    assert kept["certificate"].strip() == verdictd.config.certificate.read_text().strip()
    assert "default" in {one["name"] for one in good("tenant", "list")}
    path.chmod(0o640)
    assert refused("tenant", "list", code=2) == "verdict.login.file"


def test_login_by_a_file_of_the_certificate(home: Path, verdictd: Service) -> None:
    token = home / "token"
    token.write_text(issue(verdictd.store, SYSTEM, "cli", "auditor", 3600)[1] + "\n")
    found = good("login", verdictd.url, "--ca", str(verdictd.config.certificate), "--token-file", str(token))
    assert found["grants"] == [{"tenant": "*", "role": "auditor"}]


def test_login_to_another_service_is_refused(home: Path, verdictd: Service, tmp_path: Path) -> None:
    token = issue(verdictd.store, SYSTEM, "cli", "admin", 3600)[1]
    wrong = "00:" * 31 + "00"
    assert refused("login", verdictd.url, "--fingerprint", wrong, input=token, code=7) == "verdict.client.certificate"
    assert refused("login", verdictd.url, input=token, code=7) == "verdict.client.certificate"
    assert refused("login", "http://127.0.0.1:1", input=token, code=2) == "verdict.login.url"
    for malformed in ("xyz", "00:11", ""):
        assert refused("login", verdictd.url, "--fingerprint", malformed, input=token, code=2) == (
            "verdict.login.fingerprint"
        )
    mark = fingerprint(verdictd)
    assert refused("login", verdictd.url, "--fingerprint", mark, input="no token", code=2) == "verdict.login.token"
    assert refused("login", verdictd.url, "--fingerprint", mark, input=token[:-9] + "AAAAAAAAA", code=8) == (
        "verdict.auth.token.signature"
    )
    assert not Login.path().exists()
    assert refused("tenant", "list", code=2) == "verdict.login.none"


def test_the_token_goes_to_no_other_certificate(
    home: Path, login: Callable[..., str], tmp_path: Path, verdictd: Service
) -> None:
    """Somebody who takes over the address sees a handshake that ends, and no token."""
    token = login("admin")
    certificate, key = serving.own_certificate(tmp_path / "impostor", (), common_name="verdictd")
    listening = serving.listen("127.0.0.1", 0)
    seen = bytearray()

    def serve() -> None:
        connection, _ = listening.accept()
        try:
            with serving.tls_context(certificate, key).wrap_socket(connection, server_side=True) as stream:
                seen.extend(stream.recv(65536))
        except (ssl.SSLError, OSError):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    kept = json.loads(Login.path().read_text())
    Login(**{**kept, "url": f"https://127.0.0.1:{listening.getsockname()[1]}"}).save()
    assert refused("tenant", "list", code=7) == "verdict.client.certificate"
    thread.join(10)
    listening.close()
    assert token.encode() not in seen and not seen


def test_nobody_listens(login: Callable[..., str]) -> None:
    login("admin")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kept = json.loads(Login.path().read_text())
    Login(**{**kept, "url": f"https://127.0.0.1:{port}"}).save()
    assert refused("tenant", "list", code=6) == "verdict.client.unreachable"


def test_tenants(login: Callable[..., str]) -> None:
    login("admin")
    assert good("tenant", "create", "payments", "--secrets", "3")["quotas"]["secrets"] == 3
    assert refused("tenant", "create", "payments", code=2) == "verdict.store.tenant.exists"
    listed = invoke("tenant", "list").stdout
    assert any(line.split("\t")[0] == "payments" for line in listed.splitlines())
    assert invoke("tenant", "delete", "payments", input="n\n").exit_code == 1
    good("tenant", "delete", "payments", "--yes")
    assert refused("policy", "list", "--tenant", "payments", code=2) == "verdict.store.tenant.unknown"


def test_secrets(login: Callable[..., str], verdictd: Service, tmp_path: Path) -> None:
    login("operator", "default")
    made = good("secret", "put", "cli/key/1", "--metadata", "owner=alice", input=VALUE)
    assert (made["version"], made["size"], made["metadata"]) == (1, len(VALUE), {"owner": "alice"})
    assert verdictd.store.secrets.read("default", "cli/key/1", holder="ab" * 32) == VALUE
    file = tmp_path / "value"
    file.write_bytes(b"second")
    assert good("secret", "put", "cli/key/1", "--from", str(file), "--release-once")["version"] == 2
    shown = invoke("secret", "list", "cli/key/1").stdout + invoke("secret", "list").stdout
    assert "cli/key/1" in shown and "second" not in shown and base64.b64encode(b"second").decode() not in shown
    assert [one["version"] for one in good("secret", "list", "cli/key/1")] == [2, 1]
    assert refused("secret", "put", "cli/key/2", input=b"", code=2) == "verdict.api.secret.empty"
    for wrong in ("no-path", "a/b/c/d", "a//c"):
        assert refused("secret", "put", wrong, input=b"x", code=2) == "cli.usage"
    assert refused("secret", "put", "cli/key/2", "--policy", "none", input=b"x", code=2) == (
        "verdict.store.secret.policy"
    )
    assert refused("secret", "put", "cli/key/2", "--tenant", "other", input=b"x", code=8) == "verdict.auth.role"
    good("secret", "delete", "cli/key/1", "--version", "1")
    good("secret", "delete", "cli/key/1")
    assert refused("secret", "delete", "cli/key/1", code=2) == "verdict.store.secret.unknown"


def test_values_come_from_no_argument() -> None:
    assert invoke("secret", "put", "a/b/c", "value").exit_code == 2
    assert "--value" not in invoke("secret", "put", "--help").stdout
    assert "--token " not in invoke("login", "--help").stdout


def test_policies(login: Callable[..., str], tmp_path: Path) -> None:
    login("operator", "default")
    file = tmp_path / "p.toml"
    file.write_text(f'mrsigner = ["{"ab" * 32}"]\n')
    assert good("policy", "set", "cli", str(file), "--default", "--after", "0")["default"] is True
    assert refused("policy", "set", "cli", str(file), "--after", "0", code=2) == "verdict.store.policy.changed"
    file.write_text(f'mrsigner = ["{"cd" * 32}"]\n')
    assert good("policy", "set", "cli", str(file), "--after", "1")["version"] == 2
    file.write_text(f'mrsigner = ["{"ef" * 32}"]\n')
    assert refused("policy", "set", "cli", str(file), "--after", "1", code=2) == "verdict.store.policy.changed"
    assert "cd" * 32 in invoke("policy", "show", "cli").stdout
    assert "ab" * 32 in invoke("policy", "show", "cli", "--version", "1").stdout
    assert "+mrsigner" in invoke("policy", "diff", "cli", "1").stdout
    assert good("policy", "rollback", "cli", "1")["restored_from"] == 1
    assert [one["version"] for one in good("policy", "history", "cli")] == [3, 2, 1]
    assert "cli\ttoml\t3\tyes" in invoke("policy", "list").stdout
    good("policy", "default", "--clear", "toml")
    file.write_text("mrsigner = [")
    found = invoke("policy", "set", "cli", str(file))
    assert found.exit_code == 2 and "policy.file.syntax" in found.stderr and "remedy" in found.stderr
    rego = tmp_path / "p.rego"
    rego.write_text("package policy\n\ndefault allow = false\n")
    assert good("policy", "set", "cli-rego", str(rego))["kind"] == "resource-rego"
    good("policy", "delete", "cli-rego")
    good("policy", "delete", "cli")


def test_dry_run_of_a_policy(login: Callable[..., str], verdictd: Service, tmp_path: Path) -> None:
    verdictd.default_policy(verdictd.policy())
    client = verdictd.client()
    client.handshake()
    login("operator", "default")
    kept = good("policy", "dry-run")
    assert kept["accepted"] == 1
    file = tmp_path / "strict.toml"
    file.write_text(verdictd.policy(simulated="deny"))
    found = invoke("policy", "dry-run", str(file))
    assert found.exit_code == 3
    assert "refused" in found.stdout and "policy.simulated" in found.stdout
    assert invoke("policy", "dry-run", "--policy", "default-toml").exit_code == 0


def test_references(login: Callable[..., str], tmp_path: Path) -> None:
    login("operator", "default")
    signer = KeySigner.load_or_make(tmp_path / "key.pem")[0]
    now = int(time.time())
    subject = Subject("registry.example/app", (("sha256", "12" * 32),))
    made = statement([subject], [(["sgx"], {"mrenclave": "ab" * 32})], not_before=now - 60, not_after=now + 600)
    bundle = tmp_path / "bundle.json"
    bundle.write_bytes(sign(made, signer))
    public = tmp_path / "key.pub"
    public.write_bytes(signer.public_pem())
    assert refused("reference", "register", str(bundle), code=2) == "verdict.api.reference.signers"
    assert refused("reference", "trust", "me", str(tmp_path / "key.pem"), code=2) == "reference.key"
    good("reference", "trust", "me", str(public))
    assert [one["name"] for one in good("reference", "signers")] == ["me"]
    registered = good("reference", "register", str(bundle))
    assert "registry.example/app" in invoke("reference", "list").stdout
    assert invoke("reference", "show", registered["digest"][:12]).stdout_bytes == bundle.read_bytes()
    assert refused("reference", "revoke", "00000000", "--reason", "x", code=2) == "verdict.reference.digest"
    assert good("reference", "revoke", registered["metadata"]["id"], "--reason", "CVE")["revoked_reason"] == "CVE"
    good("reference", "distrust", "me")
    assert good("reference", "signers") == []


def test_tokens(login: Callable[..., str], verdictd: Service, tmp_path: Path) -> None:
    login("admin", "default")
    file = tmp_path / "token"
    made = good("token", "create", "ci", "--role", "auditor", "-o", str(file))
    assert "token" not in made and file.stat().st_mode & 0o777 == 0o600
    assert made["jti"] in {one["jti"] for one in good("token", "list")}
    assert refused("token", "create", "ci", "--role", "admin", "--all-tenants", code=8) == "verdict.auth.role"
    once = invoke("token", "create", "ci", "--role", "auditor").stdout.strip()
    assert once.count(".") == 2
    mark = fingerprint(verdictd)
    good("token", "revoke", made["jti"])
    assert refused("login", verdictd.url, "--fingerprint", mark, input=file.read_text(), code=8) == (
        "verdict.auth.token.revoked"
    )
    good("login", verdictd.url, "--fingerprint", mark, input=once)
    assert refused("secret", "put", "a/b/c", input=b"x", code=8) == "verdict.auth.role"


def test_audit(login: Callable[..., str], verdictd: Service, tmp_path: Path) -> None:
    login("admin")
    good("secret", "put", "audited/key/1", input=b"x")
    listed = good("audit", "list", "--action", "secret.put", "--limit", "1")
    assert listed[0]["detail"]["secret"] == "audited/key/1" and listed[0]["actor"] == "token:cli"
    assert "audited/key/1" in invoke("audit", "list").stdout
    export, keys, point = tmp_path / "export", tmp_path / "keys", tmp_path / "checkpoint"
    good("audit", "export", "-o", str(export))
    keys.write_text(invoke("audit", "keys").stdout)
    point.write_text(invoke("audit", "checkpoint").stdout)
    assert good("audit", "verify", "--checkpoint", str(point))["whole"] is True
    assert good("audit", "verify", "--export", str(export), "--keys", str(keys))["whole"] is True
    lines = export.read_text().splitlines(keepends=True)
    export.write_text("".join([*lines[:2], *lines[3:]]))
    found = invoke("audit", "verify", "--export", str(export), "--keys", str(keys))
    assert found.exit_code == 7 and "verdict.store.audit.missing" in found.stdout
    assert invoke("audit", "export").stdout.splitlines()[0] == lines[0].strip()


def test_first_token_of_a_new_service(home: Path, tmp_path: Path) -> None:
    config = tmp_path / "verdictd.toml"
    words = ["verdictd", "init", "-c", str(config), "--json"]
    first = CliRunner().invoke(main, [*words, "--state-dir", str(tmp_path / "state"), "--listen", "127.0.0.1:0"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["token"].count(".") == 2
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0 and "token" not in json.loads(again.stdout)
    file = tmp_path / "token"
    made = CliRunner().invoke(
        main, ["verdictd", "token", "create", "alice", "-c", str(config), "-o", str(file), "--json"]
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["role"] == "admin" and os.stat(file).st_mode & 0o777 == 0o600
    too_long = CliRunner().invoke(main, ["verdictd", "token", "create", "bob", "-c", str(config), "--days", "31"])
    assert too_long.exit_code == 2

"""verdictd as processes: its commands, workers, end, logs, traces and metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kbs_client import Client
from small_enclaves import Signers
from verdict_service import SECRET, Service

from inclavare.cli.verdictd import command
from inclavare.tee.sgx_sim import SimulatedPlatform
from inclavare.verdict import server
from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.server import open_store
from inclavare.verdict.store import Store


@dataclass
class Running:
    """A service in processes of its own."""

    process: subprocess.Popen[str]
    service: Service
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def run(*args: str | Path) -> Any:
    """A command that must succeed; its JSON."""
    result = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@contextmanager
def serving(
    base: Path, platform: SimulatedPlatform, signers: Signers, text: str = "", telemetry: str = ""
) -> Iterator[Running]:
    file, log = base / "verdictd.toml", base / "log" / "verdictd.log"
    run("init", "-c", file, "--state-dir", base / "state", "--listen", "127.0.0.1:0")
    more = f'[limits]\nclient_requests = 1000000\n[telemetry]\nlog = "{log}"\nlevel = "debug"\n'
    file.write_text(file.read_text() + text + more + telemetry)
    run("init", "-c", file)  # of the database that the configuration names now
    config = VerdictConfig.load(file)
    process = subprocess.Popen(
        [sys.executable, "-c", "from inclavare.cli import main; main()", "verdictd", "serve", "-c", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"listening on (https://127\.0\.0\.1:\d+)\n", line)
        assert found is not None, line + process.stderr.read()
        with open_store(config) as store:
            service = Service(config, store, None, found[1], platform, signers)  # type: ignore[arg-type]
            store.policies.put("default", "workload", "toml", service.policy())
            store.policies.set_default("default", "workload")
            store.secrets.put("default", "app/key/1", SECRET)
            yield Running(process, service, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()
            process.stderr.close()


def test_init_changes_nothing_the_second_time(tmp_path: Path) -> None:
    file = tmp_path / "verdictd.toml"
    made = json.loads(run("init", "-c", file, "--state-dir", tmp_path / "s", "--tenant", "acme", "--json").stdout)
    assert made.pop("new_tenant") is True
    assert made.pop("token")
    assert re.fullmatch(r"(?:[0-9A-F]{2}:){31}[0-9A-F]{2}", made["fingerprint"])
    before = {path: path.read_bytes() for path in (tmp_path / "s").iterdir() if path.suffix in (".pem", ".key")}
    assert {path.name: path.stat().st_mode & 0o777 for path in before} == {
        "tls-cert.pem": 0o644, "tls-key.pem": 0o600, "master.key": 0o600,
    }  # fmt: skip
    again = json.loads(run("init", "-c", file, "--tenant", "acme", "--json").stdout)
    assert again == {**made, "new_tenant": False}  # in particular no other administrator's token
    assert {path: path.read_bytes() for path in before} == before
    refused = CliRunner().invoke(command, ["init", "-c", str(file), "--listen", "127.0.0.1:1"])
    assert refused.exit_code == 2


def test_store_commands(tmp_path: Path) -> None:
    file, copy = tmp_path / "verdictd.toml", tmp_path / "backup"
    run("init", "-c", file, "--state-dir", tmp_path / "s")
    config = VerdictConfig.load(file)
    with open_store(config) as store:
        store.secrets.put("default", "app/key/1", SECRET)
    assert json.loads(run("backup", copy, "-c", file, "--json").stdout)["rows"]["secrets"] == 1
    assert copy.stat().st_mode & 0o777 == 0o600
    assert SECRET not in copy.read_bytes()
    with open_store(config) as store:
        store.secrets.delete("default", "app/key/1")
    run("restore", copy, "-c", file, "--force", "--json")
    with open_store(config) as store:
        assert store.secrets.read("default", "app/key/1", holder="00") == SECRET
    new = tmp_path / "new.toml"
    new.write_text(file.read_text() + f'[master_key]\nfile = "{tmp_path}/s/new.key"\n')
    assert json.loads(run("rotate-master-key", "-c", file, "--new-config", new, "--json").stdout)["wrapped"] >= 1
    with open_store(VerdictConfig.load(new)) as store:
        assert store.secrets.read("default", "app/key/1", holder="00") == SECRET
    with pytest.raises(Exception, match="master key"):
        open_store(config)
    assert run("migrate", "-c", new).stdout.startswith("schema ")
    assert run("purge", "-c", new).stdout == "0 rows removed\n"


def test_misconfiguration_is_told_before_anything_is_served(tmp_path: Path) -> None:
    file = tmp_path / "verdictd.toml"
    run("init", "-c", file, "--state-dir", tmp_path / "s")
    file.write_text(file.read_text() + 'workers = 2\n[[plugins]]\ntype = "nonsense"\ntenants = ["default"]\n')
    found = subprocess.run(
        [sys.executable, "-c", "from inclavare.cli import main; main()", "verdictd", "serve", "-c", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2
    assert "listening" not in found.stdout
    assert "verdict.plugin.type" in found.stderr


def test_one_process(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    with serving(tmp_path, platform, signers) as running:
        client = running.service.client()
        client.handshake()
        assert client.get("app/key/1") == SECRET
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        events = [line["event"] for line in running.lines()]
        assert events[0] == "verdict.started"
        assert events[-1] == "verdict.stopped"
        release = next(line for line in running.lines() if line["event"] == "kbs.release")
        assert re.fullmatch(r"[0-9a-f]{16}", release["request"])
        assert release["resource"] == "resource/app/key/1"
        text = running.log.read_text()
        for secret in (SECRET.decode(), client.token, str(client.cookie)):
            assert secret not in text
        assert running.log.stat().st_mode & 0o777 == 0o600


def test_requests_under_way_are_answered_at_the_end(
    tmp_path: Path, platform: SimulatedPlatform, signers: Signers
) -> None:
    with serving(tmp_path, platform, signers) as running:
        outcomes: list[str] = []

        def go() -> None:
            client = running.service.client()
            try:
                while True:
                    client.handshake()
                    outcomes.append("good" if client.get("app/key/1") == SECRET else "bad")
            except ConnectionRefusedError:
                outcomes.append("refused")
            except OSError as error:
                outcomes.append(type(error).__name__)
            except AssertionError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=go) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while outcomes.count("good") < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        for thread in threads:
            thread.join()
        # A connection may be closed between two requests; none is answered wrongly or with a failure of the service.
        closed = {"RemoteDisconnected", "ConnectionResetError", "BrokenPipeError", "SSLEOFError"}
        assert set(outcomes) <= {"good", "refused", *closed}
        assert outcomes.count("good") >= 10


@pytest.fixture(params=["sqlite", "postgresql"])
def store_section(request: pytest.FixtureRequest) -> Iterator[str]:
    """Configuration of a database."""
    if request.param == "sqlite":
        yield ""
        return
    sys.path.insert(0, str(Path(__file__).with_name("store")))
    from store_servers import postgresql

    with postgresql("fsync=off") as server:
        yield f'[store]\nurl = "{server.url(server.create())}"\n'


def test_killed_worker_loses_nothing(
    tmp_path: Path, platform: SimulatedPlatform, signers: Signers, store_section: str
) -> None:
    """Two workers over one store; one is killed again and again under load. Release-once secrets go out once."""
    with serving(tmp_path, platform, signers, "workers = 2\n" + store_section) as running:
        service = running.service
        for number in range(20):
            service.store.secrets.put("default", f"once/key/{number}", b"%d" % number, release_once=True)
        released: list[tuple[int, str]] = []
        failures: list[str] = []

        def retried(client: Client, work: Any) -> Any:
            for _ in range(50):
                try:
                    return work()
                except (OSError, HTTPException, AssertionError) as error:
                    # The connection was the killed worker's, or the answer was lost with it: as CoCo's client, again.
                    failures.append(repr(error)[:80])
                    time.sleep(0.1)
            raise AssertionError("the service does not come back")

        def go(name: str) -> None:
            client = service.client()
            for number in range(20):
                retried(client, client.handshake)
                reply = retried(client, lambda number=number: client.resource(f"once/key/{number}"))
                if reply.status == 200:
                    assert client.key.open(reply.json) == b"%d" % number
                    released.append((number, name))

        pool = ThreadPoolExecutor(3)
        clients = [pool.submit(go, f"client {index}") for index in range(3)]
        killed = 0
        while not all(client.done() for client in clients):
            children = subprocess.run(
                ["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True
            ).stdout.split()
            if children and killed < 4:
                os.kill(int(children[killed % len(children)]), signal.SIGKILL)
                killed += 1
            time.sleep(0.3)
        pool.shutdown()
        for client in clients:
            client.result()
        assert killed >= 2
        numbers = [number for number, _ in released]
        assert len(numbers) == len(set(numbers)), "released twice"
        assert len(numbers) == 20, failures
        entries = service.store.audit.entries("default", limit=1000, action="kbs.release", decision="allowed")
        actors: dict[str, set[str]] = {}
        for entry in entries:
            actors.setdefault(entry.detail["resource"], set()).add(entry.actor)
        assert all(len(found) == 1 for found in actors.values())
        assert service.store.audit.verify().whole


def test_metrics_of_all_workers_together(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    with serving(tmp_path, platform, signers, "workers = 2\n") as running:
        clients = [running.service.client() for _ in range(8)]
        for client in clients:
            client.handshake()
        text = clients[0].call("GET", "/metrics").body.decode()
        found = re.search(r'verdictd_decisions_total\{action="kbs.attest",decision="allowed".*\} (\d+)', text)
        assert found is not None
        assert int(found[1]) == 8


def test_traces(tmp_path: Path, platform: SimulatedPlatform, signers: Signers) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                raw = gzip.decompress(raw)
            assert self.headers["authorization"] == "Bearer collector"
            received.append(raw)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    headers = tmp_path / "headers"
    headers.write_text("authorization=Bearer collector\n")
    headers.chmod(0o600)
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    traced = f'otlp_endpoint = "{endpoint}"\notlp_headers_file = "{headers}"\n'
    with serving(tmp_path, platform, signers, telemetry=traced) as running:
        client = running.service.client()
        client.handshake()
        assert client.get("app/key/1") == SECRET
        client.auth()
        client.attest({**client.attestation(), "runtime-data": {"nonce": "x", "tee-pubkey": client.key.jwk}})
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
    collector.shutdown()
    collector.server_close()
    spans = [
        span
        for raw in received
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    names = {span.name for span in spans}
    assert {
        "request",
        "kbs.auth",
        "kbs.attest",
        "kbs.resource",
        "verify",
        "policy",
        "fetch",
        "audit",
        "encrypt",
    } <= names
    parents = {span.span_id: span.name for span in spans}
    assert {parents.get(span.parent_span_id) for span in spans if span.name == "verify"} == {"kbs.attest"}
    exported = b"".join(received)
    for secret in (SECRET, client.token.encode(), str(client.cookie).encode(), b"app/key"):
        assert secret not in exported


def test_the_log_anchors_the_audit_trail(
    service_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_PURGE_SECONDS", 0.01)
    monkeypatch.setattr(server, "_CHECKPOINT_TURNS", 2)
    stop = threading.Event()
    with caplog.at_level("INFO"):
        keeping = threading.Thread(target=server._purge, args=(service_store, stop))
        keeping.start()
        try:
            wait_for = time.monotonic() + 20
            while sum(record.msg == "verdict.audit.checkpoint" for record in caplog.records) < 2:
                assert time.monotonic() < wait_for
                time.sleep(0.01)
        finally:
            stop.set()
            keeping.join()
    anchors = [record.fields["checkpoint"] for record in caplog.records if record.msg == "verdict.audit.checkpoint"]  # type: ignore[attr-defined]
    assert anchors[0] != anchors[1]
    assert service_store.audit.verify(anchors=json.loads(json.dumps(anchors))).whole

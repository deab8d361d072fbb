"""Complete attested releases per second of verdictd: auth, attest, resource; latency at several numbers of clients.

The service runs as it would be run (``inclavare verdictd serve``, TLS 1.3, audit trail, SQLite or PostgreSQL that wait
for the disk). Each release is three requests on a connection that is kept: a new challenge, an attestation whose
evidence is verified, and a secret encrypted to the TEE's key. The nonce is the service's, so evidence cannot be made
before it: sessions are begun and their quotes made before the clock starts (a quote of the simulated platform takes
longer than everything that is measured), and each release begins one session more in its place. The clients share the
machine with the service.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import glob
import json
import os
import pwd
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inclavare.attestation import Evidence, Policy
from inclavare.attestation.channel import EnclaveChannel, report_data
from inclavare.attestation.references import References
from inclavare.config import Config
from inclavare.enclave.signing import sign_once
from inclavare.tee.sgx_sim import create
from inclavare.verdict import decide
from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.rules import Rule, Rules
from inclavare.verdict.server import open_store

sys.path.insert(0, str(Path(__file__).parent))
from sgx import leaving

SECRET = b"s" * 32


@dataclass
class Session:
    """A session that has been begun, and the body of its attestation."""

    cookie: str
    attestation: bytes


class Connection:
    """One client's connection, kept alive."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._where = (host, port, context)

    async def open(self) -> Connection:
        host, port, context = self._where
        self._reader, self._writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
        return self

    async def call(self, method: str, path: str, body: bytes = b"", cookie: str = "") -> tuple[bytes, bytes]:
        """Head and body of an answer, which must be 200."""
        head = f"{method} /kbs/v0/{path} HTTP/1.1\r\nHost: verdictd\r\n"
        head += f"Cookie: kbs-session-id={cookie}\r\n" if cookie else ""
        head += f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        size = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        content = await self._reader.readexactly(size)
        if b" 200 " not in answer[:16]:
            raise SystemExit(f"{path}: {answer.decode()}{content.decode()}")
        return answer, content

    async def auth(self) -> tuple[str, str]:
        """A new session's cookie and nonce."""
        request = b'{"version":"0.4.0","tee":"sgx-sim","extra-params":{"supported-hash-algorithms":["sha384"]}}'
        head, body = await self.call("POST", "auth", request)
        return head.partition(b"kbs-session-id=")[2].partition(b";")[0].decode(), json.loads(body)["nonce"]

    async def release(self, session: Session) -> bytes:
        """What is measured."""
        await self.auth()
        await self.call("POST", "attest", session.attestation, session.cookie)
        return (await self.call("GET", "resource/bench/key/1", cookie=session.cookie))[1]

    def close(self) -> None:
        self._writer.close()


class Attester:
    """A small enclave of a simulated platform of its own."""

    def __init__(self, base: Path) -> None:
        self.platform = create(
            Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=64 << 20)
        )
        image = leaving()
        self.enclave = self.platform.load(image, sign_once(image), label="bench")
        self.channel = EnclaveChannel.new()
        self.collateral = self.platform.collateral()

    def evidence(self, nonce: str) -> tuple[dict[str, Any], bytes]:
        """Runtime data, and a quote that it is bound to."""
        data = {"nonce": nonce, "tee-pubkey": self.channel.public_jwk}
        report = self.enclave.report(self.platform.quote_target_info(), report_data(data))
        return data, self.platform.quote(report)

    def attestation(self, nonce: str) -> bytes:
        """The body of ``attest``."""
        data, quote = self.evidence(nonce)
        primary = {"quote": base64.b64encode(quote).decode(), "collateral": self.collateral}
        return json.dumps({"runtime-data": data, "tee-evidence": {"primary_evidence": primary}}).encode()

    def policy(self) -> str:
        anchor = ssl.DER_cert_to_PEM_cert(self.policy_object().trust_anchor or b"")
        return f'mrenclave = ["{self.enclave.mrenclave.hex()}"]\nsimulated = "allow"\ntrust_anchor = """{anchor}"""\n'

    def policy_object(self) -> Policy:
        made = Policy(mrenclave=(self.enclave.mrenclave.hex(),), allow_simulated=True)
        return made.with_trust_anchor(self.platform.root_ca())

    def verification(self, seconds: float = 1.0) -> float:
        """Milliseconds of one verification and appraisal on one core, as the service does it."""
        rules = Rules((Rule("bench", 1, "toml", self.policy_object()),), None, References(), "")
        pieces = []
        for _ in range(16):
            data, quote = self.evidence(base64.b64encode(os.urandom(32)).decode())
            pieces.append(Evidence("sgx-sim", quote, self.collateral, data))
        spent, deadline = [], time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            for evidence in pieces:
                started = time.thread_time()
                assert decide.judge(evidence, rules, nonce=None, now=int(time.time())).accepted
                spent.append(time.thread_time() - started)
        return statistics.median(spent) * 1000


@contextmanager
def service(
    base: Path, url: str, workers: int, threads: int, attester: Attester
) -> Iterator[tuple[int, str, int, Path]]:
    """A running verdictd: its process, host, port and certificate."""
    file = base / "verdictd.toml"
    command = [sys.executable, "-c", "from inclavare.cli import main; main()", "verdictd"]
    file.write_text(
        f'listen = "127.0.0.1:0"\nstate_dir = "{base}/verdictd"\nworkers = {workers}\n'
        f'[store]\nurl = "{url}"\n[attestation]\nnonce_life = "2h"\nthreads = {threads}\n'
        '[telemetry]\nlevel = "warning"\n'
        '[limits]\nclient_requests = 1000000000\nconnection_life = "1h"\nverifications = 1024\n'
        "[tenants]\nrequests = 1000000000\n"
    )
    subprocess.run([*command, "init", "-c", str(file), "--json"], check=True, stdout=subprocess.DEVNULL)
    config = VerdictConfig.load(file)
    with open_store(config) as store:
        store.policies.put("default", "bench", "toml", attester.policy())
        store.policies.set_default("default", "bench")
        store.secrets.put("default", "bench/key/1", SECRET)
    process = subprocess.Popen([*command, "serve", "-c", str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        host, _, port = process.stdout.readline().strip().removeprefix("listening on https://").rpartition(":")
        yield process.pid, host, int(port), config.certificate
    finally:
        process.terminate()
        process.wait()


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL of its own, with its defaults: it waits for the disk."""
    binaries = Path(sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1])
    directory = Path(tempfile.mkdtemp(prefix="bench-pg"))
    user, prefix = pwd.getpwuid(os.geteuid()).pw_name, []
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(directory, owner.pw_uid, owner.pw_gid)
        user, prefix = "postgres", ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]

    def run(program: str, *arguments: str) -> None:
        subprocess.run([*prefix, str(binaries / program), *arguments], check=True, stdout=subprocess.DEVNULL)

    data = str(directory / "data")
    run("initdb", "-D", data, "-A", "trust", "-E", "UTF8", "--locale=C")
    options = f"-c listen_addresses= -c unix_socket_directories={directory}"
    run("pg_ctl", "-w", "-D", data, "-l", str(directory / "log"), "-o", options, "start")
    try:
        run("createdb", "-h", str(directory), "verdict")
        yield f"postgresql://{user}@/verdict?host={directory}"
    finally:
        run("pg_ctl", "-w", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(directory, ignore_errors=True)


def cpu_seconds(pid: int) -> float:
    """Of a process and its children, those that have ended too."""
    total, ticks = 0.0, os.sysconf("SC_CLK_TCK")
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    for one in (str(pid), *children):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(") ")[2].split()
            total += sum(map(int, fields[11:15])) / ticks
    return total


def resident(pid: int) -> int:
    """MiB of a process and its children."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (str(pid), *children)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") >> 20


async def begin(host: str, port: int, context: ssl.SSLContext, attester: Attester, count: int) -> list[Session]:
    """Sessions with their evidence."""
    connection = await Connection(host, port, context).open()
    made = []
    for _ in range(count):
        cookie, nonce = await connection.auth()
        made.append(Session(cookie, attester.attestation(nonce)))
    connection.close()
    return made


async def load(
    host: str, port: int, context: ssl.SSLContext, sessions: list[Session], clients: int
) -> tuple[float, list[float], bytes]:
    """Seconds for all releases, those of each, and one answer."""
    connections = await asyncio.gather(*(Connection(host, port, context).open() for _ in range(clients)))
    latencies: list[float] = []
    last = b""
    left = iter(sessions)

    async def client(connection: Connection) -> None:
        nonlocal last
        for session in left:
            started = time.perf_counter()
            last = await connection.release(session)
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    spent = time.perf_counter() - started
    for connection in connections:
        connection.close()
    return spent, latencies, last


def measure(name: str, url: str, attester: Attester, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All numbers of clients with one database."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-verdictd") as base:
        target = url or f"sqlite:///{base}/verdictd/store.db"
        with service(Path(base), target, options.workers, options.threads, attester) as (pid, host, port, certificate):
            context = ssl.create_default_context(cafile=certificate)
            for clients in options.clients:
                count = max(options.releases, 2 * clients)
                sessions = asyncio.run(begin(host, port, context, attester, count))
                before = cpu_seconds(pid)
                spent, latencies, answer = asyncio.run(load(host, port, context, sessions, clients))
                cpu = (cpu_seconds(pid) - before) * 1000 / count
                assert attester.channel.decrypt(json.loads(answer)) == SECRET
                ordered = sorted(latencies)
                rows.append(
                    {
                        "store": name,
                        "clients": clients,
                        "releases": count,
                        "releases_per_second": count / spent,
                        "p50_ms": statistics.median(ordered) * 1000,
                        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
                        "service_cpu_ms": cpu,
                        "resident_mib": resident(pid),
                    }
                )
    return rows


def main() -> int:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--releases", type=int, default=600, help="for each number of clients")
    parser.add_argument("--workers", type=int, default=2, help="processes of the service")
    parser.add_argument("--threads", type=int, default=8, help="threads of each process")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-platform") as base:
        attester = Attester(Path(base))
        verification = attester.verification()
        if "sqlite" in options.store:
            rows += measure("SQLite", "", attester, options)
        if "postgresql" in options.store:
            with postgresql() as url:
                rows += measure("PostgreSQL", url, attester, options)
        attester.enclave.destroy()
    for row in rows:
        row["verification_ms"] = verification
        row["verification_share"] = verification / row["service_cpu_ms"]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"one verification: {verification:.2f} ms of one core; {options.workers} workers")
    print(f"{'':12}{'clients':>8}{'releases/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>8}{'verif.':>8}{'MiB':>6}")
    for row in rows:
        print(
            f"{row['store']:12}{row['clients']:8}{row['releases_per_second']:12.1f}{row['p50_ms']:9.1f}"
            f"{row['p99_ms']:9.1f}{row['service_cpu_ms']:8.2f}{row['verification_share']:8.0%}{row['resident_mib']:6}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

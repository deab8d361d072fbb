"""verdictd on a loopback port, with TLS, for tests."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbs_client import Attester, Client, Key
from small_enclaves import Signers, sign_image, small_image

from inclavare import serving
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform
from inclavare.verdict.app import Application, build
from inclavare.verdict.config import VerdictConfig
from inclavare.verdict.server import http_server
from inclavare.verdict.store import FileKey, Store, migrate

SECRET = b"the key to the data"


@dataclass
class Service:
    """A running service."""

    config: VerdictConfig
    store: Store
    application: Application
    url: str
    platform: SimulatedPlatform
    signers: Signers
    enclaves: dict[Any, SimulatedEnclave] = field(default_factory=dict)

    def enclave(self, content: bytes = b"workload", *, debug: bool = False) -> SimulatedEnclave:
        """A small enclave, loaded once."""
        if (content, debug) not in self.enclaves:
            image = small_image(content, debug=debug)
            signed = sign_image(image, self.signers.ours).to_bytes()
            self.enclaves[content, debug] = self.platform.load(image, signed, label="kbs")
        return self.enclaves[content, debug]

    def attester(self, content: bytes = b"workload", *, debug: bool = False) -> Attester:
        """What makes this enclave's evidence."""
        enclave = self.enclave(content, debug=debug)

        def attest(report_data: bytes) -> dict[str, Any]:
            quote = self.platform.quote(enclave.report(self.platform.quote_target_info(), report_data))
            return {"quote": base64.b64encode(quote).decode(), "collateral": self.platform.collateral()}

        return attest

    def client(self, content: bytes = b"workload", *, key: Key | None = None, **fields: Any) -> Client:
        """A client in this enclave."""
        attester = fields.pop("attester", None) or self.attester(content, debug=fields.pop("debug", False))
        return Client(self.url, str(self.config.certificate), attester, key=key or Key(), **fields)

    def policy(self, content: bytes = b"workload", **keys: Any) -> str:
        """TOML that accepts this enclave, and this platform."""
        values = {
            "mrenclave": [self.enclave(content).mrenclave.hex()],
            "simulated": "allow",
            "trust_anchor": ssl.DER_cert_to_PEM_cert(self.root_ca()),
            **keys,
        }
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)

    def root_ca(self) -> bytes:
        """DER."""
        found = self.platform.root_ca()
        return ssl.PEM_cert_to_DER_cert(found.decode()) if found.startswith(b"-----") else found

    def default_policy(self, text: str, *, tenant: str = "default", kind: Any = "toml", id: str | None = None) -> None:
        """Make a policy the tenant's default, at once."""
        name = id or f"default-{kind}"
        self.store.policies.put(tenant, name, kind, text)
        self.store.policies.set_default(tenant, name)
        self.forget()

    def forget(self) -> None:
        """What the service has cached of policies and reference values."""
        book = self.application.decider._book
        book._rules.clear()
        book._named.clear()

    def last_decision(self, tenant: str = "default") -> Any:
        return self.store.audit.entries(tenant, newest_first=True, limit=1)[0]


def _toml(value: Any) -> str:
    import json

    return f'"""{value}"""' if isinstance(value, str) and "\n" in value else json.dumps(value)


def make_config(directory: Path, text: str = "") -> VerdictConfig:
    """A configuration below a directory, with a certificate."""
    serving.own_certificate(directory, (), common_name="verdictd")
    return VerdictConfig.parse(f'listen = "127.0.0.1:0"\nstate_dir = "{directory}"\n' + text)


def make_store(config: VerdictConfig) -> Store:
    url = config.store_url()
    migrate(url)
    if not config.master_key_file.exists():
        FileKey.create(config.master_key_file)
    return Store.open(url, FileKey.load(config.master_key_file))


@contextmanager
def running(config: VerdictConfig, store: Store, platform: SimulatedPlatform, signers: Signers) -> Iterator[Service]:
    """Serve until the end of the ``with`` statement."""
    application = build(config, store)
    server = http_server(config, application)
    listening = serving.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Service(config, store, application, f"https://127.0.0.1:{listening.getsockname()[1]}", platform, signers)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        application.close()
        listening.close()

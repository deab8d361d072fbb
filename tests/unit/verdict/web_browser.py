"""A verdictd with something to look at, and a real browser to look with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from small_enclaves import Signers
from verdict_service import SECRET, Service, make_config, make_store, running

from inclavare.attestation.references import Subject, sign, statement
from inclavare.attestation.signers import KeySigner
from inclavare.config import Config
from inclavare.tee.sgx_sim import create
from inclavare.verdict import auth

CHROMIUM = Path("/usr/bin/chromium")
IMAGE = "registry.example/shop:1.4"


@dataclass
class Site:
    """A running service with one accepted and one refused workload."""

    service: Service
    refused: int
    found: str
    expected: str

    def address(self, where: str) -> str:
        """A page of the tenant's; ``refused`` is the refused workload's."""
        path = f"workloads/{self.refused}" if where == "refused" else where
        return f"{self.service.url}/tenants/default/{path}"

    def token(self, role: Any = "auditor") -> str:
        return auth.issue(self.service.store, "default", "alice", role, 600)[1]


@contextmanager
def shown(directory: Path) -> Iterator[Site]:
    """Serve it."""
    node = Config(state_dir=directory / "s", run_dir=directory / "r", log_dir=directory / "l", epc_size=64 << 20)
    platform = create(node)
    signers = Signers(*(rsa.generate_private_key(public_exponent=3, key_size=3072) for _ in range(2)))
    config = make_config(directory)
    with make_store(config) as store:
        store.tenants.create("default")
        with running(config, store, platform, signers) as service:
            yield _filled(service)


def _filled(service: Service) -> Site:
    store = service.store
    builder = KeySigner(ec.generate_private_key(ec.SECP256R1()))
    store.references.trust("default", "release-team", builder.public_pem().decode())
    now = int(time.time())
    for image, content, days in ((IMAGE, b"workload", 90), ("registry.example/shop:1.3", b"older", 30)):
        made = statement(
            [Subject(image, (("sha256", "5e" * 32),))],
            [(["sgx-sim"], {"mrenclave": service.enclave(content).mrenclave.hex(), "isv_svn": 0})],
            not_before=now - 86400,
            not_after=now + days * 86400,
        )
        info = store.references.register("default", sign(made, builder), image=image, by="token_release")
    store.references.revoke("default", info.digest, "replaced: CVE-2026-1234")
    service.default_policy(service.policy(mrenclave=None, image=IMAGE), id="shop")
    store.secrets.put("default", "shop/key/orders", SECRET)
    store.secrets.put("default", "shop/tls/server", b"-", release_once=True)
    client = service.client()
    client.handshake()
    assert client.get("shop/key/orders") == SECRET
    other = service.client(b"tampered")
    other.auth()
    assert other.attest().status == 401
    found, expected = (service.enclave(content).mrenclave.hex() for content in (b"tampered", b"workload"))
    return Site(service, int(service.last_decision().seq), found, expected)


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def page_of(
    chromium: Any, site: Site, *, width: int = 1100, height: int = 800, dark: bool = False, signed_in: bool = True
) -> Iterator[Any]:
    """A page in a fresh session. The certificate is self-made, so it is not checked here."""
    scheme = "dark" if dark else "light"
    context = chromium.new_context(
        ignore_https_errors=True, viewport={"width": width, "height": height}, color_scheme=scheme
    )
    try:
        page = context.new_page()
        page.goto(f"{site.service.url}/")
        if signed_in:
            page.get_by_label("Access token").fill(site.token())
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{site.service.url}/")
        yield page
    finally:
        context.close()

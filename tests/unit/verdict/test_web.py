"""The web page: who sees what, what was written by others, and what browsers are told."""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from verdict_service import SECRET, Service

from inclavare.attestation.references import Subject, sign, statement
from inclavare.attestation.signers import KeySigner
from inclavare.verdict import auth
from inclavare.verdict.store import SYSTEM
from inclavare.verdict.web.site import COOKIE

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
TEXT_FIELDS = ("text/html; charset=utf-8", "default-src 'none'")
PARTS = ("workloads", "policies", "references", "secrets", "audit")


class Page(HTMLParser):
    """What of a page the tests look at; tags that are not closed are noticed."""

    _VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        return [attrs["href"] or "" for tag, attrs in self.tags if tag == "a"]


class Browser:
    """Just enough of one: a cookie, and HTTPS."""

    def __init__(self, service: Service) -> None:
        parts = urlsplit(service.url)
        context = ssl.create_default_context(cafile=str(service.config.certificate))
        self._connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=30)
        self.cookie: str | None = None
        self.host = parts.netloc

    def request(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, str]:
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        if self.cookie is not None:
            sent["Cookie"] = f"{COOKIE}={self.cookie}"
        if body is not None:
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        self._connection.request(method, path, body, sent)
        response = self._connection.getresponse()
        return response, response.read().decode()

    def sign_in(self, token: str, **headers: str) -> http.client.HTTPResponse:
        response, _ = self.request("POST", "/sign-in", urlencode({"token": token}), **headers)
        cookie = response.getheader("Set-Cookie")
        if response.status == 303 and cookie:
            self.cookie = cookie.partition("=")[2].partition(";")[0]
        return response

    def page(self, path: str, status: int = 200) -> Page:
        response, text = self.request("GET", path)
        assert response.status == status, (path, response.status, text)
        assert response.getheader("Content-Type") == "text/html; charset=utf-8"
        return Page(text)


def token(service: Service, tenant: str = "default", role: str = "auditor", name: str = "eve") -> str:
    return auth.issue(service.store, tenant, name, role, 600)[1]  # type: ignore[arg-type]


@pytest.fixture
def browser(service: Service) -> Browser:
    """Signed in as an auditor of the tenant ``default``."""
    made = Browser(service)
    assert made.sign_in(token(service)).status == 303
    return made


@pytest.fixture
def signer(service: Service) -> Iterator[KeySigner]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = KeySigner(Ed25519PrivateKey.generate())
    service.store.references.trust("default", "builder", made.public_pem().decode())
    yield made
    service.store.references.distrust("default", "builder")
    service.forget()


def registered(service: Service, signer: KeySigner, content: bytes = b"workload", image: str = "registry/app") -> str:
    now = int(time.time())
    made = statement(
        [Subject(image, (("sha256", "00" * 32),))],
        [(["sgx-sim"], {"mrenclave": service.enclave(content).mrenclave.hex()})],
        not_before=now - 86400 - len(content),
        not_after=now + 86400 + time.monotonic_ns() % 100_000,
    )
    return str(service.store.references.register("default", sign(made, signer), image=image).digest)


def refused(service: Service, content: bytes = b"another") -> int:
    client = service.client(content)
    client.auth()
    assert client.attest().status == 401
    return int(service.last_decision().seq)


# --- who


def test_nothing_is_shown_to_who_is_not_signed_in(service: Service) -> None:
    browser = Browser(service)
    for path in ("/", "/tenants/default", *(f"/tenants/default/{part}" for part in PARTS), "/tenants/nobody", "/x"):
        response, text = browser.request("GET", path)
        assert (response.status, response.getheader("Location"), text) == (303, "/sign-in", ""), path
    assert browser.page("/sign-in").text.count("Sign in") >= 2


def test_signing_in_and_out(service: Service) -> None:
    browser = Browser(service)
    response = browser.sign_in(token(service))
    assert response.status == 303
    attributes = {part.strip() for part in (response.getheader("Set-Cookie") or "").split(";")[1:]}
    assert attributes == {"Path=/", "Max-Age=28800", "Secure", "HttpOnly", "SameSite=Strict"}
    assert COOKIE.startswith("__Host-")
    entry = service.last_decision()
    assert (entry.action, entry.actor, entry.decision) == ("web.sign_in", "token:eve", "allowed")
    assert "token:eve" in browser.page("/").text
    response, _ = browser.request("POST", "/sign-out", "")
    assert "Max-Age=0" in (response.getheader("Set-Cookie") or "")


@pytest.mark.parametrize("wrong", ["", "x", "eyJhbGciOiJub25lIn0.e30.", "a" * 5000, "ä", 'a"b', "a;b=c", ATTACK])
def test_a_wrong_token_is_refused_and_not_repeated(service: Service, wrong: str) -> None:
    browser = Browser(service)
    response, text = browser.request("POST", "/sign-in", urlencode({"token": wrong}))
    assert response.status == 401
    assert response.getheader("Set-Cookie") is None
    assert 'role="alert"' in text
    assert len(wrong) < 3 or wrong not in text
    Page(text)


def test_a_revoked_token_ends_the_session(service: Service) -> None:
    info, made = auth.issue(service.store, "default", "gone", "auditor", 600)
    browser = Browser(service)
    browser.sign_in(made)
    browser.page("/tenants/default/audit")
    service.store.tokens.revoke("default", info.jti)
    response, _ = browser.request("GET", "/tenants/default/audit")
    assert response.status == 303


def test_another_tenant_cannot_be_told_from_none(service: Service, browser: Browser) -> None:
    for part in ("", *(f"/{part}" for part in PARTS), "/workloads/1", "/secrets/a/b/c", "/policies/x"):
        answers = {browser.page(f"/tenants/{name}{part}", 403).source for name in ("other", "nobody", SYSTEM)}
        assert len({re.sub("other|nobody|_system", "", text) for text in answers}) == 1
    assert browser.page("/").links().count("/tenants/default") == 1
    assert "other" not in browser.page("/").text


def test_who_may_see_all_tenants_sees_the_services_own_trail(service: Service) -> None:
    browser = Browser(service)
    browser.sign_in(token(service, SYSTEM))
    links = browser.page("/").links()
    assert {"/tenants/default", "/tenants/other", "/tenants/_system"} <= set(links)
    assert "web.sign_in" in browser.page("/tenants/_system").text
    browser.page("/tenants/_system/secrets", 404)
    browser.page("/tenants/nobody/secrets", 200)  # a name that is free looks like a tenant without anything


def test_forms_of_other_sites_do_nothing(service: Service, browser: Browser) -> None:
    good = token(service)
    stranger = Browser(service)
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        assert stranger.sign_in(good, **headers).status == 403
        assert browser.request("POST", "/sign-out", "", **headers)[0].status == 403
    assert stranger.sign_in(good, Origin=f"https://{stranger.host}").status == 303
    assert stranger.sign_in(good, Sec_Fetch_Site="same-origin").status == 303


def test_the_page_only_reads(service: Service, browser: Browser) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        response, _ = browser.request(method, "/tenants/default/policies", "")
        assert (response.status, response.getheader("Allow")) == (405, "GET, HEAD")
    before = service.last_decision().seq
    for part in PARTS:
        browser.page(f"/tenants/default/{part}")
    assert service.last_decision().seq == before


def test_the_apis_do_not_take_the_cookie(service: Service, browser: Browser) -> None:
    for path in ("/api/v1/tenants/default/secrets", "/kbs/v0/resource/app/key/1"):
        assert browser.request("GET", path)[0].status == 401


# --- what


def test_a_refused_workload_with_each_claim_beside_its_reference_value(
    service: Service, browser: Browser, signer: KeySigner
) -> None:
    digest = registered(service, signer)
    service.default_policy(service.policy(mrenclave=None, image="registry/app"))
    seq = refused(service)
    found, expected = (service.enclave(content).mrenclave.hex() for content in (b"another", b"workload"))
    overview = browser.page("/tenants/default/workloads")
    assert "refused" in overview.text
    assert "mrenclave" in overview.text
    assert found[:16] in overview.text
    detail = browser.page(f"/tenants/default/workloads/{seq}")
    assert {found, expected} <= set(re.findall("[0-9a-f]{64}", detail.text))
    assert "policy.reference.mrenclave" in detail.text
    assert f"/tenants/default/references/{digest}" in detail.links()
    assert any(link.startswith("/tenants/default/policies/default-toml?version=") for link in detail.links())
    assert browser.page(f"/tenants/default/references/{digest}").text.count(expected) == 1


def test_an_accepted_workload_and_its_releases(service: Service, browser: Browser, signer: KeySigner) -> None:
    digest = registered(service, signer)
    service.default_policy(service.policy(mrenclave=None, image="registry/app"))
    client = service.client()
    client.handshake()
    seq = service.last_decision().seq
    assert client.get("app/key/1") == SECRET
    detail = browser.page(f"/tenants/default/workloads/{seq}")
    assert "Workload, accepted" in detail.text
    assert f"/tenants/default/references/{digest}" in detail.links()
    assert "Why it was refused" not in detail.text
    listed = browser.page("/tenants/default/secrets")
    assert re.search(r"app/key/1.*?\b[1-9][0-9]* times", listed.text, re.DOTALL)
    single = browser.page("/tenants/default/secrets/app/key/1")
    assert f"/tenants/default/workloads/{service.last_decision().seq}" in single.links()
    browser.page(f"/tenants/default/workloads/{service.last_decision().seq}")


def test_no_page_has_a_secrets_value(service: Service, browser: Browser) -> None:
    value = b"never-on-a-page-4711"
    service.store.secrets.put("default", "app/key/2", value)
    service.client().handshake()
    seen, waiting = set(), ["/"]
    while waiting and len(seen) < 150:
        path = waiting.pop()
        seen.add(path)
        page = browser.page(path)
        for form in (value, SECRET, value.hex().encode(), SECRET.hex().encode()):
            assert form.decode() not in page.source
        links = {re.sub(r"(\?before|workloads/).*", "", link) for link in page.links() if link.startswith("/")}
        waiting += [link for link in links if link not in seen and link not in waiting]
    assert {f"/tenants/default/{part}" for part in PARTS} <= seen


def test_revoked_expired_and_unsigned_bundles_say_so(service: Service, browser: Browser, signer: KeySigner) -> None:
    digest = registered(service, signer, b"revoked")
    service.store.references.revoke("default", digest, "stolen key")
    page = browser.page("/tenants/default/references")
    assert "revoked" in page.text
    assert "stolen key" in page.text
    unsigned = service.store.references.register("default", b"no bundle", image="unsigned").digest
    assert "it does not count" in browser.page(f"/tenants/default/references/{unsigned}").text


def test_policies_and_their_versions(service: Service, browser: Browser) -> None:
    service.store.policies.put("default", "shown", "toml", "# first\n", author="alice")
    service.store.policies.put("default", "shown", "toml", "# second <b>\n")
    assert "/tenants/default/policies/shown" in browser.page("/tenants/default/policies").links()
    page = browser.page("/tenants/default/policies/shown")
    assert "# second <b>" in page.text
    assert "<b>" not in page.source
    older = browser.page("/tenants/default/policies/shown?version=1")
    assert "# first" in older.text
    assert "replaced by version 2" in older.text
    browser.page("/tenants/default/policies/shown?version=9", 404)
    browser.page("/tenants/default/policies/shown?version=x", 400)


def test_the_audit_trail_is_paged_and_verified(service: Service, browser: Browser) -> None:
    for number in range(60):
        service.store.audit.append("default", "token:test", "test.page", "done", {"number": number})
    page = browser.page("/tenants/default/audit?decision=done")
    assert page.text.count("test.page") == 50
    older = next(attrs["href"] for tag, attrs in page.tags if attrs.get("rel") == "next")
    second = browser.page(f"/tenants/default/audit{older}")
    assert second.text.count("test.page") >= 10
    assert "nothing was changed" in browser.page("/tenants/default/audit?verify=1").text
    browser.page("/tenants/default/audit?before=-1", 400)


def test_a_damaged_chain_is_told(service: Service, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from inclavare.verdict.store import audit

    service.store.audit.append("default", "token:test", "test.damage", "done", {})
    honest = audit._entry

    def other(row: Any) -> Any:
        entry = honest(row)
        return replace(entry, actor="token:mallory") if entry.action == "test.damage" else entry

    monkeypatch.setattr(audit, "_entry", other)
    page = browser.page("/tenants/default/audit?verify=1")
    assert "The chain is damaged" in page.text
    assert "verdict.store.audit.changed" in page.text


# --- what others wrote


def test_what_others_wrote_does_nothing(service: Service, browser: Browser) -> None:
    store = service.store
    detail: dict[str, Any] = {
        "tee": ATTACK,
        "peer": ATTACK,
        "evidence": ATTACK,
        "policies": [ATTACK, f"{ATTACK}@1", 7],
        "references": [ATTACK],
        "resource": f"resource/{ATTACK}",
        "reasons": [dict.fromkeys(("id", "claim", "found", "expected", "remedy", "reference"), ATTACK)],
        "claims": {ATTACK: ATTACK, "mrenclave": ATTACK, "tdx": {ATTACK: [ATTACK]}, "advisories": [ATTACK, None]},
    }
    entry = store.audit.append("default", f"tee:{ATTACK}", "kbs.attest", "denied", detail)
    store.audit.append("default", ATTACK, "kbs.release", "denied", {**detail, "resource": "resource/app/key/1"})
    store.policies.put("default", "attack", "toml", ATTACK)
    store.secrets.put("default", "app/key/1", SECRET, metadata={"note": ATTACK})
    digest = store.references.register("default", ATTACK.encode(), image=ATTACK, metadata={"x": ATTACK}).digest
    store.references.revoke("default", digest, ATTACK)
    paths = [f"/tenants/default/{part}" for part in PARTS]
    paths += [f"workloads/{entry.seq}", "policies/attack", f"references/{digest}", "secrets/app/key/1"]
    hostile = 0
    for path in paths:
        page = browser.page(path if path.startswith("/") else f"/tenants/default/{path}")
        assert not {"script", "img", "iframe", "object", "style", "base"} & {tag for tag, _ in page.tags}
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "style"]
        assert all(link.startswith(("/", "?", "#")) and not link.startswith("//") for link in page.links())
        hostile += ATTACK in page.text
    assert hostile >= 7


def test_letters_that_turn_the_line_are_shown(service: Service, browser: Browser) -> None:
    entry = service.store.audit.append(
        "default",
        "tee:00",
        "kbs.attest",
        "denied",
        {"tee": "sgx", "reasons": [{"id": "x", "claim": "a\u202eb\x00\x1b[31m"}]},
    )
    page = browser.page(f"/tenants/default/workloads/{entry.seq}")
    assert "a\\u202eb\\x00\\x1b[31m" in page.text
    assert not {"\u202e", "\x00", "\x1b"} & set(browser.page("/tenants/default/audit").source)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/tenants/default/workloads/0", 404),
        ("/tenants/default/workloads/999999999999999", 404),
        ("/tenants/default/workloads/x", 400),
        ("/tenants/default/secrets/..%2f..%2f", 404),
        ("/tenants/default/secrets/a", 404),
        ("/tenants/default/references/zz", 404),
        ("/tenants/default/policies/%00", 404),
        ("/tenants/%2e%2e/secrets", 404),
        ("/tenants/default/audit?before=9999999999999999999999", 400),
        ("/tenants/default/audit?" + "a=b&" * 40, 400),
        ("/templates/base.html", 404),
        ("/style.css/../site.py", 404),
    ],
)
def test_strange_addresses(browser: Browser, path: str, status: int) -> None:
    browser.page(path, status)


# --- browsers


def test_headers(service: Service, browser: Browser) -> None:
    for path in ("/", "/sign-in", "/tenants/default/audit", "/tenants/other", "/style.css", "/icon.svg"):
        response, _ = browser.request("GET", path)
        policy = response.getheader("Content-Security-Policy") or ""
        assert policy.startswith("default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Referrer-Policy") == "same-origin"
        assert response.getheader("Strict-Transport-Security")
        assert response.getheader("Cache-Control") == ("max-age=3600" if "." in path else "no-store")


def test_every_page_is_accessible(service: Service, browser: Browser, signer: KeySigner) -> None:
    digest = registered(service, signer, b"accessible")
    seq = refused(service)
    paths = ["/", "/sign-in", *(f"/tenants/default/{part}" for part in PARTS), "/tenants/default/audit?verify=1"]
    paths += [f"/tenants/default/workloads/{seq}", f"/tenants/default/references/{digest}"]
    paths += ["/tenants/default/secrets/app/key/1", "/tenants/default/policies/default-toml"]
    for path in paths:
        page = (Browser(service) if path == "/sign-in" else browser).page(path)
        tags = [tag for tag, _ in page.tags]
        assert ("html", {"lang": "en"}) in page.tags
        assert [tags.count(tag) for tag in ("main", "header", "footer", "h1", "title")] == [1] * 5
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        labelled = {attrs.get("for") for tag, attrs in page.tags if tag == "label"}
        for tag, attrs in page.tags:
            if tag == "input" and attrs.get("type") != "hidden":
                assert attrs["id"] in labelled
            if tag == "th":
                assert attrs["scope"] in ("col", "row")
        assert tags.count("table") == tags.count("caption") == tags.count("thead")
        assert "#main" in page.links()


def test_a_page_is_quick(service: Service, browser: Browser) -> None:
    for number in range(60):
        service.store.audit.append("default", "tee:00", "kbs.attest", "allowed", {"tee": "sgx", "n": number})
    browser.page("/tenants/default/workloads")
    times = []
    for _ in range(10):
        began = time.perf_counter()
        browser.page("/tenants/default/workloads")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.25

"""Collateral as Intel's services send it, over HTTP, until the verifier is content with a real quote."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote as encode

import pytest

from inclavare.attestation import Evidence, Policy, verify
from inclavare.errors import PlatformError
from inclavare.tee.sgx import pccs

#: The collateral in the vectors was valid then.
NOW = 1752919278


class Service:
    """A collateral service; ``answers`` maps path and query to body and headers."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                found = outer.answers.get(self.path)
                self.send_response(404 if found is None else 200)
                for name, value in (found or (b"", {}))[1].items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write((found or (b"", {}))[0])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/sgx/certification/v4/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def known(vectors: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((vectors / "collateral/phala_sgx_quote_collateral.json").read_text())
    return found


@pytest.fixture
def quote(vectors: Path) -> bytes:
    return (vectors / "sgx/phala_sgx_quote.bin").read_bytes()


@pytest.fixture
def service(known: dict[str, str]) -> Iterator[Service]:
    """As Intel's PCCS answers: CRLs in hexadecimal, chains in percent-encoding."""
    made = Service()
    base = "/sgx/certification/v4/"
    made.answers = {
        f"{base}pckcrl?ca=processor&encoding=der": (
            known["pck_crl"].encode(),
            {"SGX-PCK-CRL-Issuer-Chain": encode(known["pck_crl_issuer_chain"])},
        ),
        f"{base}tcb?fmspc=00a067110000": (
            f'{{"tcbInfo":{known["tcb_info"]},"signature":"{known["tcb_info_signature"]}"}}'.encode(),
            {"TCB-Info-Issuer-Chain": encode(known["tcb_info_issuer_chain"])},
        ),
        f"{base}qe/identity": (
            f'{{"signature": "{known["qe_identity_signature"]}",\n "enclaveIdentity" :  {known["qe_identity"]} }}'.encode(),
            {"SGX-Enclave-Identity-Issuer-Chain": encode(known["qe_identity_issuer_chain"])},
        ),
        f"{base}rootcacrl": (known["root_ca_crl"].encode(), {}),
    }
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_is_fetched_verifies_a_real_quote(service: Service, known: dict[str, str], quote: bytes) -> None:
    found = pccs.collateral(service.url, quote)
    assert found == known
    assert len(service.asked) == 4
    evidence = Evidence.from_quote(quote, found)
    policy = Policy(any_enclave=True, tcb=("ConfigurationAndSWHardeningNeeded",))
    assert verify(evidence, policy, now=NOW).accepted


def test_the_signed_text_stays_as_it_came(service: Service, quote: bytes, known: dict[str, str]) -> None:
    """Re-serialising would break the signature: a space in it has to survive."""
    spaced = known["tcb_info"].replace(":", ": ", 1)
    place = "/sgx/certification/v4/tcb?fmspc=00a067110000"
    service.answers[place] = f'{{"tcbInfo":{spaced},"signature":"00ff"}}'.encode(), service.answers[place][1]
    assert pccs.collateral(service.url, quote)["tcb_info"] == spaced


def test_intels_own_service(
    service: Service, known: dict[str, str], quote: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends CRLs in DER, has the root's CRL elsewhere, and the older API names a header otherwise."""
    base = "/sgx/certification/v4/"
    crl, tcb = f"{base}pckcrl?ca=processor&encoding=der", f"{base}tcb?fmspc=00a067110000"
    service.answers[crl] = bytes.fromhex(known["pck_crl"]), service.answers[crl][1]
    service.answers[tcb] = (
        service.answers[tcb][0],
        {"SGX-TCB-Info-Issuer-Chain": encode(known["tcb_info_issuer_chain"])},
    )
    del service.answers[f"{base}rootcacrl"]
    service.answers["/root.der"] = bytes.fromhex(known["root_ca_crl"]), {}
    monkeypatch.setattr(pccs, "ROOT_CRL", service.url.replace(base, "/root.der"))
    assert pccs.collateral(service.url, quote) == known


def refused(call: Callable[[], Any], *, found: str) -> None:
    with pytest.raises(PlatformError) as caught:
        call()
    assert caught.value.id == "tee.sgx.pccs" and "sgx_default_qcnl.conf" in str(caught.value.remedy)
    assert found in str(caught.value.found)


@pytest.mark.parametrize(
    ("path", "answer", "found"),
    [
        ("qe/identity", None, "HTTP status 404"),
        ("qe/identity", (b"{}", {}), "enclaveIdentity is malformed"),
        ("qe/identity", (b'{"enclaveIdentity":{},"signature":"xy"}', {}), "enclaveIdentity is malformed"),
        ("qe/identity", (b'{"enclaveIdentity":{},"signature":7}', {}), "enclaveIdentity is malformed"),
        ("qe/identity", (b'{"enclaveIdentity":{},"signature":"00"}', {}), "SGX-Enclave-Identity-Issuer-Chain"),
        ("tcb?fmspc=00a067110000", (b"\xff", {}), "tcbInfo is malformed"),
    ],
)
def test_a_service_that_lacks_something(
    service: Service, quote: bytes, path: str, answer: tuple[bytes, dict[str, str]] | None, found: str
) -> None:
    if answer is None:
        del service.answers["/sgx/certification/v4/" + path]
    else:
        service.answers["/sgx/certification/v4/" + path] = answer
    refused(lambda: pccs.collateral(service.url, quote), found=found)


def test_an_answer_without_end(service: Service, quote: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pccs, "MAX_ANSWER", 100)
    refused(lambda: pccs.collateral(service.url, quote), found="more than 100 bytes")


def test_no_service_and_no_quote(quote: bytes) -> None:
    refused(lambda: pccs.collateral("http://127.0.0.1:9/sgx/certification/v4/", quote), found="refused")
    refused(lambda: pccs.collateral("http://127.0.0.1:9/", b"no quote"), found="no PCK certificate")


V4 = "https://pccs.example/sgx/certification/v4/"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  // comment\n  "pccs_url": "URL",\n  "use_secure_cert": false}', (V4, False)),
        ('{"pccs_url": "https://pccs.example/sgx/certification/v4"}', (V4, True)),
        ('{"pccs_url": "https://a/x/", "collateral_service": "URL"}', (V4, True)),
        ("# comment\nPCCS_URL=URL\nUSE_SECURE_CERT=FALSE\n", (V4, False)),
        ("PCCS_URL=URL\n", (V4, True)),
    ],
)
def test_the_quote_providers_configuration(tmp_path: Path, text: str, expected: tuple[str, bool]) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / pccs.CONFIGURATION).write_text(text.replace("=URL", f"={V4}").replace('"URL"', f'"{V4}"'))
    assert pccs.service(tmp_path) == expected


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pccs_url": "file:///etc/passwd"}', '{"pccs_url": 7}', "nonsense"])
def test_no_pccs_is_configured(tmp_path: Path, text: str) -> None:
    refused(lambda: pccs.service(tmp_path), found="No such file")
    (tmp_path / "etc").mkdir()
    (tmp_path / pccs.CONFIGURATION).write_text(text)
    refused(lambda: pccs.service(tmp_path), found="names no pccs_url")

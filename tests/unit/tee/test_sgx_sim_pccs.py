"""The collateral service, asked by dcap-qvl's own client, as Intel's quote provider library asks, and wrongly."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import dcap_qvl
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from small_enclaves import Signers, sign_image, small_image

from inclavare.attestation import Evidence, Policy, verify
from inclavare.config import Config
from inclavare.errors import UsageError
from inclavare.sgx.certification import CERT_PPID_RSA3072, PckIdentifier
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx import pccs as client
from inclavare.tee.sgx_sim import SimulatedPlatform, create, fuses, life, pccs

SGX, TDX = "/sgx/certification/v4", "/tdx/certification/v4"
FMSPC = fuses.FMSPC.hex()
NEWER = bytes((3, 2, 2, 2, 2, 1)) + bytes(10)


@contextmanager
def serving(config: Config, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The service in this process, on a port of its own."""
    listening = pccs.listen("127.0.0.1", 0, plain=tls is None)
    server = pccs.server(config, tls)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Config:
    base = tmp_path_factory.mktemp("pccs")
    return Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=4 << 20)


@pytest.fixture(scope="module")
def sim(node: Config) -> SimulatedPlatform:
    return create(node)


@pytest.fixture(scope="module")
def quote(sim: SimulatedPlatform, signers: Signers) -> bytes:
    image = small_image(b"served")
    enclave = sim.load(image, sign_image(image, signers.ours).to_bytes(), label="served")
    made = sim.quote(enclave.report(sim.quote_target_info(), bytes(64)))
    enclave.destroy()
    return made


@pytest.fixture(scope="module")
def url(node: Config, sim: SimulatedPlatform) -> Iterator[str]:
    sim.td_collateral()
    with serving(node) as place:
        yield place


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False) as made:
        yield made


def fetched(url: str, quote: bytes) -> dcap_qvl.QuoteCollateralV3:
    """What dcap-qvl's own client makes of the service."""

    async def fetch() -> dcap_qvl.QuoteCollateralV3:
        return await dcap_qvl.get_collateral(url, quote)

    return asyncio.run(fetch())


# dcap-qvl's client


def test_dcap_qvls_client_gets_collateral_that_verifies(url: str, sim: SimulatedPlatform, quote: bytes) -> None:
    found = fetched(url, quote)
    assert dcap_qvl.verify_with_root_ca(quote, found, sim.root_ca(), int(time.time())).status == "UpToDate"
    ours = sim.collateral()
    assert (found.tcb_info, found.qe_identity) == (ours["tcb_info"], ours["qe_identity"])
    assert (found.pck_crl.hex(), found.root_ca_crl.hex()) == (ours["pck_crl"], ours["root_ca_crl"])
    assert (found.tcb_info_issuer_chain, found.pck_crl_issuer_chain) == (
        ours["tcb_info_issuer_chain"],
        ours["pck_crl_issuer_chain"],
    )


def test_dcap_qvls_client_gets_collateral_for_trust_domains(url: str, sim: SimulatedPlatform) -> None:
    quote = sim.td_quote(bytes(64), b"m" * 48)
    found = fetched(url, quote)
    assert json.loads(found.tcb_info)["id"] == "TDX" and json.loads(found.qe_identity)["id"] == "TD_QE"
    assert dcap_qvl.verify_with_root_ca(quote, found, sim.root_ca(), int(time.time())).status == "UpToDate"


def test_dcap_qvls_client_finds_the_certificate_of_a_quote_without_one(
    url: str, sim: SimulatedPlatform, quote: bytes
) -> None:
    """Certification data of type 3: the client asks for the PCK certificate by QE id, TCB and PCE."""
    whole = Quote.from_bytes(quote)
    cpusvn = sim._session().cpusvn
    identifier = PckIdentifier(ppid=bytes(384), cpusvn=cpusvn, pce_svn=1, pce_id=bytes(2)).to_bytes()
    bare = replace(whole, cert_type=CERT_PPID_RSA3072, cert_data=identifier).to_bytes()
    found = fetched(url, bare)
    assert dcap_qvl.verify_with_root_ca(bare, found, sim.root_ca(), int(time.time())).status == "UpToDate"


def test_the_projects_own_client(url: str, sim: SimulatedPlatform, quote: bytes) -> None:
    """The one that fetches collateral on SGX hardware."""
    collateral = client.collateral(f"{url}{SGX}/", quote)
    assert collateral == sim.collateral()
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(sim.root_ca())
    assert verify(Evidence.from_quote(quote, collateral), policy).accepted


# As Intel's quote provider library asks (its build_*_options), and what it needs in the answers


def test_pck_certificate(http: httpx.Client, sim: SimulatedPlatform, quote: bytes) -> None:
    parsed = Quote.from_bytes(quote)
    qe_id, cpusvn = parsed.header.user_data[:16].hex(), sim._session().cpusvn.hex()
    answer = http.get(f"{SGX}/pckcert?qeid={qe_id}&encrypted_ppid={'0' * 768}&cpusvn={cpusvn}&pcesvn=0100&pceid=0000")
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "application/x-pem-file")
    # The library puts these together to a quote's certification data of type 5.
    chain = answer.text + unquote(answer.headers["SGX-PCK-Certificate-Issuer-Chain"])
    assert chain.encode() == parsed.cert_data
    assert answer.headers["SGX-TCBm"] == cpusvn.upper() + "0100"
    assert answer.headers["SGX-FMSPC"] == FMSPC.upper()
    assert answer.headers["SGX-PCK-Certificate-CA-Type"] == "platform"
    for other in (f"{qe_id}01&pceid=0000", f"{qe_id}&pceid=0100", f"{'00' * 16}&pceid=0000"):
        assert http.get(f"{SGX}/pckcert?cpusvn={cpusvn}&pcesvn=0100&qeid={other}").status_code == 404
    longer = f"{SGX}/pckcert?cpusvn={cpusvn}&pcesvn=0100&pceid=0000&qeid={qe_id}{'00' * 4}"
    assert http.get(longer).status_code == 200, "zero-padded, as in a quote's user data"


def test_a_td_quoting_enclave_gets_the_same_certificate(http: httpx.Client, sim: SimulatedPlatform) -> None:
    quote = Quote.from_bytes(sim.td_quote(bytes(64), b"m" * 48))
    query = f"cpusvn={sim._session().cpusvn.hex()}&pcesvn=0100&pceid=0000"
    answer = http.get(f"{SGX}/pckcert?qeid={quote.header.user_data[:16].hex()}&{query}")
    assert answer.status_code == 200 and answer.text.encode() in quote.cert_data


def test_crls(http: httpx.Client, sim: SimulatedPlatform) -> None:
    ours = sim.collateral()
    answer = http.get(f"{SGX}/pckcrl?ca=platform")
    assert (answer.status_code, answer.text) == (200, ours["pck_crl"]), "in hexadecimal, as the library wants it"
    assert unquote(answer.headers["SGX-PCK-CRL-Issuer-Chain"]) == ours["pck_crl_issuer_chain"]
    answer = http.get(f"{SGX}/pckcrl?ca=PLATFORM&encoding=der")
    assert (answer.content.hex(), answer.headers["content-type"]) == (ours["pck_crl"], "application/pkix-crl")
    answer = http.get(f"{SGX}/pckcrl?ca=platform&encoding=pem")
    assert x509.load_pem_x509_crl(answer.content).public_bytes(Encoding.DER).hex() == ours["pck_crl"]
    answer = http.get(f"{SGX}/rootcacrl")
    assert (answer.status_code, answer.text) == (200, ours["root_ca_crl"])
    (point,) = (
        x509.load_der_x509_certificate(sim.root_ca())
        .extensions.get_extension_for_class(x509.CRLDistributionPoints)
        .value
    )
    answer = http.get(f"{SGX}/crl", params={"uri": point.full_name[0].value})
    assert (answer.status_code, answer.content.hex()) == (200, ours["root_ca_crl"])
    assert http.get(f"{SGX}/crl?uri=https://elsewhere/").status_code == 404
    assert http.get(f"{SGX}/crl").status_code == 400


@pytest.mark.parametrize(("base", "tdx"), [(SGX, False), (TDX, True)])
@pytest.mark.parametrize(
    "query", ["&update=standard", "&update=EARLY", "", "&tcbEvaluationDataNumber=1", "&customParameter=eA%3D%3D"]
)
def test_tcb_info_and_identity(http: httpx.Client, sim: SimulatedPlatform, base: str, tdx: bool, query: str) -> None:
    ours = sim.td_collateral() if tdx else sim.collateral()
    answer = http.get(f"{base}/tcb?fmspc={FMSPC}{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert list(answer.json()) == ["tcbInfo", "signature"]
    assert answer.json()["signature"] == ours["tcb_info_signature"]
    assert f'{{"tcbInfo":{ours["tcb_info"]},' in answer.text, "the signature is over these very bytes"
    assert unquote(answer.headers["TCB-Info-Issuer-Chain"]) == ours["tcb_info_issuer_chain"]
    assert http.get(f"{base}/tcb?fmspc={FMSPC.upper()}{query}").text == answer.text
    answer = http.get(f"{base}/qe/identity?{query[1:]}")
    assert list(answer.json()) == ["enclaveIdentity", "signature"]
    assert f'{{"enclaveIdentity":{ours["qe_identity"]},' in answer.text
    assert unquote(answer.headers["SGX-Enclave-Identity-Issuer-Chain"]) == ours["qe_identity_issuer_chain"]


def test_every_answer_says_what_it_is(http: httpx.Client) -> None:
    for path in (f"{SGX}/rootcacrl", f"{SGX}/tcb", f"{SGX}/no-such", f"{SGX}/pckcrl?ca=processor"):
        answer = http.get(path)
        assert "SIMULATED" in answer.headers["Warning"], path
        assert len(answer.headers["Request-ID"]) == 32
        assert "server" not in answer.headers
    known = http.get(f"{SGX}/rootcacrl", headers={"Request-ID": "0123456789abcdef"})
    assert known.headers["Request-ID"] == "0123456789abcdef"
    odd = http.get(f"{SGX}/rootcacrl", headers={"Request-ID": "a b\t<"})
    assert len(odd.headers["Request-ID"]) == 32


# Wrong questions

PCK = f"qeid={'00' * 16}&cpusvn={'00' * 16}&pcesvn=0100&pceid=0000"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{SGX}/tcb", 400),
        (f"{SGX}/tcb?fmspc=", 400),
        (f"{SGX}/tcb?fmspc={FMSPC[:-1]}", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}00", 400),
        (f"{SGX}/tcb?fmspc={FMSPC[:-1]}g", 400),
        (f"{SGX}/tcb?fmspc={'%20'.join(FMSPC[at : at + 2] for at in range(0, 12, 2))}", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&update=late", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&tcbEvaluationDataNumber=x", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&tcbEvaluationDataNumber=-1", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&tcbEvaluationDataNumber=%D9%A1", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&tcbEvaluationDataNumber=1&update=early", 400),
        (f"{SGX}/tcb?fmspc={FMSPC}&tcbEvaluationDataNumber=99", 404),
        (f"{SGX}/tcb?fmspc=00A067110000", 404),
        (f"{TDX}/tcb?fmspc=00A067110000", 404),
        (f"{SGX}/qe/identity?update=x", 400),
        (f"{TDX}/qe/identity?tcbEvaluationDataNumber=2", 404),
        (f"{SGX}/pckcrl", 400),
        (f"{SGX}/pckcrl?ca=root", 400),
        (f"{SGX}/pckcrl?ca=processor", 404),
        (f"{SGX}/pckcrl?ca=platform&encoding=json", 400),
        (f"{SGX}/pckcert", 400),
        (f"{SGX}/pckcert?{PCK}", 404),
        (f"{SGX}/pckcert?{PCK.replace('pceid=0000', 'pceid=00')}", 400),
        (f"{SGX}/pckcert?{PCK.replace('pcesvn=0100&', '')}", 400),
        (f"{SGX}/pckcert?{PCK.replace('cpusvn=00', 'cpusvn=')}", 400),
        (f"{SGX}/pckcert?{PCK}&encrypted_ppid=00", 400),
        (f"{SGX}/pckcert?{PCK.replace('qeid=00', 'qeid=' + '00' * 130)}", 400),
        (f"{SGX}/qve/identity", 404),
        (f"{SGX}/../../../etc/passwd", 404),
        ("/", 404),
    ],
)
def test_wrong_questions(http: httpx.Client, path: str, status: int) -> None:
    answer = http.get(path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    if status == 400:
        assert answer.text.startswith("Invalid request parameters.")


def test_only_questions_are_answered(http: httpx.Client) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert http.request(method, f"{SGX}/tcb?fmspc={FMSPC}").status_code == 405


def test_of_several_values_the_first_counts(http: httpx.Client) -> None:
    assert http.get(f"{SGX}/tcb?fmspc={FMSPC}&fmspc=00A067110000").status_code == 200
    assert http.get(f"{SGX}/tcb?fmspc=00A067110000&fmspc={FMSPC}").status_code == 404


# Life


def test_what_is_set_is_served_at_once(config: Config, signers: Signers) -> None:
    platform = create(config)
    image = small_image(b"served")
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="served")
    quote = platform.quote(enclave.report(platform.quote_target_info(), bytes(64)))
    enclave.destroy()

    def status(url: str) -> str:
        return dcap_qvl.verify_with_root_ca(quote, fetched(url, quote), platform.root_ca(), int(time.time())).status

    with serving(config) as url:
        assert status(url) == "UpToDate"
        life.set_tcb(config, status="SWHardeningNeeded")
        assert status(url) == "SWHardeningNeeded"
        life.set_tcb(config, status="UpToDate", pck_revoked=True)
        with pytest.raises(ValueError, match=r"(?i)revoked"):
            status(url)
        life.set_tcb(config, pck_revoked=False, cpusvn=NEWER)
        assert status(url) == "OutOfDate"
        # The platform has a certificate for each TCB level; a raw TCB gets the newest that is not above it.
        qe_id = Quote.from_bytes(quote).header.user_data[:16].hex()
        for raw, expected in (
            (NEWER, NEWER),
            (fuses.CPUSVN, fuses.CPUSVN),
            (bytes((9,)) * 16, NEWER),
            (bytes((2, 9, 9, 9, 9, 9)) + bytes(10), fuses.CPUSVN),
            (bytes((9, 1)) + bytes(14), None),
        ):
            answer = httpx.get(
                f"{url}{SGX}/pckcert?qeid={qe_id}&cpusvn={raw.hex()}&pcesvn=FF00&pceid=0000", trust_env=False
            )
            assert answer.status_code == (404 if expected is None else 200)
            if expected is not None:
                assert answer.headers["SGX-TCBm"] == expected.hex().upper() + "0100"
        old = httpx.get(f"{url}{SGX}/pckcert?qeid={qe_id}&cpusvn={NEWER.hex()}&pcesvn=0000&pceid=0000", trust_env=False)
        assert old.status_code == 404, "its PCE is older than any certificate's"


def test_a_damaged_platform_is_an_error_of_the_service(config: Config) -> None:
    create(config).collateral()
    (config.platform_dir / fuses.FILE).write_bytes(b"")
    with serving(config) as url:
        answer = httpx.get(f"{url}{SGX}/rootcacrl", trust_env=False)
    assert answer.status_code == 500 and "tee.fuses.damaged" in answer.text


def test_over_tls(node: Config, sim: SimulatedPlatform, tmp_path: Path) -> None:
    certificate, key = certified(tmp_path)
    with serving(node, pccs.tls_context(certificate, key)) as url:
        trusting = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.get(f"{url}{SGX}/rootcacrl", verify=trusting, trust_env=False)
        assert answer.text == sim.collateral()["root_ca_crl"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}{SGX}/rootcacrl", trust_env=False)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https', 'http')}{SGX}/rootcacrl", trust_env=False)


def test_tls_files_are_checked(tmp_path: Path) -> None:
    certificate, key = certified(tmp_path)
    other = certified(tmp_path / "other")[1]
    for pair in ((certificate, other), (key, certificate), (tmp_path / "none", key)):
        with pytest.raises(UsageError) as caught:
            pccs.tls_context(*pair)
        assert caught.value.id == "serving.tls"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "pccs.example", "localhost.example"])
def test_plain_http_is_for_loopback(host: str) -> None:
    with pytest.raises(UsageError) as caught:
        pccs.listen(host, 0, plain=True)
    assert caught.value.id == "tee.pccs.plain"


def test_an_address_that_is_taken() -> None:
    with pccs.listen("localhost", 0, plain=True) as first:
        with pytest.raises(UsageError) as caught:
            pccs.listen("127.0.0.1", first.getsockname()[1], plain=True)
        assert caught.value.id == "serving.listen"


def certified(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    import ipaddress

    directory.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pccs")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths

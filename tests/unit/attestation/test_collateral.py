"""Where collateral comes from, how long it is kept, and that what is stale, damaged or foreign is never used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import made_snp
import pytest
from attested import Attested, resigned

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation import collateral as sources
from inclavare.attestation.collateral import (
    CachedSource,
    ChainSource,
    Collateral,
    FileSource,
    KdsSource,
    PccsSource,
    PlatformSource,
    check_collateral,
)
from inclavare.config import Config
from inclavare.errors import EvidenceError, InclavareError, PlatformError, UsageError
from inclavare.sgx.certification import CERT_PCK_LEAF, CERT_PPID_PLAIN, CERT_PPID_RSA3072, PckIdentifier
from inclavare.sgx.pck import PckExtension
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import SimulatedPlatform, architectural, provisioning

maker = made_snp.maker
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def cause(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(InclavareError) as caught:
        call(*arguments, **named)
    return caught.value.id


class Counting:
    """A source that counts, and fails where it is told to."""

    def __init__(self, parts: dict[str, str], *, fails: bool = False) -> None:
        self.parts, self.fails, self.asked = parts, fails, 0

    def fetch(self, quote: bytes) -> Collateral:
        self.asked += 1
        if self.fails:
            raise PlatformError("the service is down", id="test.down")
        return Collateral(self.parts, "counting")


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def real(vectors: Path) -> tuple[bytes, dict[str, str]]:
    parts = json.loads((vectors / "collateral" / "phala_sgx_quote_collateral.json").read_bytes())
    return (vectors / "sgx" / "phala_sgx_quote.bin").read_bytes(), parts


#: Of that collateral: the last second of the first piece to expire.
EXPIRES = 1752919278
NOW = EXPIRES - 10 * 86400


# Files


def test_file(real: tuple[bytes, dict[str, str]], tmp_path: Path) -> None:
    quote, parts = real
    path = tmp_path / "collateral.json"
    path.write_text(json.dumps(parts))
    assert FileSource(path).fetch(quote) == Collateral(parts, str(path))
    result = verify(Evidence.from_quote(quote), Policy(any_enclave=True), now=NOW, collateral=FileSource(path))
    assert result.claims.collateral_source == str(path)
    for text, id in (
        ("", "attestation.collateral.file"),
        ("[", "attestation.collateral.file"),
        ("{}", "evidence.collateral.malformed"),
    ):
        path.write_text(text)
        assert cause(FileSource(path).fetch, quote) == id
    assert cause(FileSource(tmp_path / "absent").fetch, quote) == "attestation.collateral.file"


def test_layouts(real: tuple[bytes, dict[str, str]]) -> None:
    _, parts = real
    assert check_collateral({**parts, sources.PCK_CHAIN_KEY: "PEM"})
    assert check_collateral({"certificates": "PEM"}) and check_collateral({"certificates": "PEM", "crl": "00"})
    for wrong in (
        None,
        {},
        {**parts, "more": ""},
        {**parts, "certificates": ""},
        {**parts, "pck_crl": "zz"},
        {**parts, "pck_crl": 1},
        {"certificates": "PEM", "crl": "x"},
        {"certificates": "PEM", "more": ""},
        {"certificates": 5},
    ):
        assert cause(check_collateral, wrong) == "evidence.collateral.malformed"


def test_what_the_evidence_carries_comes_first(attested: Attested) -> None:
    source = Counting({})
    assert verify(attested.evidence, attested.policy, now=attested.now, collateral=source).accepted and not source.asked
    bare = replace(attested.evidence, collateral=None)
    source = Counting(attested.platform.collateral())
    claims = verify(bare, attested.policy, now=attested.now, collateral=source).claims
    assert (claims.collateral_source, source.asked) == ("counting", 1)


# Chains


def test_chain(real: tuple[bytes, dict[str, str]]) -> None:
    quote, parts = real
    down, up, after = Counting({}, fails=True), Counting(parts), Counting({})
    assert ChainSource([down, up, after]).fetch(quote).parts is parts
    assert (down.asked, up.asked, after.asked) == (1, 1, 0)
    assert cause(ChainSource([down]).fetch, quote) == "test.down"
    with pytest.raises(PlatformError) as caught:
        ChainSource([down, KdsSource()]).fetch(quote)
    assert caught.value.id == "attestation.collateral.unavailable"
    assert "the service is down" in str(caught.value.found) and "an SGX or TDX quote" in str(caught.value.found)
    with pytest.raises(UsageError):
        ChainSource([])


# The cache


def test_cache(real: tuple[bytes, dict[str, str]], tmp_path: Path) -> None:
    quote, parts = real
    clock, source = Clock(NOW), Counting(parts)
    cache = CachedSource(source, tmp_path / "cache", clock=clock)
    for _ in range(3):
        assert cache.fetch(quote).parts == parts
    assert source.asked == 1
    (entry,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600 and stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    again = CachedSource(source, tmp_path / "cache", clock=clock)
    assert again.fetch(quote) == Collateral(parts, "counting") and source.asked == 1, "from the disk"
    clock.now += sources.REFRESH_AFTER
    cache.fetch(quote)
    assert source.asked == 2, "an old entry is fetched again, though it is valid"
    clock.now -= 10 * sources.REFRESH_AFTER
    cache.fetch(quote)
    assert source.asked == 3, "an entry of the future is not trusted"


def test_cache_keeps_the_newest(
    real: tuple[bytes, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quote, parts = real
    monkeypatch.setattr(sources, "_ON_DISK", 3)
    directory = tmp_path / "cache"
    cache = CachedSource(Counting(parts), directory, clock=Clock(NOW))
    for number in range(5):
        (directory / f"{number}.json").write_bytes(b"{}")
        os.utime(directory / f"{number}.json", (number, number))
    cache.fetch(quote)
    assert {"3.json", "4.json"} < {entry.name for entry in directory.iterdir()}
    assert len(list(directory.iterdir())) == 3


def test_cache_without_a_directory(real: tuple[bytes, dict[str, str]]) -> None:
    quote, parts = real
    source = Counting(parts)
    cache = CachedSource(source, clock=Clock(NOW))
    assert cache.fetch(quote) is cache.fetch(quote) and source.asked == 1


def test_what_cannot_be_refreshed(
    real: tuple[bytes, dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An old entry that is valid is used, and the log says so; one that has expired never is."""
    quote, parts = real
    clock, source = Clock(NOW), Counting(parts)
    cache = CachedSource(source, tmp_path / "cache", clock=clock)
    cache.fetch(quote)
    source.fails, clock.now = True, NOW + 2 * sources.REFRESH_AFTER
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(quote).parts == parts
    assert "could not be refreshed" in caplog.text and "test.down" in caplog.text
    for fresh in (cache, CachedSource(source, tmp_path / "cache", clock=clock)):
        clock.now = EXPIRES
        assert fresh.fetch(quote).parts == parts
        clock.now = EXPIRES + 1
        assert cause(fresh.fetch, quote) == "test.down"


def test_expired_answers_are_no_answers(real: tuple[bytes, dict[str, str]], tmp_path: Path) -> None:
    quote, parts = real
    cache = CachedSource(Counting(parts), tmp_path / "cache", clock=Clock(EXPIRES + 1))
    assert cause(cache.fetch, quote) == "attestation.collateral.expired"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_service_is_left_alone(real: tuple[bytes, dict[str, str]]) -> None:
    quote, parts = real
    clock, source = Clock(NOW), Counting(parts, fails=True)
    cache = CachedSource(source, clock=clock)
    for _ in range(5):
        assert cause(cache.fetch, quote) == "test.down"
    assert source.asked == 1
    clock.now += sources.RETRY_AFTER
    source.fails = False
    assert cache.fetch(quote).parts == parts and source.asked == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "noise"])
def test_damaged_entries_are_fetched_again(real: tuple[bytes, dict[str, str]], tmp_path: Path, damage: str) -> None:
    quote, parts = real
    source = Counting(parts)
    CachedSource(source, tmp_path / "cache", clock=Clock(NOW)).fetch(quote)
    (entry,) = (tmp_path / "cache").iterdir()
    data = entry.read_bytes()
    body = json.dumps({"source": "x", "fetched": NOW, "parts": {}}).encode()
    entry.write_bytes(
        {
            "flip": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "cut": data[:-1],
            "empty": b"",
            "other": hashlib.sha256(body).hexdigest().encode() + b"\n" + body,
            "noise": os.urandom(100),
        }[damage]
    )
    assert CachedSource(source, tmp_path / "cache", clock=Clock(NOW)).fetch(quote).parts == parts
    assert source.asked == 2 and entry.read_bytes() == data


def test_the_directory_is_private(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    assert cause(CachedSource, Counting({}), open_to_all) == "tee.state.permissions"


def test_a_full_disk_costs_the_entry_only(
    real: tuple[bytes, dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quote, parts = real
    cache = CachedSource(Counting(parts), tmp_path / "cache", clock=Clock(NOW))
    (tmp_path / "cache").rmdir()
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(quote).parts == parts
    assert "could not be cached" in caplog.text


def test_one_request_for_all_that_wait(real: tuple[bytes, dict[str, str]]) -> None:
    quote, parts = real
    started, go = threading.Event(), threading.Event()

    class Slow(Counting):
        def fetch(self, quote: bytes) -> Collateral:
            started.set()
            assert go.wait(10)
            return super().fetch(quote)

    source = Slow(parts)
    cache = CachedSource(source, clock=Clock(NOW))
    found: list[Collateral] = []
    threads = [threading.Thread(target=lambda: found.append(cache.fetch(quote))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8 and source.asked == 1 and not cache._fetching


def test_keys(attested: Attested, real: tuple[bytes, dict[str, str]], vectors: Path) -> None:
    """Entries are apart where collateral differs, and shared where it does not."""
    platform = attested.platform
    domains = [platform.td_quote(bytes([at]) * 64, bytes(48)) for at in range(2)]
    found = [sources.cache_key(quote) for quote in (attested.evidence.quote, real[0], *domains)]
    found.append(sources.cache_key((vectors / "sev-snp" / "trustee_test-report.bin").read_bytes()))
    found.append(sources.cache_key(made_snp.report().to_bytes()))
    assert len(set(found)) == 5 and found[2] == found[3]
    other = made_snp.report(reported_tcb=bytes(8))
    assert sources.cache_key(other.to_bytes()) != found[-1]
    with pytest.raises(EvidenceError):
        sources.cache_key(b"no quote")


# A PCCS


@pytest.fixture(scope="module")
def pccs(shared_config: Config) -> Iterator[str]:
    """The simulated platform's, which answers as Intel's."""
    pytest.importorskip("uvicorn")
    from inclavare.tee.sgx_sim import pccs as service

    listening = service.listen("127.0.0.1", 0, plain=True)
    server = service.server(shared_config, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listening.close()


def test_pccs_for_enclaves_and_domains(attested: Attested, pccs: str, tmp_path: Path) -> None:
    platform = attested.platform
    policy = replace(attested.policy, mrenclave=(), any_enclave=True)
    cache = CachedSource(PccsSource(pccs), tmp_path / "cache")
    for quote, expected in (
        (attested.evidence.quote, platform.collateral()),
        (platform.td_quote(bytes(64), bytes(48)), platform.td_collateral()),
    ):
        found = PccsSource(pccs).fetch(quote).parts
        # The lists are issued for enclaves; the platform itself issues others for its trust domains.
        for name in ("tcb_info", "qe_identity", "tcb_info_issuer_chain", "pck_crl_issuer_chain"):
            assert found[name] == expected[name]
        evidence = Evidence.from_quote(quote)
        result = verify(evidence, policy, collateral=cache)
        assert result.accepted and result.claims.collateral_source == pccs
    assert len(list((tmp_path / "cache").iterdir())) == 2


def uncertified(platform: SimulatedPlatform, quote: bytes, kind: int) -> bytes:
    """The quote with certification data that only identifies its PCK certificate, signed again."""
    made = Quote.from_bytes(quote)
    extension = provisioning.pck_extension(provisioning.load(platform._config.platform_dir, platform._session()).pck)
    assert isinstance(extension, PckExtension)
    processor = platform._session()
    loaded = provisioning.load(platform._config.platform_dir, processor)
    with architectural.loaded(processor, architectural.QE, loaded.qe_sigstruct) as qe:
        qe_id = architectural.qe_id(processor, qe)
    if kind == CERT_PCK_LEAF:
        end = made.cert_data.index(b"-----END CERTIFICATE-----") + len(b"-----END CERTIFICATE-----\n")
        data = made.cert_data[:end]
    else:
        ppid = extension.ppid if kind == CERT_PPID_PLAIN else bytes(384)
        data = PckIdentifier(ppid, extension.cpusvn, extension.pce_svn, extension.pce_id).to_bytes()
    header = replace(made.header, user_data=qe_id.ljust(20, b"\0"))
    return resigned(platform, replace(made, header=header, cert_type=kind, cert_data=data)).to_bytes()


@pytest.mark.parametrize("kind", [CERT_PPID_PLAIN, CERT_PPID_RSA3072, CERT_PCK_LEAF])
@pytest.mark.parametrize("tdx", [False, True])
def test_quotes_without_their_certificates(attested: Attested, pccs: str, kind: int, tdx: bool) -> None:
    """The PCK certificate comes from the PCCS, and is checked like one that the quote carries."""
    platform = attested.platform
    start = platform.td_quote(bytes(64), bytes(48)) if tdx else attested.evidence.quote
    quote = uncertified(platform, start, kind)
    evidence = Evidence("tdx-sim" if tdx else "sgx-sim", quote)
    policy = replace(attested.policy, mrenclave=(), any_enclave=True)
    fetched = PccsSource(pccs).fetch(quote)
    assert fetched.parts[sources.PCK_CHAIN_KEY].count("BEGIN CERTIFICATE") == 3
    assert verify(evidence, policy, collateral=PccsSource(pccs)).accepted
    without = {name: value for name, value in fetched.parts.items() if name != sources.PCK_CHAIN_KEY}
    assert cause(verify, evidence.with_collateral(without), policy) == "evidence.quote.cert_type"
    leaf, *rest = fetched.parts[sources.PCK_CHAIN_KEY].split("-----END CERTIFICATE-----\n")
    swapped = "-----END CERTIFICATE-----\n".join([leaf, rest[1], rest[1], ""])
    for chain in (swapped, "", "junk" + fetched.parts[sources.PCK_CHAIN_KEY]):
        forged = evidence.with_collateral({**fetched.parts, sources.PCK_CHAIN_KEY: chain})
        assert cause(verify, forged, policy).startswith(("evidence.certificate.", "evidence.quote.cert_type"))


def test_this_machines_simulated_platform(
    attested: Attested, shared_config: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        "".join(f'{name}_dir = "{getattr(shared_config, name + "_dir")}"\n' for name in ("state", "run", "log"))
    )
    monkeypatch.setenv("INCLAVARE_CONFIG", str(path))
    policy = replace(attested.policy, mrenclave=(), any_enclave=True)
    for quote in (attested.evidence.quote, attested.platform.td_quote(bytes(64), bytes(48))):
        result = verify(Evidence.from_quote(quote), policy, collateral=PlatformSource())
        assert result.accepted and result.claims.collateral_source == "sgx-sim"


def test_what_a_pccs_does_not_know(real: tuple[bytes, dict[str, str]], pccs: str, vectors: Path) -> None:
    assert cause(PccsSource(pccs).fetch, real[0]) == "tee.sgx.pccs"
    fortanix = (vectors / "sgx" / "fortanix_dcapql_quote_raw_tcb.bin").read_bytes()
    assert cause(PccsSource(pccs).fetch, fortanix) == "tee.sgx.pccs"
    assert cause(PccsSource(pccs).fetch, made_snp.report().to_bytes()) == "attestation.collateral.kind"
    assert cause(PccsSource("ftp://localhost").fetch, real[0]) == "tee.sgx.pccs"
    assert cause(PccsSource("http://127.0.0.1:9").fetch, real[0]) == "tee.sgx.pccs"


def test_a_silent_service_does_not_hold_anyone(real: tuple[bytes, dict[str, str]]) -> None:
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as server:
        source = PccsSource(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.2)
        started = time.monotonic()
        assert cause(source.fetch, real[0]) == "tee.sgx.pccs"
        assert time.monotonic() - started < 5


# AMD's key distribution service


@pytest.fixture
def kds() -> Iterator[tuple[str, dict[str, bytes]]]:
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize(
    ("processor", "path"),
    [
        ("Turin", "Turin/0102030405060708?fmcSPL=05&blSPL=01&teeSPL=02&snpSPL=03&ucodeSPL=70"),
        ("Genoa", f"Genoa/{bytes(range(64)).hex()}?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=25"),
    ],
)
def test_kds(maker: None, kds: tuple[str, dict[str, bytes]], processor: str, path: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    url, answers = kds
    certificate = made_snp.chip_certificate(processor)
    made = made_snp.report(processor, 3)
    assert cause(KdsSource(url).fetch, made.to_bytes()) == "attestation.collateral.kds"
    answers[f"/vcek/v1/{path}"] = certificate.public_bytes(Encoding.DER)
    answers[f"/vcek/v1/{processor}/crl"] = bytes.fromhex(made_snp.crl(processor))
    cache = CachedSource(KdsSource(url), tmp_path / "cache", clock=Clock(made_snp.NOW))
    evidence = Evidence.from_quote(made.to_bytes())
    claims = verify(evidence, Policy(any_enclave=True), now=made_snp.NOW, collateral=cache).claims
    assert claims.snp is not None and claims.collateral_source == url
    assert [one.name for one in claims.endorsements] == ["vcek", "crl"]
    answers.clear()
    assert (
        cache.fetch(made.to_bytes()).parts
        == CachedSource(KdsSource(url), tmp_path / "cache", clock=Clock(made_snp.NOW)).fetch(made.to_bytes()).parts
    )


def test_what_kds_cannot_be_asked(real: tuple[bytes, dict[str, str]]) -> None:
    source = KdsSource("http://127.0.0.1:9")
    assert cause(source.fetch, made_snp.report("Milan", 2).to_bytes()) == "attestation.collateral.kds"
    assert cause(source.fetch, made_snp.report(kind="VLEK").to_bytes()) == "attestation.collateral.kds"
    assert cause(source.fetch, made_snp.report(chip_id=bytes(64)).to_bytes()) == "attestation.collateral.kds"
    assert cause(source.fetch, real[0]) == "attestation.collateral.kind"

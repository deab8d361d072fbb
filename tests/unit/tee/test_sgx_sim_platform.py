"""The life of a platform: made once, described, its microcode updated, removed; and platforms of older versions."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import PlatformError, PolicyError, ResourceError, UsageError
from inclavare.sgx.image import PAGE_SIZE
from inclavare.sgx.keys import KEY_SEAL, POLICY_MRENCLAVE
from inclavare.sgx.pck import PckExtension
from inclavare.sgx.quote import Quote
from inclavare.sgx.structs import KeyRequest
from inclavare.tee.sgx_sim import SimulatedEnclave, architectural, cpu, create, epc, fuses, life, provisioning

NEWER = bytes((3, 2, 2, 2, 2, 1)) + bytes(10)
FMSPC = bytes.fromhex("53494d0000ff")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a platform, to be copied: making one takes a while."""
    base = tmp_path_factory.mktemp("template")
    create(Config(state_dir=base, run_dir=base / "run")).root_ca()
    return base


@pytest.fixture
def lived(config: Config, template: Path) -> Config:
    """A node whose platform has been used."""
    shutil.copytree(template, config.state_dir)
    return config


def loaded(config: Config, signers: Signers, label: str = "test") -> SimulatedEnclave:
    image = small_image(b"code")
    return create(config).load(image, sign_image(image, signers.ours).to_bytes(), label=label)


def sealing_key(enclave: SimulatedEnclave, cpusvn: bytes) -> bytes:
    request = KeyRequest(key_name=KEY_SEAL, key_policy=POLICY_MRENCLAVE, cpusvn=cpusvn)
    return enclave.egetkey(request.to_bytes())


# init


def test_a_platform_is_made_as_it_is_asked_for(config: Config, signers: Signers) -> None:
    life.initialise(config, epc_size=8 << 20, cpusvn=NEWER, fmspc=FMSPC)
    about = life.describe(config)
    assert (about["cpusvn"], about["fmspc"], about["epc"]["bytes"]) == (NEWER.hex(), FMSPC.hex(), 8 << 20)
    platform = create(config)
    image = small_image(b"code")
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="x")
    quote = Quote.from_bytes(platform.quote(enclave.report(platform.quote_target_info(), bytes(64))))
    assert quote.report_body().cpusvn == NEWER
    for collateral in (platform.collateral(), platform.td_collateral()):
        assert json.loads(collateral["tcb_info"])["fmspc"] == FMSPC.hex().upper()


def test_a_platform_is_not_made_twice(config: Config) -> None:
    life.initialise(config)
    before = {path.name: path.read_bytes() for path in config.platform_dir.iterdir()}
    with pytest.raises(PlatformError) as caught:
        life.initialise(config, fmspc=FMSPC)
    assert caught.value.id == "tee.platform.exists" and "reset" in str(caught.value.remedy)
    assert {path.name: path.read_bytes() for path in config.platform_dir.iterdir()} == before


def test_nor_over_one_that_came_by_use(lived: Config) -> None:
    root = create(lived).root_ca()
    with pytest.raises(PlatformError):
        life.initialise(lived)
    assert create(lived).root_ca() == root


@pytest.mark.parametrize(
    ("wrong", "id"),
    [
        ({"epc_size": 0}, "tee.platform.epc_size"),
        ({"epc_size": (8 << 20) + 1}, "tee.platform.epc_size"),
        ({"epc_size": life.MIN_EPC_SIZE - PAGE_SIZE}, "tee.platform.epc_size"),
        ({"epc_size": life.MAX_EPC_SIZE + PAGE_SIZE}, "tee.platform.epc_size"),
        ({"cpusvn": bytes(17)}, "tee.platform.cpusvn"),
        ({"fmspc": b""}, "tee.platform.fmspc"),
    ],
)
def test_impossible_platforms(config: Config, wrong: dict[str, Any], id: str) -> None:
    with pytest.raises(UsageError) as caught:
        life.initialise(config, **wrong)
    assert caught.value.id == id
    assert not config.platform_dir.exists()


def test_the_platforms_epc_counts_not_the_configurations(config: Config) -> None:
    life.initialise(config, epc_size=1 << 20)
    assert epc.size(config) == 1 << 20
    held = epc.reserve(config, 200, "one")
    with pytest.raises(ResourceError) as caught:
        epc.reserve(config, 57, "two")
    assert "200 of 256 pages" in str(caught.value.found) and "init --epc-size" in str(caught.value.remedy)
    epc.reserve(config, 56, "three").release()
    held.release()


def test_without_a_size_of_its_own_it_is_the_configurations(config: Config) -> None:
    life.initialise(config)
    assert epc.size(config) == config.epc_size
    assert epc.size(replace(config, epc_size=1 << 30)) == 1 << 30


# show


def test_what_is_said_is_so(lived: Config, signers: Signers) -> None:
    enclave = loaded(lived, signers, "holder of pages")
    about = life.describe(lived)
    assert json.loads(json.dumps(about)) == about
    made = provisioning.load(lived.platform_dir, create(lived)._session())
    certificate = made.pck
    assert about["pck"]["serial"] == f"{certificate.serial_number:x}"
    assert about["pck"]["not_after"] == certificate.not_valid_after_utc.isoformat()
    assert about["root_ca"]["sha256"] == hashlib.sha256(made.root_der).hexdigest()
    from cryptography.hazmat.primitives.serialization import Encoding

    extension = PckExtension.from_certificate(certificate.public_bytes(Encoding.DER))
    assert (about["ppid"], about["pce_id"], about["pce"]["svn"]) == (
        extension.ppid.hex(),
        extension.pce_id.hex(),
        extension.pce_svn,
    )
    assert about["epc"]["e820"] == "[mem 0x0000004000000000-0x00000040003fffff] reserved"
    assert about["epc"]["holders"] == [
        {"label": "holder of pages", "pages": enclave.epc_pages, "pid": epc.usage(lived)[0][2]}
    ]
    assert about["epc"]["used_pages"] == enclave.epc_pages
    tcb_info = json.loads(create(lived).collateral()["tcb_info"])
    assert (about["collateral"]["issued"], about["collateral"]["next_update"]) == (
        tcb_info["issueDate"],
        tcb_info["nextUpdate"],
    )
    enclave.destroy()
    assert life.describe(lived)["epc"]["holders"] == []


def test_what_is_set_is_said(lived: Config) -> None:
    life.set_tcb(
        lived,
        status="OutOfDate",
        advisories=("INTEL-SA-00615",),
        qe_status="OutOfDate",
        qe_advisories=("INTEL-SA-00700",),
        pck_revoked=True,
        collateral_expired=True,
        evaluation_number=5,
    )
    about = life.describe(lived)
    assert about["tcb"]["status"] == "OutOfDate" and about["tcb"]["advisories"] == ["INTEL-SA-00615"]
    assert about["tcb"]["evaluation_number"] == 5
    assert (about["qe"]["status"], about["qe"]["advisories"]) == ("OutOfDate", ["INTEL-SA-00700"])
    assert about["pck"]["revoked"] is about["collateral"]["expired"] is True


# Microcode


def test_after_an_update_older_sealing_keys_can_be_had_newer_ones_not(lived: Config, signers: Signers) -> None:
    before = loaded(lived, signers)
    old = sealing_key(before, fuses.CPUSVN)
    with pytest.raises(PolicyError) as caught:
        sealing_key(before, NEWER)
    assert caught.value.id == "sgx.egetkey.cpusvn"
    before.destroy()
    life.set_tcb(lived, cpusvn=NEWER)
    after = loaded(lived, signers)
    assert sealing_key(after, fuses.CPUSVN) == old
    new = sealing_key(after, NEWER)
    assert new != old
    after.destroy()
    # Older microcode again: what was sealed under the newer is out of reach.
    life.set_tcb(lived, cpusvn=fuses.CPUSVN)
    back = loaded(lived, signers)
    assert sealing_key(back, fuses.CPUSVN) == old
    with pytest.raises(PolicyError):
        sealing_key(back, NEWER)


def test_an_interrupted_update_leaves_a_working_platform(
    lived: Config, signers: Signers, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = create(lived).root_ca()

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuses, "write", power_cut)
    with pytest.raises(KeyboardInterrupt):
        life.set_tcb(lived, cpusvn=NEWER)
    monkeypatch.undo()
    assert create(lived).root_ca() == root and create(lived)._session().cpusvn == fuses.CPUSVN
    life.set_tcb(lived, cpusvn=NEWER)
    assert create(lived).root_ca() == root and create(lived)._session().cpusvn == NEWER


def test_ids_of_the_platform_do_not_depend_on_its_microcode(lived: Config) -> None:
    made = provisioning.load(lived.platform_dir, create(lived)._session())
    there = fuses.read(lived.platform_dir)
    assert there is not None
    found = []
    for cpusvn in (fuses.CPUSVN, NEWER):
        processor = cpu.Processor(replace(there.roots, cpusvn=cpusvn))
        with (
            architectural.loaded(processor, architectural.PCE, made.pce_sigstruct) as pce,
            architectural.loaded(processor, architectural.QE, made.qe_sigstruct) as qe,
        ):
            ids = architectural.ppid(processor, pce), architectural.qe_id(processor, qe)
            keys = architectural.pck_key(processor, pce), architectural.attestation_key(processor, qe)
        found.append((ids, [key.private_numbers().private_value for key in keys]))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) == 2
    assert not set(found[0][1]) & set(found[1][1]), "its keys do"


# reset


def test_a_reset_platform_is_another(lived: Config, signers: Signers) -> None:
    enclave = loaded(lived, signers)
    enclave.counters.create("mrenclave", "count")
    key, root = sealing_key(enclave, fuses.CPUSVN), create(lived).root_ca()
    enclave.destroy()
    life.set_tcb(lived, status="OutOfDate")
    create(lived).td_quote(bytes(64), bytes(48))
    assert life.exists(lived)
    life.reset(lived)
    assert not life.exists(lived)
    assert [path.name for path in lived.platform_dir.iterdir()] == [".lock"]
    again = loaded(lived, signers)
    assert sealing_key(again, fuses.CPUSVN) != key and create(lived).root_ca() != root
    assert life.describe(lived)["tcb"]["status"] == "UpToDate"


def test_no_platform_is_removed_under_its_enclaves(lived: Config, signers: Signers) -> None:
    enclave = loaded(lived, signers, "still here")
    root = create(lived).root_ca()
    with pytest.raises(PlatformError) as caught:
        life.reset(lived)
    assert caught.value.id == "tee.epc.busy" and "still here" in str(caught.value.found)
    assert create(lived).root_ca() == root
    enclave.destroy()
    life.reset(lived)
    assert not life.exists(lived)


def test_nothing_to_remove(config: Config) -> None:
    life.reset(config)
    assert not config.platform_dir.exists()


def test_a_damaged_platform_can_be_removed(lived: Config) -> None:
    create(lived).root_ca()
    (lived.platform_dir / fuses.FILE).write_bytes(b"damaged")
    life.reset(lived)
    assert create(lived).root_ca()


def test_an_interrupted_removal_is_finished_by_the_next(lived: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    create(lived).collateral()
    plain = Path.unlink

    def power_cut(path: Path, missing_ok: bool = False) -> None:
        if path.name == fuses.FILE:
            raise KeyboardInterrupt
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", power_cut)
    with pytest.raises(KeyboardInterrupt):
        life.reset(lived)
    monkeypatch.undo()
    left = {path.name for path in lived.platform_dir.iterdir()}
    assert left == {fuses.FILE, ".lock"}, "the fuses go last"
    life.reset(lived)
    assert not life.exists(lived)


# Platforms of older versions


def test_a_platform_of_the_first_version_keeps_its_keys_and_root(lived: Config, signers: Signers) -> None:
    enclave = loaded(lived, signers)
    platform = create(lived)
    key, root = sealing_key(enclave, fuses.CPUSVN), platform.root_ca()
    quote = Quote.from_bytes(platform.quote(platform_report(lived, signers)))
    as_first_version(lived)
    again = loaded(lived, signers)
    assert sealing_key(again, fuses.CPUSVN) == key
    assert create(lived).root_ca() == root
    later = Quote.from_bytes(create(lived).quote(platform_report(lived, signers)))
    assert later.cert_data == quote.cert_data and later.attestation_key == quote.attestation_key
    for holder in (enclave, again):
        holder.destroy()
    # What is new works on it, too.
    ppid = life.describe(lived)["ppid"]
    life.set_tcb(lived, cpusvn=NEWER)
    about = life.describe(lived)
    assert (about["ppid"], about["cpusvn"]) == (ppid, NEWER.hex())
    assert create(lived).root_ca() == root
    assert (lived.platform_dir / fuses.FILE).read_bytes().startswith(b"inclavare.fuses2")


def platform_report(config: Config, signers: Signers) -> bytes:
    enclave = loaded(config, signers)
    report = enclave.report(create(config).quote_target_info(), bytes(64))
    enclave.destroy()
    return report


def as_first_version(config: Config) -> None:
    """Write the state as the first version did: 112 bytes of fuses, one PCK certificate, no TD quoting enclave."""
    path = config.platform_dir / fuses.FILE
    data = path.read_bytes()
    assert len(data) == 128
    body = b"inclavare.fuses1" + data[16:80]
    path.write_bytes(body + hashlib.sha256(body).digest())
    path = config.platform_dir / provisioning.FILE
    document = json.loads(path.read_bytes())
    pck = document.pop("pcks")[0]
    del document["td_qe_sigstruct"]
    path.write_text(json.dumps({**document, "version": 1, "pck": pck}))


@pytest.mark.parametrize("at", [0, 15, 16, 80, 88, 95, 96, 127])
def test_each_byte_of_the_fuses_is_covered(config: Config, at: int) -> None:
    life.initialise(config, epc_size=8 << 20)
    path = config.platform_dir / fuses.FILE
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(PlatformError) as caught:
        fuses.read(config.platform_dir)
    assert caught.value.id == "tee.fuses.damaged"

"""The simulated processor refuses what a real one refuses, and keeps enclaves apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from small_enclaves import ALL_BUT_DEBUG, Signers, resigned, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import EvidenceError, IntegrityError, PlatformError, PolicyError, ResourceError, UsageError
from inclavare.sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, EnclaveImage, PageRun
from inclavare.sgx.keys import KEY_PROVISION, RootKeys
from inclavare.sgx.measure import measure
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import ATTRIBUTE_KSS, ATTRIBUTE_PROVISIONKEY, KeyRequest, ReportBody, Sigstruct, TargetInfo
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, cpu, create, usage

RW = PT_REG | SECINFO_R | SECINFO_W
Load = Callable[..., SimulatedEnclave]


def refused(platform: SimulatedPlatform, image: EnclaveImage, signature: bytes) -> IntegrityError:
    """The refusal; nothing may be left in the EPC."""
    before = usage(platform._config)
    with pytest.raises(IntegrityError) as caught:
        platform.load(image, signature, label="refused")
    assert usage(platform._config) == before
    return caught.value


def test_identity(load: Load, signers: Signers) -> None:
    enclave = load(b"identity")
    image = small_image(b"identity")
    assert enclave.mrenclave == measure(image)
    assert enclave.mrsigner == mrsigner(sign_image(image, signers.ours).modulus)
    assert not enclave.debug
    assert enclave.epc_pages == image.page_count == 8
    enclave.destroy()
    assert enclave.epc_pages == 0
    enclave.destroy()


def test_sigstruct_over_another_enclave(platform: SimulatedPlatform, signers: Signers) -> None:
    signature = sign_image(small_image(b"one"), signers.ours).to_bytes()
    error = refused(platform, small_image(b"other"), signature)
    assert error.id == "sgx.einit.enclavehash"
    assert error.found == measure(small_image(b"other")).hex()
    assert error.expected == measure(small_image(b"one")).hex()
    assert error.remedy


def test_debug_needs_the_signers_consent(platform: SimulatedPlatform, signers: Signers, load: Load) -> None:
    strict = sign_image(small_image(), signers.ours, attribute_mask=(1 << 64) - 1).to_bytes()
    assert refused(platform, small_image(debug=True), strict).id == "sgx.einit.attributes"
    with_consent = load(debug=True, attributes=4, attribute_mask=ALL_BUT_DEBUG)
    assert with_consent.debug
    with_consent.destroy()


@pytest.mark.parametrize(
    ("id", "overrides"),
    [
        ("sgx.einit.attributes", {"attributes": 4 | 1 << 7}),
        ("sgx.einit.attributes", {"xfrm": 7, "xfrm_mask": 7}),
        ("sgx.einit.miscselect", {"miscselect": 1}),
    ],
)
def test_attributes_and_masks(
    platform: SimulatedPlatform, signers: Signers, id: str, overrides: dict[str, Any]
) -> None:
    image = small_image()
    assert refused(platform, image, sign_image(image, signers.ours, **overrides).to_bytes()).id == id


def test_bits_outside_of_the_mask_do_not_count(load: Load) -> None:
    load(attributes=4 | 1 << 7, attribute_mask=4, xfrm=7, xfrm_mask=3, miscselect=1, misc_mask=0).destroy()


@pytest.mark.parametrize("field", Sigstruct.LAYOUT.names)
def test_damaged_sigstruct(platform: SimulatedPlatform, signers: Signers, field: str) -> None:
    image = small_image()
    damaged = bytearray(sign_image(image, signers.ours).to_bytes())
    damaged[Sigstruct.LAYOUT.offsets[field]] ^= 0x01
    assert refused(platform, image, bytes(damaged)).id.startswith("sgx.sigstruct.")


def test_sigstruct_of_the_wrong_length(platform: SimulatedPlatform, signers: Signers) -> None:
    image = small_image()
    signature = sign_image(image, signers.ours).to_bytes()
    assert refused(platform, image, signature[:-1]).id == "sgx.sigstruct.size"
    assert refused(platform, image, b"").id == "sgx.sigstruct.size"


def test_another_signers_name_under_our_signature(platform: SimulatedPlatform, signers: Signers) -> None:
    image = small_image()
    ours, theirs = sign_image(image, signers.ours), sign_image(image, signers.theirs)
    assert refused(platform, image, resigned(ours, modulus=theirs.modulus)).id == "sgx.sigstruct.signature"


def test_provisioning_key_is_for_the_platforms_own_enclaves(platform: SimulatedPlatform, signers: Signers) -> None:
    image = replace(small_image(), attributes=4 | ATTRIBUTE_PROVISIONKEY)
    assert refused(platform, image, sign_image(image, signers.ours).to_bytes()).id == "sgx.einit.provision"


@pytest.mark.parametrize(
    ("id", "change"),
    [
        ("sgx.ecreate.size", {"size": 3 * PAGE_SIZE}),
        ("sgx.ecreate.ssaframesize", {"ssa_frame_size": 0}),
        ("sgx.ecreate.attributes", {"attributes": 0}),
        ("sgx.ecreate.attributes", {"attributes": 4 | 1}),
        ("sgx.ecreate.attributes", {"attributes": 4 | 1 << 3}),
        ("sgx.ecreate.xfrm", {"xfrm": 1}),
        ("sgx.ecreate.xfrm", {"xfrm": 3 | 1 << 40}),
        ("sgx.ecreate.miscselect", {"miscselect": 1 << 9}),
        ("sgx.eadd.range", {"size": 4 * PAGE_SIZE}),
        ("sgx.eadd.occupied", {"runs": (PageRun(0, RW, 2), PageRun(PAGE_SIZE, RW, 1))}),
        ("sgx.eadd.occupied", {"runs": (PageRun(PAGE_SIZE, RW, 1), PageRun(0, RW, 2))}),
        (
            "sgx.eadd.occupied",
            {"runs": (PageRun(0, RW, 1), PageRun(PAGE_SIZE, RW, 2), PageRun(2 * PAGE_SIZE, RW, 1))},
        ),
        ("sgx.eadd.secinfo", {"runs": (PageRun(0, RW | 1 << 5, 1),)}),
        ("sgx.eadd.secinfo", {"runs": (PageRun(0, SECINFO_R, 1),)}),
        ("sgx.eadd.secinfo", {"runs": (PageRun(0, PT_REG | SECINFO_W, 1),)}),
        ("sgx.eadd.secinfo", {"runs": (PageRun(0, PT_TCS | SECINFO_R, 1),)}),
        ("sgx.eadd.tcs", {"runs": (PageRun(0, PT_TCS, 1),)}),
    ],
)
def test_images_that_no_processor_loads(
    platform: SimulatedPlatform, signers: Signers, id: str, change: dict[str, Any]
) -> None:
    image = replace(small_image(), **change)
    assert refused(platform, image, sign_image(small_image(), signers.ours).to_bytes()).id == id


def test_pages_may_touch_and_reach_the_end(platform: SimulatedPlatform, signers: Signers) -> None:
    last = PageRun(3 * PAGE_SIZE, RW, 1, b"z" * PAGE_SIZE)
    image = replace(small_image(), size=4 * PAGE_SIZE, runs=(last, PageRun(PAGE_SIZE, RW, 2), PageRun(0, RW, 1)))
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="full")
    assert enclave.read(3 * PAGE_SIZE, PAGE_SIZE) == b"z" * PAGE_SIZE
    assert enclave.epc_pages == 5
    enclave.destroy()


def test_family_needs_kss_and_is_reported(platform: SimulatedPlatform, signers: Signers) -> None:
    """SDM, EINIT: without ATTRIBUTES.KSS, ISVFAMILYID and ISVEXTPRODID have to be zero."""
    named = {"isv_family_id": b"f" * 16, "isv_ext_prod_id": b"e" * 16}
    plain = small_image()
    unasked = sign_image(plain, signers.ours, attribute_mask=ALL_BUT_DEBUG & ~ATTRIBUTE_KSS, **named)
    assert refused(platform, plain, unasked.to_bytes()).id == "sgx.einit.isvfamilyid"
    kss = replace(plain, attributes=plain.attributes | ATTRIBUTE_KSS, miscselect=1, ssa_frame_size=2)
    signature = sign_image(kss, signers.ours, attributes=kss.attributes, miscselect=1, **named).to_bytes()
    enclave = platform.load(kss, signature, label="kss")
    body = enclave.verify_report(enclave.report(enclave.target_info(), bytes(64)))
    assert (body.isv_family_id, body.isv_ext_prod_id, body.miscselect) == (b"f" * 16, b"e" * 16, 1)
    assert TargetInfo.from_bytes(enclave.target_info()).miscselect == 1
    enclave.destroy()


def test_report_carries_the_enclaves_identity(load: Load) -> None:
    reporter, verifier = load(b"reporter"), load(b"verifier")
    raw = reporter.report(verifier.target_info(), b"d" * 64)
    body = verifier.verify_report(raw)
    assert (body.mrenclave, body.mrsigner) == (reporter.mrenclave, reporter.mrsigner)
    assert (body.isv_prod_id, body.isv_svn, body.report_data) == (7, 3, b"d" * 64)
    assert body == ReportBody.from_bytes(raw[:384])
    assert body.attributes.hex() == "05000000000000000300000000000000"
    with pytest.raises(EvidenceError):
        reporter.verify_report(raw)
    assert TargetInfo.from_bytes(verifier.target_info()).mrenclave == verifier.mrenclave


def test_report_of_wrong_input(load: Load) -> None:
    enclave = load()
    with pytest.raises(UsageError):
        enclave.report(enclave.target_info(), b"short")
    with pytest.raises(IntegrityError):
        enclave.report(bytes(511), bytes(64))


def test_seal_keys(load: Load, signers: Signers) -> None:
    one, again, other = load(b"one"), load(b"one"), load(b"other")
    foreign, debug = load(b"one", key=signers.theirs), load(b"one", debug=True, attributes=4)
    assert one.seal_key("mrenclave") == again.seal_key("mrenclave")
    assert one.seal_key("mrenclave") != other.seal_key("mrenclave")
    assert one.seal_key("mrsigner") == other.seal_key("mrsigner")
    assert one.seal_key("mrsigner") != foreign.seal_key("mrsigner")
    assert one.seal_key("mrsigner") != debug.seal_key("mrsigner")
    assert one.seal_key("mrenclave") != one.seal_key("mrsigner")
    assert len(one.seal_key("mrenclave")) == 16
    with pytest.raises(UsageError):
        one.seal_key("everyone")


def test_seal_keys_of_another_platform_differ(load: Load, config: Config, signers: Signers) -> None:
    image = small_image(b"one")
    elsewhere = create(config).load(image, sign_image(image, signers.ours).to_bytes(), label="x")
    here = load(b"one")
    assert here.mrenclave == elsewhere.mrenclave
    for policy in ("mrenclave", "mrsigner"):
        assert here.seal_key(policy) != elsewhere.seal_key(policy)


def test_egetkey_obeys_the_attributes(load: Load) -> None:
    with pytest.raises(PolicyError):
        load().egetkey(KeyRequest(key_name=KEY_PROVISION).to_bytes())


def test_pages_are_readable_inside_and_ciphertext_outside(load: Load) -> None:
    enclave = load(b"a very recognisable page")
    assert enclave.read(2, 4) == b"very"
    assert enclave.read(PAGE_SIZE - 4, 4) == bytes(4)
    assert enclave.read(3 * PAGE_SIZE - 8, 16) == bytes(16)
    assert enclave._secs.frames
    for frame in enclave._secs.frames.values():
        assert b"recognisable" not in enclave._processor.memory.store.pages[frame]
    with pytest.raises(IntegrityError):
        enclave.read(PAGE_SIZE, 1)
    with pytest.raises(IntegrityError):
        enclave.read(7 * PAGE_SIZE - 1, 2)


@pytest.mark.parametrize("attack", ["changed", "moved"])
def test_changed_or_moved_memory_is_noticed(config: Config, signers: Signers, attack: str) -> None:
    image = small_image(b"x")
    enclave = create(config).load(image, sign_image(image, signers.ours).to_bytes(), label="x")
    code, tcs = (enclave._secs.frames[offset] for offset in (0, PAGE_SIZE))
    store = enclave._processor.memory.store
    if attack == "changed":
        store.pages[code] = bytes([store.pages[code][0] ^ 1]) + store.pages[code][1:]
    else:
        store.pages[code], store.tags[code] = store.pages[tcs], store.tags[tcs]
    for expected in ("tee.memory.integrity", "tee.memory.locked"):
        with pytest.raises(IntegrityError) as caught:
            enclave.read(0, 1)
        assert caught.value.id == expected
    enclave.destroy()


def test_memory_keys_are_the_sessions_own(platform: SimulatedPlatform, signers: Signers) -> None:
    image = small_image(b"same page")
    signature = sign_image(image, signers.ours).to_bytes()
    enclaves = [create(platform._config).load(image, signature, label="s") for _ in range(2)]
    stores = [enclave._processor.memory.store for enclave in enclaves]
    frames = [enclave._secs.frames[0] for enclave in enclaves]
    assert frames[0] == frames[1] and stores[0].pages[frames[0]] != stores[1].pages[frames[1]]
    enclaves[1]._processor.memory.store = stores[0]
    with pytest.raises(IntegrityError):
        enclaves[1].read(0, 1)
    # What is derived from the fuses is the same in both sessions.
    assert enclaves[0].seal_key("mrenclave") == enclaves[1].seal_key("mrenclave")


def test_destroyed_enclaves_leave_no_memory(config: Config, signers: Signers) -> None:
    platform = create(config)
    image = small_image(b"x")
    signature = sign_image(image, signers.ours).to_bytes()
    used = set()
    for _ in range(3):
        enclave = platform.load(image, signature, label="x")
        used.update(enclave._secs.frames.values())
        enclave.destroy()
        assert not enclave._processor.memory.store.pages
    assert len(used) == 2


def test_a_full_epc_is_refused(signers: Signers) -> None:
    processor = cpu.Processor(RootKeys(*[bytes(16)] * 4), epc_pages=3)
    image = small_image(b"x")
    signature = sign_image(image, signers.ours).to_bytes()
    processor.load(image, signature)
    with pytest.raises(ResourceError) as caught:
        processor.load(image, signature)
    assert caught.value.id == "tee.epc.full"
    assert len(processor.memory.store.pages) == 2


def test_destroyed_enclave_answers_nothing(load: Load) -> None:
    enclave = load()
    target = enclave.target_info()
    enclave.destroy()
    for call in (
        lambda: enclave.seal_key("mrenclave"),
        lambda: enclave.report(target, bytes(64)),
        lambda: enclave.read(0, 1),
        enclave.target_info,
    ):
        with pytest.raises(PlatformError) as caught:
            call()
        assert caught.value.id == "tee.enclave.state"
    assert len(enclave.mrenclave) == 32

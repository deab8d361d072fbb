"""The hardware platform on a machine with SGX: the driver's double, the software processor, AESM, a PCCS."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aesm_service import AesmService, key_id
from sgx_kernel import HEADER
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import InclavareError, IntegrityError, PlatformError, ResourceError, UsageError
from inclavare.sgx.intel import INTEL_ROOT_CA
from inclavare.sgx.measure import measure
from inclavare.sgx.quote import Quote
from inclavare.sgx.sigstruct import mrsigner
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, KeyRequest, Report, ReportBody, TargetInfo
from inclavare.tee import skeleton
from inclavare.tee.sgx import HardwarePlatform
from inclavare.tee.sgx.platform import HardwareEnclave
from inclavare.tee.sgx_sim import SimulatedPlatform, fuses
from inclavare.tee.skeleton.protocol import Client, Operation, pack_request, unpack_response

pytest.importorskip("unicorn", reason="the extra emulator is not installed")
pytestmark = pytest.mark.skipif(not HEADER.exists(), reason=f"no {HEADER} (linux-libc-dev)")


@pytest.fixture
def sgx(tmp_path: Path, shared_config: Config, platform: SimulatedPlatform) -> Iterator[Any]:
    """A machine whose fuses are the shared simulated platform's, so that its quoting enclave knows this one's reports."""
    from driver_machine import SgxMachine

    platform.quote_target_info()
    made = SgxMachine(fuses.load(shared_config.platform_dir), tmp_path)
    yield made
    if made.errors:
        raise made.errors[0]


@pytest.fixture
def run(sgx: Any, signers: Signers) -> Iterator[Callable[..., HardwareEnclave]]:
    """Load the skeleton enclave."""
    loaded = []

    def load(*, debug: bool = False) -> HardwareEnclave:
        image = skeleton.image(debug=debug)
        loaded.append(sgx.platform.load(image, sign_image(image, signers.ours).to_bytes(), label="test"))
        return loaded[-1]

    yield load
    for enclave in loaded:
        enclave.destroy()
    assert not sgx.files and not sgx.reserved and not sgx.driver.enclaves


def refused(call: Callable[[], Any], id: str, *, kind: type[InclavareError] = PlatformError, found: str = "") -> None:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.id == id and found in str(caught.value.found)
    assert caught.value.remedy or kind is not PlatformError


# --- probing


def test_a_machine_with_everything_is_usable(sgx: Any) -> None:
    assert sgx.platform.probe().usable


def test_what_cpuid_lacks(sgx: Any) -> None:
    from cpuid_leaves import processor

    for cpuid, reason in (
        (processor(features=(4, 0)), "no flexible launch control"),
        (processor(sgx=(0, 0, 0)), "no SGX1"),
    ):
        found = HardwarePlatform(sgx.root, cpuid=cpuid, enter=1).probe()
        assert not found.usable and reason in found.reason and "firmware" in found.remedy


def test_a_kernel_whose_vdso_has_no_entry(sgx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpuid_leaves import processor

    from inclavare.tee.sgx import vdso

    vdso.enter_function.cache_clear()
    monkeypatch.setattr(vdso, "process_vdso", lambda: None)
    found = HardwarePlatform(sgx.root, cpuid=processor()).probe()
    assert not found.usable and "no vDSO" in found.reason and "5.11" in found.remedy


def test_a_processor_that_firmware_has_switched_off(tmp_path: Path) -> None:
    from cpuid_leaves import processor

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t: fpu\n")
    found = HardwarePlatform(tmp_path, cpuid=processor()).probe()
    assert not found.usable and "switched off" in found.reason and "firmware" in found.remedy


# --- the skeleton enclave, through driver, vDSO convention and back


def test_the_skeleton_runs(sgx: Any, run: Callable[..., HardwareEnclave]) -> None:
    enclave = run()
    client = Client(enclave.enter)
    name = client.init()
    assert len(name) == 16
    assert client.info() == (name, 1)
    for size in (0, 1, 8, 4000):
        data = bytes(range(256)) * 16
        assert client.echo(data[:size]) == data[:size]
    sealed = client.seal(b"secret", b"with")
    assert client.unseal(sealed, b"with") == b"secret" and b"secret" not in sealed
    refused(lambda: client.unseal(sealed, b"without"), "tee.skeleton.authentication", kind=InclavareError)


def test_identity(sgx: Any, run: Callable[..., HardwareEnclave], signers: Signers) -> None:
    enclave = run()
    image = skeleton.image()
    modulus = signers.ours.public_key().public_numbers().n.to_bytes(384, "little")
    assert enclave.mrenclave == measure(image) and enclave.mrsigner == mrsigner(modulus)
    assert not enclave.debug and enclave.epc_pages == image.page_count and enclave.counters is None
    assert run(debug=True).debug
    enclave.destroy()
    enclave.destroy()
    assert enclave.epc_pages == 0
    refused(lambda: enclave.enter(pack_request(Operation.ECHO)), "tee.enclave.state")


def test_reports_are_the_enclaves_own(sgx: Any, run: Callable[..., HardwareEnclave]) -> None:
    """The first report makes the enclave ready; the processor's identity fields are those that we say it has."""
    enclave, other = run(), run(debug=True)
    data = bytes(range(64))
    report = Report.from_bytes(enclave.report(other.target_info(), data))
    body = ReportBody.from_bytes(report.body)
    target = TargetInfo.from_bytes(enclave.target_info())
    assert body.report_data == data and body.mrenclave == enclave.mrenclave and body.mrsigner == enclave.mrsigner
    assert (body.attributes, body.miscselect) == (target.attributes, target.miscselect)
    assert enclave.report(other.target_info(), data) != enclave.report(enclave.target_info(), data)
    refused(lambda: enclave.report(other.target_info(), b"short"), "tee.report.data", kind=UsageError)
    refused(lambda: enclave.report(bytes(511), data), "sgx.targetinfo.size", kind=IntegrityError)


def test_keys_do_not_leave_an_enclave(run: Callable[..., HardwareEnclave]) -> None:
    enclave = run()
    refused(lambda: enclave.seal_key("mrenclave"), "tee.sgx.key", found="code in the enclave only")
    refused(lambda: enclave.egetkey(KeyRequest(4).to_bytes()), "tee.sgx.key")


def test_an_exception_goes_to_the_enclaves_handler_first(run: Callable[..., HardwareEnclave]) -> None:
    """The skeleton steps over UD2: EENTER with CSSA 1, EEXIT, ERESUME."""
    enclave = run(debug=True)
    client = Client(enclave.enter)
    client.init()
    assert client.ask(Operation.UD2) is not None
    assert client.echo(b"still there") == b"still there"


def test_an_exception_that_the_enclave_does_not_handle(run: Callable[..., HardwareEnclave]) -> None:
    enclave = run(debug=True)
    client = Client(enclave.enter)
    client.init()
    refused(lambda: client.ask(Operation.JUMP, (0x1000).to_bytes(8, "little")), "tee.sgx.fault", found="#GP")
    refused(lambda: client.echo(b""), "tee.skeleton.exception")


def test_a_tcs_that_cannot_be_entered(run: Callable[..., HardwareEnclave], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a sleep: EENTER itself faults."""
    from test_vdso import FAULTS

    from inclavare.tee.sgx.syscalls import executable
    from inclavare.tee.sgx.vdso import Gate

    enclave = run()
    monkeypatch.setattr(enclave, "_gate", Gate(executable(FAULTS)))
    refused(lambda: enclave.enter(pack_request(Operation.INIT)), "tee.sgx.fault")


def test_two_threads_take_turns(run: Callable[..., HardwareEnclave]) -> None:
    """There is one TCS: a second EENTER would fault."""
    enclave = run()
    client = Client(enclave.enter)
    client.init()
    wrong: list[bytes] = []

    def work(number: int) -> None:
        data = bytes([number]) * 100
        wrong.extend(found for found in (client.echo(data) for _ in range(5)) if found != data)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and client.info()[1] == 16


def test_an_enclave_without_code_for_requests(sgx: Any, signers: Signers) -> None:
    image = small_image()
    enclave = sgx.platform.load(image, sign_image(image, signers.ours).to_bytes(), label="test")
    refused(lambda: enclave.report(enclave.target_info(), bytes(64)), "tee.sgx.code", found="other than the skeleton")
    refused(lambda: enclave.seal_key("mrsigner"), "tee.sgx.key")
    assert len(enclave.target_info()) == 512
    enclave.destroy()


def test_a_skeleton_with_one_changed_byte_is_not_called(sgx: Any, signers: Signers) -> None:
    image = skeleton.image()
    first = image.runs[0]
    changed = replace(image, runs=(replace(first, data=first.data[:-1] + b"\x90"), *image.runs[1:]))  # type: ignore[index]
    enclave = sgx.platform.load(changed, sign_image(changed, signers.ours).to_bytes(), label="test")
    refused(lambda: enclave.enter(pack_request(Operation.INIT)), "tee.sgx.code")
    enclave.destroy()


# --- loading is refused


def test_einit_is_explained(sgx: Any, signers: Signers) -> None:
    """Linux says EPERM; what is wrong with the SIGSTRUCT is found here."""
    image, other = small_image(), small_image(b"other")
    good = sign_image(image, signers.ours)
    cases = {
        "sgx.einit.enclavehash": sign_image(other, signers.ours),
        "sgx.sigstruct.signature": replace(good, signature=bytes([good.signature[0] ^ 1]) + good.signature[1:]),
        "sgx.einit.attributes": sign_image(
            image, signers.ours, attributes=image.attributes | ATTRIBUTE_DEBUG, attribute_mask=(1 << 64) - 1
        ),
    }
    for id, signed in cases.items():
        refused(lambda: sgx.platform.load(image, signed.to_bytes(), label="x"), id, kind=IntegrityError)  # noqa: B023
        assert not sgx.files and not sgx.reserved
    sgx.failures["INIT"] = [errno.EPERM]
    refused(lambda: sgx.platform.load(image, good.to_bytes(), label="x"), "tee.sgx.einit", kind=IntegrityError)
    wrong = sign_image(image, signers.ours, miscselect=1)
    sgx.failures["INIT"] = [errno.EPERM]
    refused(lambda: sgx.platform.load(image, wrong.to_bytes(), label="x"), "sgx.einit.miscselect", kind=IntegrityError)


def test_a_sigstruct_that_is_none(sgx: Any) -> None:
    refused(
        lambda: sgx.platform.load(small_image(), bytes(1808), label="x"), "sgx.sigstruct.constant", kind=IntegrityError
    )


def test_features_that_the_processor_lacks(sgx: Any, signers: Signers) -> None:
    image = replace(small_image(), xfrm=3 | 1 << 18)
    signed = sign_image(image, signers.ours, xfrm_mask=3)
    refused(lambda: sgx.platform.load(image, signed.to_bytes(), label="x"), "tee.sgx.feature", found="XFRM 0x40000")


def test_a_full_epc_leaves_nothing_behind(sgx: Any, signers: Signers) -> None:
    sgx.free = 3
    image = small_image()
    refused(
        lambda: sgx.platform.load(image, sign_image(image, signers.ours).to_bytes(), label="x"),
        "tee.epc.full",
        kind=ResourceError,
    )
    assert not sgx.files and not sgx.reserved and sgx.free == 3


# --- quotes


@pytest.fixture
def aesm(sgx: Any, platform: SimulatedPlatform) -> Iterator[AesmService]:
    with AesmService(sgx.root / "var/run/aesmd/aesm.socket") as made:
        made.answers = {
            21: lambda _: {2: 1},
            22: lambda _: {2: key_id(2)},
            15: lambda _: {2: platform.quote_target_info()},
            16: lambda _: {2: 8192},
            17: lambda fields: {2: platform.quote(fields[1]).ljust(8192, b"\0")},  # type: ignore[arg-type]
        }
        yield made


def test_a_quote_of_the_skeleton_verifies(
    sgx: Any, run: Callable[..., HardwareEnclave], aesm: AesmService, platform: SimulatedPlatform
) -> None:
    """The enclave's own EREPORT, quoted by the quoting enclave, checked by the verifier down to the root."""
    from inclavare.attestation import Evidence, Policy, verify

    enclave = run()
    data = b"bound".ljust(64, b"\0")
    quote = sgx.platform.quote(enclave.report(sgx.platform.quote_target_info(), data))
    assert ReportBody.from_bytes(Quote.from_bytes(quote).body).mrenclave == enclave.mrenclave
    evidence = Evidence.from_quote(quote, platform.collateral())
    policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
    assert verify(evidence, policy, report_data=b"bound").accepted


def test_without_aesm_there_are_no_quotes(sgx: Any, run: Callable[..., HardwareEnclave]) -> None:
    refused(sgx.platform.quote_target_info, "tee.aesm.unreachable")
    refused(lambda: sgx.platform.quote(bytes(432)), "tee.aesm.unreachable")


def test_collateral_takes_a_pccs_and_a_quote(
    sgx: Any, run: Callable[..., HardwareEnclave], aesm: AesmService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inclavare.tee.sgx import pccs

    refused(sgx.platform.collateral, "tee.sgx.pccs")
    (sgx.root / "etc").mkdir()
    (sgx.root / pccs.CONFIGURATION).write_text('{"pccs_url": "https://pccs.example/v4", "use_secure_cert": false}')
    refused(sgx.platform.collateral, "tee.sgx.noquote")
    quote = sgx.platform.quote(run().report(sgx.platform.quote_target_info(), bytes(64)))
    asked = []

    def fetch(url: str, given: bytes, *, check_certificate: bool) -> dict[str, str]:
        asked.append((url, given, check_certificate))
        return {"tcb_info": "{}"}

    monkeypatch.setattr(pccs, "collateral", fetch)
    assert sgx.platform.collateral() == {"tcb_info": "{}"}
    assert asked == [("https://pccs.example/v4/", quote, False)]


def test_the_root_is_intels(sgx: Any, vectors: Path) -> None:
    assert sgx.platform.root_ca() == INTEL_ROOT_CA == (vectors / "collateral/intel_sgx_root_ca.der").read_bytes()


def test_a_request_that_is_none(run: Callable[..., HardwareEnclave]) -> None:
    enclave = run()
    refused(lambda: unpack_response(enclave.enter(bytes(16))), "tee.skeleton.state", kind=UsageError)
    refused(lambda: unpack_response(enclave.enter(b"x" * 24)), "tee.skeleton.request", kind=UsageError)

"""The skeleton enclave: its bytes are its source's, and what it does holds against a hostile host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_enclaves import Signers, sign_image

from inclavare.errors import EvidenceError, InclavareError, PlatformError
from inclavare.sgx import report
from inclavare.sgx.image import PAGE_SIZE
from inclavare.sgx.keys import POLICY_MRENCLAVE, POLICY_MRSIGNER, RootKeys, egetkey
from inclavare.sgx.measure import measure
from inclavare.sgx.structs import ATTRIBUTE_DEBUG, Sigstruct, TargetInfo
from inclavare.tee import skeleton
from inclavare.tee.sgx_sim.emulator import EmulatedEnclave, Reason
from inclavare.tee.sgx_sim.processor import Processor, Registers
from inclavare.tee.skeleton import protocol
from inclavare.tee.skeleton.protocol import Client, Operation, Status

unicorn = pytest.importorskip("unicorn", reason="needs the extra emulator")

FILES = Path(skeleton.__file__).parent
ROOTS = RootKeys(bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48)), bytes((2, 2, 1)) + bytes(13))
OTHER_ROOTS = replace(ROOTS, seal=bytes(16))
NOBODY = TargetInfo(bytes(32), bytes(16))

Start = Callable[..., EmulatedEnclave]


@pytest.fixture(scope="session")
def start(signers: Signers) -> Start:
    """Load the skeleton on a new processor: ``start(roots, debug=, key=, change=, **signing overrides)``."""
    signed: dict[object, Sigstruct] = {}

    def starter(
        roots: RootKeys = ROOTS, *, debug: bool = False, theirs: bool = False, change: bool = False, isv_svn: int = 3
    ) -> EmulatedEnclave:
        image = skeleton.image(debug=debug)
        if change:
            # Another enclave of the same signer: one more byte in a page that is zero.
            code = image.runs[0].data
            assert code is not None
            image = replace(image, runs=(replace(image.runs[0], data=code[:-1] + b"\1"), *image.runs[1:]))
        what = (debug, theirs, change, isv_svn)
        if what not in signed:
            signed[what] = sign_image(image, signers.theirs if theirs else signers.ours, isv_svn=isv_svn)
        return EmulatedEnclave.load(Processor(roots, epc_pages=64), image, signed[what].to_bytes())

    return starter


def initialised(enclave: EmulatedEnclave) -> Client:
    client = Client(enclave.call)
    client.init()
    return client


@pytest.fixture
def enclave(start: Start) -> EmulatedEnclave:
    return start()


@pytest.fixture
def client(enclave: EmulatedEnclave) -> Client:
    return initialised(enclave)


def refused(client: Client, operation: int, payload: bytes = b"") -> str:
    with pytest.raises(InclavareError) as caught:
        client.ask(operation, payload)
    return caught.value.id.removeprefix("tee.skeleton.")


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_prebuilt_bytes_are_the_source_s(tmp_path: Path) -> None:
    tools = [shutil.which(name) for name in ("as", "objcopy")]
    if None in tools:
        pytest.skip("GNU as or objcopy is not there")
    options = ["-mlfence-after-load=yes", "-mlfence-before-ret=shl"]
    source, built = tmp_path / "skeleton.o", tmp_path / "skeleton.bin"
    assembled = subprocess.run(
        ["as", *options, "-o", source, FILES / "skeleton.S"], capture_output=True, text=True, check=False
    )
    if "unrecognized option" in assembled.stderr:
        pytest.skip("this GNU as cannot put LFENCE behind loads")
    assert assembled.returncode == 0, assembled.stderr
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", source, built], check=True)
    assert built.read_bytes() == skeleton.code()


def test_listing_is_of_the_same_bytes() -> None:
    listing = (FILES / "skeleton.lst").read_text(encoding="utf-8")
    listed = bytearray(PAGE_SIZE)
    for offset, data in re.findall(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )*[0-9a-f]{2})\s", listing, re.MULTILINE):
        start = int(offset, 16)
        raw = bytes.fromhex(data)
        listed[start : start + len(raw)] = raw
    assert bytes(listed) == skeleton.code()


def test_symbols() -> None:
    names = set(skeleton.symbols().values())
    assert {"entry", "exception", "op_seal", "deliberate", "repaired"} <= names
    assert skeleton.symbols()[0] == "entry"


def test_code_needs_no_relocation_and_no_unusual_instruction() -> None:
    """Only what every processor with SGX has, and no branch that data decides, but a debug operation's."""
    listing = (FILES / "skeleton.lst").read_text(encoding="utf-8")
    mnemonics = set(re.findall(r"^ *[0-9a-f]+:\t(?:[0-9a-f]{2} )+\s*\t(?:rep )?(\w+)", listing, re.MULTILINE))
    assert not {name for name in mnemonics if name.startswith("v")}
    indirect = re.findall(r"\t(?:jmp|call) +(?:QWORD|r[a-z0-9]+)\b.*", listing)
    assert indirect == []


def test_loads_are_fenced() -> None:
    """Behind each load comes an LFENCE (LVI); string moves cannot be fenced within and are followed by one or a load."""
    listing = (FILES / "skeleton.lst").read_text(encoding="utf-8")
    lines = re.findall(r"^ *[0-9a-f]+:\t(?:[0-9a-f]{2} )+\s*\t(.*)$", listing, re.MULTILINE)
    loads = [
        number
        for number, text in enumerate(lines)
        if re.match(r"mov(dqa|dqu)? +(?!QWORD|DWORD|WORD|BYTE|XMMWORD)\w+,(QWORD|DWORD|WORD|BYTE|XMMWORD) PTR", text)
    ]
    assert len(loads) > 40
    assert all(lines[number + 1].startswith("lfence") for number in loads)


def test_image(signers: Signers) -> None:
    image = skeleton.image()
    assert image.page_count == 11
    assert measure(image) == measure(skeleton.image(debug=True))
    assert skeleton.image(debug=True).attributes == image.attributes | ATTRIBUTE_DEBUG
    assert not any(one.offset <= 0x6000 < one.end for one in image.runs), "no guard page below the stack"


# --- operations ----------------------------------------------------------------------------------------------------


def test_nothing_before_init_and_init_once(enclave: EmulatedEnclave) -> None:
    client = Client(enclave.call)
    assert refused(client, Operation.ECHO, b"x") == "state"
    name = client.init()
    assert len(name) == 16
    assert refused(client, Operation.INIT) == "state"
    assert client.info() == (name, 1)
    assert client.info() == (name, 2)


def test_instances_differ(start: Start) -> None:
    assert Client(start().call).init() != Client(start().call).init()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4096, protocol.MAX_PAYLOAD])
def test_echo(client: Client, size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    assert client.echo(data) == data


def test_report_is_for_its_target(enclave: EmulatedEnclave, start: Start) -> None:
    client, processor = initialised(enclave), enclave.machine.logical.processor
    own = processor.secs(enclave.loaded.secs_page).identity
    made = client.report(report.target_info(own), b"data of mine")
    body = report.verify(ROOTS, own, made)
    assert body.mrenclave == measure(skeleton.image())
    assert body.report_data == b"data of mine".ljust(64, b"\0")
    other = start(debug=True)
    stranger = other.machine.logical.processor.secs(other.loaded.secs_page).identity
    with pytest.raises(EvidenceError):
        report.verify(ROOTS, stranger, made)


def test_unknown_and_debug_operations(client: Client) -> None:
    assert refused(client, 99) == "operation"
    assert refused(client, 0) == "operation"
    for operation in (Operation.UD2, Operation.PEEK, Operation.POKE, Operation.JUMP, Operation.SPIN, 255):
        assert refused(client, operation, bytes(16)) == "debug"


@pytest.mark.parametrize(
    ("operation", "payload"),
    [
        (Operation.INFO, b"x"),
        (Operation.REPORT, bytes(575)),
        (Operation.REPORT, bytes(577)),
        (Operation.SEAL, bytes(7)),
        (Operation.SEAL, b"\0\0\0\0" + bytes(4)),
        (Operation.SEAL, b"\3\0\0\0" + bytes(4)),
        (Operation.SEAL, b"\1\0\0\0\1\0\0\0"),
        (Operation.SEAL, b"\1\0\0\0\xff\xff\xff\xff"),
        (Operation.UNSEAL, bytes(8 + protocol.SEAL_OVERHEAD - 1)),
        (Operation.UNSEAL, b"\1\0\0\0\0\0\0\0" + bytes(protocol.SEAL_OVERHEAD)),
        (Operation.UNSEAL, b"\0\0\0\0\xff\xff\xff\xff" + bytes(protocol.SEAL_OVERHEAD)),
        (Operation.UNSEAL, bytes(8 + protocol.SEAL_OVERHEAD)),
    ],
)
def test_malformed_payload(client: Client, operation: int, payload: bytes) -> None:
    assert refused(client, operation, payload) == "request"
    assert client.echo(b"goes on") == b"goes on"


# --- sealing -------------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=200), additional=st.binary(max_size=64))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sealed_data_is_aes_gcm_under_egetkey(signers: Signers, data: bytes, additional: bytes) -> None:
    """What the assembly makes, the cryptography package opens, with the key that the architecture derives; and back."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    enclave, client = _shared(signers)
    sealed = client.seal(data, additional)
    assert len(sealed) == len(data) + protocol.SEAL_OVERHEAD
    request = protocol.key_request(sealed)
    assert request.key_policy == POLICY_MRENCLAVE
    identity = enclave.machine.logical.processor.secs(enclave.loaded.secs_page).identity
    cipher = AESGCM(egetkey(ROOTS, identity, request))
    header = sealed[: protocol.SEAL_HEADER]
    assert cipher.decrypt(sealed[516:528], sealed[protocol.SEAL_HEADER :], header + additional) == data
    made = header + cipher.encrypt(sealed[516:528], data[::-1], header + additional)
    assert client.unseal(made, additional) == data[::-1]


_kept: list[tuple[EmulatedEnclave, Client]] = []


def _shared(signers: Signers) -> tuple[EmulatedEnclave, Client]:
    if not _kept:
        image = skeleton.image()
        enclave = EmulatedEnclave.load(
            Processor(ROOTS, epc_pages=64), image, sign_image(image, signers.ours).to_bytes()
        )
        _kept.append((enclave, initialised(enclave)))
    return _kept[0]


@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 1000, 7000])
def test_sealed_sizes(client: Client, size: int) -> None:
    data = bytes(number % 253 for number in range(size))
    assert client.unseal(client.seal(data, b"for this")[:], b"for this") == data


def test_largest_sealed_data(client: Client) -> None:
    data = bytes(protocol.MAX_SEALED_DATA)
    assert len(client.seal(data)) == protocol.MAX_PAYLOAD
    assert refused(client, Operation.SEAL, protocol.pack_seal(data + b"x")) == "size"


def test_every_seal_has_its_own_key_and_iv(client: Client) -> None:
    one, two = client.seal(b"same"), client.seal(b"same")
    assert protocol.key_request(one).key_id != protocol.key_request(two).key_id
    assert one[516:528] != two[516:528]
    assert one[528:] != two[528:]


@given(position=st.integers(0, 543 + 20), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_sealed_data(signers: Signers, position: int, bit: int) -> None:
    _, client = _shared(signers)
    sealed = bytearray(client.seal(bytes(20), b"for"))
    sealed[position] ^= 1 << bit
    assert refused(client, Operation.UNSEAL, protocol.pack_unseal(bytes(sealed), b"for")) in (
        "authentication",
        "request",
        "key",
    )


def test_additional_data_is_bound(client: Client) -> None:
    sealed = client.seal(b"secret", b"one")
    assert refused(client, Operation.UNSEAL, protocol.pack_unseal(sealed, b"two")) == "authentication"
    # Moved from the data to the additional data: the lengths are authenticated, too.
    assert refused(client, Operation.UNSEAL, protocol.pack_unseal(sealed, b"one" + sealed[528:529])) != ""
    assert client.unseal(sealed, b"one") == b"secret"


def test_new_session_of_the_same_processor_opens(start: Start) -> None:
    sealed = initialised(start()).seal(b"secret")
    assert initialised(start()).unseal(sealed) == b"secret"


@pytest.mark.parametrize("policy", [POLICY_MRENCLAVE, POLICY_MRSIGNER])
def test_other_fuses_do_not(start: Start, policy: int) -> None:
    sealed = initialised(start()).seal(b"secret", policy=policy)
    assert refused(initialised(start(OTHER_ROOTS)), Operation.UNSEAL, protocol.pack_unseal(sealed)) == "authentication"


def test_another_enclave_of_the_signer(start: Start) -> None:
    client, other = initialised(start()), initialised(start(change=True))
    to_enclave, to_signer = client.seal(b"mine"), client.seal(b"ours", policy=POLICY_MRSIGNER)
    assert refused(other, Operation.UNSEAL, protocol.pack_unseal(to_enclave)) == "authentication"
    assert other.unseal(to_signer) == b"ours"


def test_another_signer(start: Start) -> None:
    client, other = initialised(start()), initialised(start(theirs=True))
    to_enclave, to_signer = client.seal(b"same code"), client.seal(b"ours", policy=POLICY_MRSIGNER)
    assert other.unseal(to_enclave) == b"same code"
    assert refused(other, Operation.UNSEAL, protocol.pack_unseal(to_signer)) == "authentication"


@pytest.mark.parametrize("policy", [POLICY_MRENCLAVE, POLICY_MRSIGNER])
def test_debug_enclave_opens_nothing(start: Start, policy: int) -> None:
    sealed = initialised(start()).seal(b"secret", policy=policy)
    debug = initialised(start(debug=True))
    assert refused(debug, Operation.UNSEAL, protocol.pack_unseal(sealed)) == "authentication"


def test_newer_version_opens_older_does_not(start: Start) -> None:
    older, newer = initialised(start(isv_svn=3)), initialised(start(isv_svn=4))
    assert newer.unseal(older.seal(b"old", policy=POLICY_MRSIGNER)) == b"old"
    sealed = newer.seal(b"new", policy=POLICY_MRSIGNER)
    with pytest.raises(InclavareError) as caught:
        older.unseal(sealed)
    assert caught.value.id == "tee.skeleton.key"
    assert caught.value.found == "SGX error 64"


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\3\0"),
        (2, b"\0\0"),
        (2, b"\3\0"),
        (2, b"\4\0"),
        (24, bytes(16)),
        (24, b"\xff" * 16),
        (72, bytes(4)),
        (6, b"\1"),
        (7, b"\1"),
        (76, b"\1"),
        (80, b"\1"),
        (511, b"\1"),
    ],
    ids=[
        "report key",
        "no policy",
        "both",
        "KSS",
        "no attributes",
        "all attributes",
        "no MISCSELECT",
        "CET",
        "reserved 7",
        "CONFIGSVN",
        "reserved 80",
        "reserved 511",
    ],
)
def test_key_that_others_could_have(client: Client, offset: int, value: bytes) -> None:
    sealed = client.seal(b"secret")
    forged = sealed[:offset] + value + sealed[offset + len(value) :]
    assert refused(client, Operation.UNSEAL, protocol.pack_unseal(forged)) == "request"


# --- against the host ----------------------------------------------------------------------------------------------


def entered(enclave: EmulatedEnclave, **registers: int) -> int:
    """Status in RDI after an entry with these registers."""
    stop = enclave.enter(**registers)
    assert stop.reason is Reason.REACHED, stop
    return enclave.machine.logical.registers.rdi


def test_buffers_inside_of_the_enclave(enclave: EmulatedEnclave) -> None:
    client, base = initialised(enclave), enclave.loaded.base
    request = protocol.pack_request(Operation.ECHO, b"x" * 8)
    enclave.machine.space.poke(enclave.request_address, request)
    good = {"rdi": enclave.request_address, "rsi": len(request), "rdx": enclave.response_address, "r8": 64}
    assert entered(enclave, **good) == Status.OK
    ends = (base, base + skeleton.SIZE - 64, base - 8, base - 64 + 8, base + skeleton.DATA, base + skeleton.SIZE - 8)
    for inside in ends:
        assert entered(enclave, **{**good, "rdx": inside}) == Status.BUFFER, hex(inside)
    for inside in (base, base + skeleton.SIZE - len(request), base - 8, base + skeleton.INPUT):
        assert entered(enclave, **{**good, "rdi": inside}) == Status.REQUEST, hex(inside)
    for wrong in (
        {"rdx": good["rdx"] + 4},
        {"r8": 8},
        {"r8": 63},
        {"rdx": (1 << 64) - 8},
        {"rdx": base - 64, "r8": 1 << 63},
    ):
        assert entered(enclave, **{**good, **wrong}) == Status.BUFFER, wrong
    for wrong in (
        {"rdi": good["rdi"] + 4},
        {"rsi": 8},
        {"rsi": len(request) - 1},
        {"rsi": protocol.MAX_MESSAGE + 8},
        {"rdi": (1 << 64) - 8},
        {"rsi": (1 << 64) - 8},
        {"rsi": len(request) + 8},
    ):
        assert entered(enclave, **{**good, **wrong}) == Status.REQUEST, wrong
    assert client.echo(b"goes on") == b"goes on"


def test_buffers_that_touch_the_enclave(enclave: EmulatedEnclave) -> None:
    initialised(enclave)
    space, base = enclave.machine.space, enclave.loaded.base
    space.map_ram(base - PAGE_SIZE, PAGE_SIZE)
    space.map_ram(base + skeleton.SIZE, PAGE_SIZE)
    request = protocol.pack_request(Operation.ECHO, b"touching")
    space.poke(base - len(request), request)
    assert entered(enclave, rdi=base - len(request), rsi=len(request), rdx=base + skeleton.SIZE, r8=32) == Status.OK
    assert space.peek(base + skeleton.SIZE, 24).endswith(b"touching")


def test_response_that_does_not_fit(enclave: EmulatedEnclave) -> None:
    client = initialised(enclave)
    request = protocol.pack_request(Operation.ECHO, b"x" * 100)
    with pytest.raises(InclavareError) as caught:
        protocol.unpack_response(enclave.call(request, capacity=64))
    assert caught.value.id == "tee.skeleton.size"
    assert client.echo(b"") == b""


def test_request_is_read_once(enclave: EmulatedEnclave) -> None:
    """Whatever the host changes while the enclave works comes too late: every request page is read exactly once."""
    client = initialised(enclave)
    sealed = client.seal(b"secret", b"for")
    enclave.machine.interrupt_every = 1
    request = protocol.pack_request(Operation.UNSEAL, protocol.pack_unseal(sealed, b"for"))
    copied = False

    def change(_event: object) -> None:
        nonlocal copied
        registers = enclave.machine.logical.registers
        if not enclave.machine.logical.enclave_mode and registers.rip == enclave.aep:
            saved = _saved_rip(enclave) - enclave.loaded.base
            copied = copied or saved == _after_copy()
            if copied:
                enclave.machine.space.poke(enclave.request_address, bytes(len(request)))
                enclave.machine.interrupt_every = None

    enclave.machine.logical.processor.observers.append(change)
    assert protocol.unpack_response(enclave.call(request)) == b"secret"
    assert copied


def _saved_rip(enclave: EmulatedEnclave) -> int:
    page = enclave.loaded.pages[enclave.loaded.base + skeleton.SSA].epc_page
    assert page is not None
    frame = enclave.machine.logical.processor.read_epc(page)
    return int.from_bytes(frame[PAGE_SIZE - 184 + 136 :][:8], "little")


def _after_copy() -> int:
    """Offset of the instruction behind the first string move, which is the copy of the request."""
    return skeleton.code().index(bytes.fromhex("f348a5")) + 3


def test_exit_leaves_nothing_in_registers(enclave: EmulatedEnclave) -> None:
    client = initialised(enclave)
    client.unseal(client.seal(b"0123456789abcdef" * 8))
    registers = enclave.machine.logical.registers
    assert registers.rdi == Status.OK
    assert registers.rsi == 128
    assert registers.rbx == enclave.host_base + 3
    assert registers.rcx == enclave.aep
    assert registers.rax == 4
    for name in ("rdx", "r8", "r9", "r10", "r11"):
        assert getattr(registers, name) == 0, name
    assert not any(registers.xsave[160:416])
    assert registers.rflags & 0x40CD5 == 0x44


def test_exit_gives_the_host_its_registers_back(enclave: EmulatedEnclave) -> None:
    client = initialised(enclave)
    registers = enclave.machine.logical.registers
    kept = {"r12": 12, "r13": 13, "r14": 14, "r15": 15}
    for name, value in kept.items():
        setattr(registers, name, value)
    mxcsr = bytearray(registers.xsave)
    mxcsr[24:28] = (0x3F80).to_bytes(4, "little")
    mxcsr[0:2] = (0x027F).to_bytes(2, "little")
    registers.xsave = bytes(mxcsr)
    client.unseal(client.seal(b"secret"))
    assert {name: getattr(registers, name) for name in kept} == kept
    assert (registers.rsp, registers.rbp) == (enclave.request_address, enclave.request_address)
    assert registers.xsave[24:28] == mxcsr[24:28]
    assert registers.xsave[0:2] == mxcsr[0:2]


def test_host_s_flags_do_not_matter(client: Client, enclave: EmulatedEnclave) -> None:
    """DF would turn every copy around, AC would make unaligned accesses fault."""
    enclave.machine.logical.registers.rflags |= 0x40400
    assert client.echo(b"forwards") == b"forwards"
    assert enclave.machine.logical.registers.rflags & 0x40400 == 0


def test_nothing_of_an_operation_stays_in_the_enclave(enclave: EmulatedEnclave) -> None:
    client = initialised(enclave)
    secret = b"a secret of some length, not zero"
    sealed = client.seal(secret, b"for")
    client.unseal(sealed, b"for")
    with pytest.raises(InclavareError):
        protocol.unpack_response(
            enclave.call(protocol.pack_request(Operation.UNSEAL, protocol.pack_unseal(sealed, b"for")), capacity=16)
        )
    identity = enclave.machine.logical.processor.secs(enclave.loaded.secs_page).identity
    key = egetkey(ROOTS, identity, protocol.key_request(sealed))
    for page in enclave.loaded.pages.values():
        assert page.epc_page is not None
        contents = enclave.machine.logical.processor.read_epc(page.epc_page)
        assert secret not in contents
        assert key not in contents
        if page.linear - enclave.loaded.base in (skeleton.INPUT, skeleton.OUTPUT):
            assert not any(contents)


def test_asynchronous_exit_hides_the_registers(start: Start) -> None:
    enclave = start(debug=True)
    client = initialised(enclave)
    pattern, rounds = 0x1122_3344_5566_7788, 50
    seen = 0

    def look(_event: object) -> None:
        nonlocal seen
        logical = enclave.machine.logical
        if logical.enclave_mode or logical.registers.rip != enclave.aep:
            return
        seen += 1
        for entry in fields(Registers):
            value = getattr(logical.registers, entry.name)
            assert value != pattern
            assert not isinstance(value, bytes) or pattern.to_bytes(8, "little") not in value

    enclave.machine.interrupt_every = 20
    enclave.machine.logical.processor.observers.append(look)
    payload = rounds.to_bytes(8, "little") + pattern.to_bytes(8, "little")
    assert client.ask(Operation.SPIN, payload) == (rounds * pattern % (1 << 64)).to_bytes(8, "little")
    assert seen > 20


def test_exception_entry_repairs_its_own_fault(start: Start) -> None:
    client = initialised(start(debug=True))
    assert client.ask(Operation.UD2) == (1).to_bytes(8, "little")
    assert client.echo(b"goes on") == b"goes on"


def test_exception_entry_repairs_nothing_else(start: Start) -> None:
    enclave = start(debug=True)
    client = initialised(enclave)
    with pytest.raises(PlatformError) as caught:
        client.ask(Operation.JUMP, (enclave.loaded.base + skeleton.DATA).to_bytes(8, "little"))
    assert caught.value.id == "tee.emulator.exception"
    # The thread stays where it is: the exception entry refuses every further call.
    with pytest.raises(InclavareError) as refusal:
        client.echo(b"x")
    assert refusal.value.id == "tee.skeleton.exception"


def test_exception_entry_above_an_interrupt_changes_nothing(enclave: EmulatedEnclave) -> None:
    """The host may enter above any exit; only the deliberate fault is repaired."""
    client = initialised(enclave)
    machine = enclave.machine
    request = protocol.pack_request(Operation.ECHO, b"whole")
    machine.space.poke(enclave.request_address, request)
    machine.budget, machine.interrupt_every = 150, 140
    with pytest.raises(InclavareError, match="too long"):
        enclave.enter(rdi=enclave.request_address, rsi=len(request), rdx=enclave.response_address, r8=64)
    machine.budget, machine.interrupt_every = 100_000, None
    machine.logical.aex(32)
    before = _saved_rip(enclave)
    assert entered(enclave) == Status.EXCEPTION
    assert _saved_rip(enclave) == before
    assert enclave.resume().reason is Reason.REACHED
    assert machine.space.peek(enclave.response_address, 21)[16:] == b"whole"
    assert client.echo(b"goes on") == b"goes on"


def test_single_stepping_changes_nothing(enclave: EmulatedEnclave) -> None:
    client = initialised(enclave)
    sealed = client.seal(b"secret", b"for")
    enclave.machine.interrupt_every = 1
    assert client.unseal(sealed, b"for") == b"secret"
    assert client.echo(b"whole") == b"whole"


@pytest.mark.parametrize("every", [13, 100])
def test_interrupts_change_nothing(enclave: EmulatedEnclave, every: int) -> None:
    client = initialised(enclave)
    enclave.machine.interrupt_every = every
    sealed = client.seal(b"secret", b"for")
    assert client.report(NOBODY).body[64:96] == measure(skeleton.image())
    enclave.machine.interrupt_every = None
    assert client.unseal(sealed, b"for") == b"secret"


def test_state_survives_eviction(enclave: EmulatedEnclave) -> None:
    client = Client(enclave.call)
    name = client.init()
    for page in list(enclave.loaded.pages.values()):
        enclave.driver.evict(page)
    assert client.info() == (name, 1)


# --- protocol ------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=64))
def test_responses_that_are_none(data: bytes) -> None:
    try:
        payload = protocol.unpack_response(data)
    except InclavareError as error:
        assert error.id.startswith("tee.skeleton.")
    else:
        assert data[:4] == bytes(4)
        assert len(payload) == int.from_bytes(data[4:8], "little") <= len(data) - 16


def test_request_too_large() -> None:
    with pytest.raises(InclavareError) as caught:
        protocol.pack_request(Operation.ECHO, bytes(protocol.MAX_PAYLOAD + 1))
    assert caught.value.id == "tee.skeleton.size"


def test_every_status_has_a_meaning() -> None:
    for status in Status:
        if status is not Status.OK:
            assert protocol.refusal(status).id == f"tee.skeleton.{status.name.lower()}"
    assert protocol.refusal(77).id == "tee.skeleton.status"

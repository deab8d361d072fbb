"""``inclavare sgx trace``: runs an enclave's code on the software processor and shows what SGX does meanwhile."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import InclavareError, UsageError
from .._output import json_option

if TYPE_CHECKING:
    from ...sgx.image import EnclaveImage
    from ...tee.sgx_sim.emulator import EmulatedEnclave, Step
    from ...tee.skeleton.protocol import Client

    _Emit = Callable[[Step], None]

#: Pages of the software processor's EPC.
_EPC_PAGES = 4096
_DEFAULT_OPERATIONS = ("echo=hello", "report", "seal=secret", "unseal")
_HELP = """\
Run an enclave's code on the software processor and show what SGX does meanwhile.

Without ENCLAVE (an .sgxs stream), that is the skeleton enclave, and --op says what it is asked: echo=TEXT, report,
seal=TEXT, seal-signer=TEXT, unseal (what was sealed last), info; of a debug enclave also ud2, peek=ADDRESS,
poke=ADDRESS, jump=ADDRESS (addresses in the enclave as +OFFSET). Another enclave is entered once, with the registers
cleared.
"""


@click.command("trace", help=_HELP)
@click.argument("enclave", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--sigstruct",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The SIGSTRUCT of ENCLAVE.  [default: beside it]",
)
@click.option("--op", "operations", multiple=True, metavar="OP[=VALUE]", help="What to ask the skeleton; repeatable.")
@click.option("--debug", is_flag=True, help="Load the skeleton with ATTRIBUTES.DEBUG.")
@click.option("--aex-every", type=click.IntRange(min=1), metavar="N", help="An interrupt after N enclave instructions.")
@click.option("--evict", is_flag=True, help="Write the enclave's pages out (EWB) before each operation.")
@click.option("--instructions", is_flag=True, help="Show each instruction.")
@click.option(
    "--budget", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="Instructions a call."
)
@json_option
def command(
    *,
    enclave: Path | None,
    sigstruct: Path | None,
    operations: tuple[str, ...],
    debug: bool,
    aex_every: int | None,
    evict: bool,
    instructions: bool,
    budget: int,
    as_json: bool,
) -> None:
    """See ``_HELP``."""
    from ...config import load
    from ...tee.sgx_sim import fuses
    from ...tee.sgx_sim.emulator import EmulatedEnclave, Tracer, loading
    from ...tee.sgx_sim.processor import Processor
    from ...tee.skeleton import symbols

    if enclave is None and sigstruct is not None:
        raise UsageError(
            "a SIGSTRUCT needs its enclave", id="cli.trace.sigstruct", remedy="name the .sgxs stream that it signs"
        )
    if enclave is not None and (operations or debug):
        raise UsageError("--op and --debug are for the skeleton enclave", id="cli.trace.op")
    if enclave is None:
        image, signed = _skeleton(debug)
    else:
        image, signed = _read(enclave, sigstruct)
    processor = Processor(fuses.load(load().platform_dir), epc_pages=_EPC_PAGES)
    leaves: Counter[str] = Counter()
    processor.observers.append(lambda event: leaves.update((event.name,)))
    loaded = EmulatedEnclave.load(processor, image, signed)
    processor.observers.clear()
    loaded.machine.budget = budget
    loaded.machine.interrupt_every = aex_every

    def emit(step: Step) -> None:
        click.echo(json.dumps(_object(step), ensure_ascii=False) if as_json else _line(step))

    emit(loading(leaves, loaded))
    Tracer(loaded, emit, symbols=symbols() if enclave is None else None, instructions=instructions)
    if enclave is not None:
        _enter(loaded, emit, evict=evict)
        return
    _operate(loaded, operations or _DEFAULT_OPERATIONS, emit, evict=evict, as_json=as_json)


def _skeleton(debug: bool) -> tuple[EnclaveImage, bytes]:
    """The skeleton, signed with a key that is thrown away."""
    from ...enclave.signing import sign_once
    from ...tee import skeleton

    image = skeleton.image(debug=debug)
    return image, sign_once(image)


def _read(enclave: Path, sigstruct: Path | None) -> tuple[EnclaveImage, bytes]:
    from ._enclave_files import beside, open_enclave

    with enclave.open("rb") as file:
        if file.read(4) == b"\x7fELF":
            raise UsageError(
                f"{enclave} is a shared object, which is not traced",
                id="cli.trace.kind",
                expected="an .sgxs stream",
                remedy="for an enclave of Intel's SDK use inclavare sgx measure",
            )
    found = open_enclave(enclave, sigstruct)
    if found.sigstruct is None:
        raise UsageError(
            f"there is no SIGSTRUCT for {enclave}",
            id="cli.trace.sigstruct",
            expected=" or ".join(file.name for file in beside(enclave)),
            remedy="name it with --sigstruct, or make one with inclavare sgx sign",
        )
    return found.image(), found.sigstruct.to_bytes()


def _operate(enclave: EmulatedEnclave, operations: tuple[str, ...], emit: _Emit, *, evict: bool, as_json: bool) -> None:
    from ...tee.sgx_sim.emulator import Step
    from ...tee.skeleton.protocol import Client

    client = Client(enclave.call)
    sealed: list[bytes] = []
    for text in ("init", *operations):
        name, _, value = text.partition("=")
        if evict:
            _evict(enclave)
        emit(Step(enclave.machine.instructions, "CALL", {"operation": text}))
        try:
            answer = _ask(client, enclave, name, value, sealed)
        except InclavareError as error:
            emit(Step(enclave.machine.instructions, "REFUSED", {"id": error.id, "message": error.one_line()}))
            if as_json:
                # It is said already, in one line.
                raise click.exceptions.Exit(error.exit_code) from None
            raise
        emit(Step(enclave.machine.instructions, "ANSWER", {"answer": answer}))


def _ask(client: Client, enclave: EmulatedEnclave, name: str, value: str, sealed: list[bytes]) -> str:
    from ...sgx.keys import POLICY_MRENCLAVE, POLICY_MRSIGNER
    from ...sgx.report import target_info
    from ...tee.skeleton.protocol import Operation

    data = value.encode()
    if name == "init":
        return f"instance {client.init().hex()}"
    if name == "info":
        instance, calls = client.info()
        return f"instance {instance.hex()}, {calls} calls"
    if name == "echo":
        return repr(client.echo(data).decode())
    if name == "report":
        # Directed at the enclave itself.
        identity = enclave.machine.logical.processor.secs(enclave.loaded.secs_page).identity
        body = client.report(target_info(identity), data).body
        return f"REPORT, MRENCLAVE {body[64:96].hex()}"
    if name in ("seal", "seal-signer"):
        sealed.append(client.seal(data, policy=POLICY_MRENCLAVE if name == "seal" else POLICY_MRSIGNER))
        return f"{len(sealed[-1])} bytes"
    if name == "unseal":
        if not sealed:
            raise UsageError("nothing was sealed yet", id="cli.trace.op", found=name)
        return repr(client.unseal(sealed[-1]).decode())
    if name == "ud2":
        return client.ask(Operation.UD2).hex()
    if name in ("peek", "poke", "jump"):
        operation, more = Operation[name.upper()], bytes(8) if name == "poke" else b""
        return client.ask(operation, _address(enclave, value).to_bytes(8, "little") + more).hex()
    raise UsageError("there is no such operation", id="cli.trace.op", found=name, remedy="see --help")


def _address(enclave: EmulatedEnclave, text: str) -> int:
    try:
        base = enclave.loaded.base if text.startswith("+") else 0
        return (base + int(text.removeprefix("+"), 0)) % (1 << 64)
    except ValueError:
        raise UsageError("that is no address", id="cli.trace.op", found=text, expected="0x… or +0x…") from None


def _enter(enclave: EmulatedEnclave, emit: _Emit, *, evict: bool) -> None:
    from ...tee.sgx_sim.emulator import Reason, Step, unhandled

    if evict:
        _evict(enclave)
    stop = enclave.enter()
    if stop.reason is not Reason.REACHED:
        raise unhandled(stop.fault)
    registers = enclave.machine.logical.registers
    emit(Step(enclave.machine.instructions, "ANSWER", {"answer": f"rdi={registers.rdi:#x} rsi={registers.rsi:#x}"}))


def _evict(enclave: EmulatedEnclave) -> None:
    """Write out every page; EENTER itself misses the thread's."""
    for page in list(enclave.loaded.pages.values()):
        if page.epc_page is not None:
            enclave.driver.evict(page)


def _object(step: Step) -> dict[str, object]:
    return {"instructions": step.instructions, "event": step.event, "enclave": step.enclave, **step.fields}


def _line(step: Step) -> str:
    from .._output import printable

    count = f"{step.instructions:>9}"
    where = "│ " if step.enclave else ""
    if step.event == "INSTRUCTION":
        return f"{count}    {where}{step.fields['rip']}: {step.fields['text']}"
    if step.event == "LOADED":
        rows = [f"{count}  ECREATE…EINIT"]
        return "\n".join(rows + [f"{'':11}{name:11} {value}" for name, value in step.fields.items()])
    details = "  ".join(f"{name} {value}" for name, value in step.fields.items())
    return printable(f"{count}  {where}{step.event:9} {details}".encode())

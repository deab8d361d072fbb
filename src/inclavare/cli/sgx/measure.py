"""``inclavare sgx measure``: MRENCLAVE of an .sgxs stream, an enclave of Intel's SDK, or a Gramine manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .._output import Steps, json_option, print_fields, print_json
from ._enclave_files import libpal_option, open_enclave


@click.command("measure")
@click.argument("enclave", type=click.Path(path_type=Path))
@click.option(
    "--sigstruct",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Its SIGSTRUCT. [default: the one inside, or NAME.sig beside it]",
)
@libpal_option
@json_option
def command(*, enclave: Path, sigstruct: Path | None, libpal: Path | None, as_json: bool) -> None:
    """Compute MRENCLAVE of ENCLAVE, and compare it with its SIGSTRUCT, if there is one; - is an .sgxs stream.

    Exit code 7 if they differ, or if the SIGSTRUCT's signature does not hold. Container images are measured by
    `inclavare measure`.
    """
    from ...errors import IntegrityError
    from ...sgx.sigstruct import mrsigner, verify

    found = open_enclave(enclave, sigstruct, libpal)
    with Steps() as steps:
        steps.stage(f"measuring {'standard input' if str(enclave) == '-' else enclave}")
        mrenclave = found.measure(steps)
    result: dict[str, Any] = {"kind": found.kind, "mrenclave": mrenclave.hex()}
    problem: IntegrityError | None = None
    if found.sigstruct is not None:
        signed = found.sigstruct
        result |= {"sigstruct": str(found.sigstruct_path), "enclavehash": signed.enclave_hash.hex()}
        result["mrsigner"] = mrsigner(signed.modulus).hex()
        try:
            if signed.enclave_hash != mrenclave:
                raise IntegrityError(
                    "the SIGSTRUCT was made for another enclave",
                    id="sgx.measure.enclavehash",
                    found=mrenclave.hex(),
                    expected=signed.enclave_hash.hex(),
                    remedy="the enclave changed since it was signed: sign it again",
                )
            verify(signed)
        except IntegrityError as error:
            problem = error
            result["problem"] = error.to_dict()
        result["matches"] = problem is None
    if as_json:
        print_json(result)
    else:
        names = {
            "kind": "kind",
            "mrenclave": "MRENCLAVE",
            "enclavehash": "ENCLAVEHASH",
            "mrsigner": "MRSIGNER",
            "sigstruct": "SIGSTRUCT",
            "matches": "matches",
        }
        print_fields([(label, result[key]) for key, label in names.items() if key in result])
    if problem is not None:
        if as_json:
            click.get_current_context().exit(problem.exit_code)
        raise problem

"""``inclavare seal``: seal data to the enclave that this runs in."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ._files import FILE, output_option, read_input, write_output
from ._output import json_option, print_json

aad_options = (
    click.option("--aad", help="Additional data that must be given again to open it; not stored, not secret."),
    click.option("--aad-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="…from a file."),
)


def additional_data(aad: str | None, aad_file: Path | None) -> bytes:
    """The bytes of ``--aad`` or ``--aad-file``."""
    if aad is not None and aad_file is not None:
        raise click.UsageError("--aad and --aad-file exclude one another.")
    from ..sgx.sealing import MAX_SIZE

    if aad_file is not None:
        return read_input(aad_file, MAX_SIZE)
    return (aad or "").encode("utf-8", "surrogateescape")


@click.command("seal")
@click.argument("input_path", metavar="[FILE]", type=FILE, default="-")
@output_option
@click.option(
    "--policy",
    default="mrenclave",
    show_default=True,
    help="Who can open it: mrenclave, this enclave alone; mrsigner, its signer's enclaves of this product and security "
    "version, and newer ones. With KSS also mrsigner+noisvprodid, +configid, +isvfamilyid, +isvextprodid.",
)
@aad_options[0]
@aad_options[1]
@click.option("--counter", metavar="NAME", help="Bind it to this monotonic counter, so that older files are refused.")
@json_option
def command(
    *,
    input_path: Path,
    output_path: Path | None,
    policy: str,
    aad: str | None,
    aad_file: Path | None,
    counter: str | None,
    as_json: bool,
) -> None:
    """Seal FILE (default: standard input) to the enclave that this command runs in.

    Only this enclave, or with --policy mrsigner its signer's, can open the result, and only on this platform. The
    command works inside an enclave container: nobody else can derive its key, the host neither.

    With --counter, -o is needed: once the file is safely on the disk, all older ones are refused. A crash at any moment
    loses nothing: the file that is there then, old or new, still opens.
    """
    from ..sdk import seal
    from ..sgx.sealing import MAX_SIZE, Sealed

    if (counter is not None or as_json) and (output_path is None or str(output_path) == "-"):
        raise UsageError(
            "this needs a file to write to",
            id="cli.seal.output",
            found="standard output",
            expected="-o FILE",
            remedy="a counter moves on only once the file is safe" if counter else "--json takes standard output",
        )
    extra = additional_data(aad, aad_file)
    blob = seal.seal(read_input(input_path, MAX_SIZE), policy=policy, aad=extra, counter=counter)
    if counter is not None and output_path is not None:
        seal.store(output_path, blob)
    else:
        write_output(output_path, blob)
    if as_json:
        print_json({"sealed": str(output_path), **Sealed.parse(blob).describe()})

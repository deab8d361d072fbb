"""``inclavare sgx gen-token``: get a launch enclave's token (EINITTOKEN) for a signed enclave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .._fields import number
from .._files import FILE, read_input, write_output
from .._output import json_option, print_fields, print_json
from ._quotes import tee_option

if TYPE_CHECKING:
    from ...sgx.structs import Attributes, Sigstruct


@click.command("gen-token")
@click.option("--signature", type=FILE, required=True, help="The enclave's SIGSTRUCT, 1808 bytes.")
@click.option(
    "-o",
    "--token",
    "output",
    type=FILE,
    help="Where the EINITTOKEN goes, 304 bytes.  [default: the signature's name with .token instead of .sig]",
)
@tee_option
@click.option("--debug", is_flag=True, help="For a debug enclave, where the signer leaves DEBUG open.")
@click.option("--xfrm", type=number(64), help="The enclave's XFRM, where the signer leaves it open.")
@click.option("--verbose", is_flag=True, help="Show the token's fields.")
@json_option
def command(
    *,
    signature: Path,
    output: Path | None,
    tee: str,
    debug: bool,
    xfrm: int | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Get a token that permits the start of an enclave, as sgx-tools does.

    Processors with flexible launch control, which Linux's own driver needs, start enclaves without one.
    """
    from ...errors import UsageError
    from ...sgx import sigstruct
    from ...sgx.launch import EinitToken
    from ...sgx.structs import ATTRIBUTE_DEBUG, Attributes, Sigstruct

    signed = Sigstruct.from_bytes(read_input(signature, 1 << 16))
    sigstruct.verify(signed)
    allowed, mask = Attributes.from_bytes(signed.attributes), Attributes.from_bytes(signed.attribute_mask)
    attributes = Attributes(allowed.flags | (ATTRIBUTE_DEBUG if debug else 0), allowed.xfrm if xfrm is None else xfrm)
    if attributes.masked(mask) != allowed.masked(mask):
        raise UsageError(
            "the signer does not allow these attributes",
            id="sgx.token.attributes",
            found=f"flags {attributes.flags:#x}, XFRM {attributes.xfrm:#x}",
            expected=f"flags {allowed.flags:#x} under mask {mask.flags:#x}, "
            f"XFRM {allowed.xfrm:#x} under mask {mask.xfrm:#x}",
            remedy="leave out --debug and --xfrm, or sign the enclave again",
        )
    token = (_simulated if tee == "sgx-sim" else _hardware)(signed, attributes)
    if output is None:
        name = signature.name
        output = signature if name == "-" else signature.with_name(name.removesuffix(".sig") + ".token")
    write_output(output, token, mode=0o644)
    parsed = EinitToken.from_bytes(token)
    launch = Attributes.from_bytes(parsed.masked_attributes_le)
    fields = {
        "token": str(output),
        "valid": parsed.valid,
        "attributes": f"{attributes.flags:#x}",
        "xfrm": f"{attributes.xfrm:#x}",
        "mrenclave": parsed.mrenclave.hex(),
        "mrsigner": parsed.mrsigner.hex(),
        "cpusvn_le": parsed.cpusvn_le.hex(),
        "isv_prod_id_le": parsed.isv_prod_id_le,
        "isv_svn_le": parsed.isv_svn_le,
        "masked_miscselect_le": f"{parsed.masked_miscselect_le:#x}",
        "masked_attributes_le": f"{launch.flags:#x}",
        "key_id": parsed.key_id.hex(),
    }
    if str(output) == "-":
        return
    if as_json:
        print_json(fields)
    else:
        print_fields(fields.items() if verbose else [("token", output)])


def _simulated(signed: Sigstruct, attributes: Attributes) -> bytes:
    from ...config import load
    from ...sgx.sigstruct import mrsigner
    from ...tee.base import usable_platform
    from ...tee.sgx_sim import fuses, launch_enclave
    from ...tee.sgx_sim.cpu import Processor

    config = load()
    usable_platform("sgx-sim", config)
    token = launch_enclave.get_token(
        config.platform_dir,
        Processor(fuses.load(config.platform_dir)),
        mrenclave=signed.enclave_hash,
        mrsigner=mrsigner(signed.modulus),
        attributes=attributes,
    )
    return token.to_bytes()


def _hardware(signed: Sigstruct, attributes: Attributes) -> bytes:
    from ...errors import PlatformError
    from ...tee.sgx.aesm import Aesm
    from ...tee.sgx.cpuid import enumerate_sgx

    if enumerate_sgx().flc:
        raise PlatformError(
            "this processor has flexible launch control and needs no token",
            id="sgx.token.flc",
            remedy="load the enclave with its SIGSTRUCT alone; for the software platform add --tee sgx-sim",
        )
    return Aesm().launch_token(signed.enclave_hash, signed.modulus, attributes.to_bytes())

"""``inclavare sgx sign``: sign any SGX enclave, here or with a key that is kept elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from .._fields import hexadecimal, number
from .._files import FILE, output_option, read_input, write_output
from .._output import json_option, note, print_fields, print_json
from .._signing import service, service_options
from ._enclave_files import libpal_option

if TYPE_CHECKING:
    from ...sgx.structs import Sigstruct

_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


def _date(text: str) -> int:
    """A date as BCD."""
    import datetime

    try:
        return int(datetime.date.fromisoformat(text).strftime("%Y%m%d"), 16)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a date, yyyy-mm-dd") from None


#: SIGSTRUCT's fields that the signer chooses: type, and what it is.
_FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "attributes": (number(64), "ATTRIBUTES.FLAGS: 2 DEBUG, 4 MODE64BIT, 0x80 KSS…"),
    "attribute_mask": (number(64), "Which FLAGS are fixed.  [default: all]"),
    "xfrm": (number(64), "ATTRIBUTES.XFRM: 3 x87 and SSE, 7 with AVX, 0xe7 with AVX-512…"),
    "xfrm_mask": (number(64), "Which bits of XFRM are fixed.  [default: all]"),
    "miscselect": (number(32), "MISCSELECT: 1 EXINFO."),
    "misc_mask": (number(32), "Which bits of MISCSELECT are fixed.  [default: all]"),
    "isv_prod_id": (number(16), "Product id.  [default: 0]"),
    "isv_svn": (number(16), "Security version.  [default: 0]"),
    "date": (_date, "Signing date.  [default: today, or SOURCE_DATE_EPOCH]"),
    "vendor": (number(32), "0, or 0x8086 for Intel's own enclaves.  [default: 0]"),
    "swdefined": (number(32), "SWDEFINED.  [default: 0]"),
    "isv_family_id": (hexadecimal(16), "KSS: product family id."),
    "isv_ext_prod_id": (hexadecimal(16), "KSS: extended product id."),
    "cet_attributes": (number(8), "CET_ATTRIBUTES.  [default: 0]"),
    "cet_attributes_mask": (number(8), "Which bits of CET_ATTRIBUTES are fixed.  [default: 0]"),
}


#: What an SDK enclave's former SIGSTRUCT says and the new one says again. Not ATTRIBUTEMASK, which leaves DEBUG open.
_KEPT = (
    "miscselect",
    "misc_mask",
    "isv_prod_id",
    "isv_svn",
    "isv_family_id",
    "isv_ext_prod_id",
    "cet_attributes",
    "cet_attributes_mask",
)


def _field_options(function: Any) -> Any:
    for name, (kind, text) in reversed(_FIELDS.items()):
        function = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(function)
    return function


@click.command("sign")
@click.argument("source", required=False)
@click.option("--mrenclave", type=hexadecimal(32), help="Sign the enclave with this MRENCLAVE, instead of SOURCE.")
@output_option
@click.option("--key", "key_path", type=_EXISTING, help="Signing key: RSA-3072, exponent 3, PEM.")
@click.option("--gendata", type=FILE, help="Write the 256 bytes that a signer elsewhere signs, and nothing else.")
@click.option(
    "--catsig",
    nargs=2,
    type=_EXISTING,
    metavar="DATA SIGNATURE",
    help="Take a signature that was made elsewhere over the file from --gendata.",
)
@click.option("--public-key", type=_EXISTING, help="The signer's, PEM: for --catsig; expected of a signing service.")
@click.option("--config", type=_EXISTING, help="TOML with the fields below, named with underscores.")
@libpal_option
@click.option(
    "--manifest-out",
    type=FILE,
    help="Write the Gramine manifest with its trusted files' hashes (.manifest.sgx), and sign that.",
)
@_field_options
@service_options
@json_option
def command(
    *,
    source: str | None,
    libpal: Path | None,
    manifest_out: Path | None,
    mrenclave: bytes | None,
    output_path: Path | None,
    key_path: Path | None,
    gendata: Path | None,
    catsig: tuple[Path, Path] | None,
    public_key: Path | None,
    config: Path | None,
    signing_service: str | None,
    token_file: Path | None,
    ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Sign the enclave SOURCE: an SGXS stream (- for standard input), a shared object of Intel's SDK, or a Gramine
    manifest together with --libpal.

    Fields that are not given come from the Gramine manifest, or from an SDK enclave's metadata and former SIGSTRUCT;
    else they are MODE64BIT, XFRM 3, MISCSELECT 0. All ATTRIBUTES are fixed, DEBUG among them, unless --attribute-mask
    says otherwise.

    \b
    With a key that is kept elsewhere, as with sgx_sign:
      inclavare sgx sign enclave.sgxs --gendata data.bin
      openssl dgst -sha256 -sign key.pem -out signature.bin data.bin
      inclavare sgx sign --catsig data.bin signature.bin --public-key public.pem -o enclave.sig
    """
    from ...errors import IntegrityError
    from ...sgx import sigstruct

    remote = service(signing_service, token_file, ca, client_cert, client_key)
    if sum(way is not None for way in (key_path, gendata, catsig, remote)) != 1:
        raise click.UsageError("Give one of --key, --gendata, --catsig and --signing-service.")
    if source is not None and mrenclave is not None:
        raise click.UsageError("Give SOURCE or --mrenclave.")
    if manifest_out is not None and libpal is None:
        raise click.UsageError("--manifest-out needs --libpal.")
    fields = {name: value for name, value in chosen.items() if value is not None}
    if catsig is not None:
        if public_key is None:
            raise click.UsageError("--catsig needs --public-key.")
        if fields or config is not None:
            raise click.UsageError("With --catsig all fields are those of DATA.")
        data, signature = (read_input(path, 1 << 16) for path in catsig)
        signed = sigstruct.catsig(data, signature, sigstruct.public_modulus(public_key.read_bytes()))
        expected = _measure(source, libpal)[0] if source is not None else mrenclave
        if expected is not None and signed.enclave_hash != expected:
            raise IntegrityError(
                "DATA was made for another enclave",
                id="sgx.sign.enclavehash",
                found=signed.enclave_hash.hex(),
                expected=expected.hex(),
            )
        _finish(signed, output_path, as_json)
        return
    if source is None and mrenclave is None:
        raise click.UsageError("Give SOURCE or --mrenclave.")
    if public_key is not None and remote is None:
        raise click.UsageError("--public-key belongs to --catsig and --signing-service.")
    measured, own = _measure(source, libpal, manifest_out) if source is not None else (mrenclave or b"", {})
    all_fields: Any = {**_defaults(), **own, **(_read(config) if config is not None else {}), **fields}
    _check_fields(all_fields)
    if key_path is not None:
        from ...enclave.signing import load_key

        _finish(sigstruct.sign(measured, load_key(key_path), **all_fields), output_path, as_json)
        return
    data = sigstruct.unsigned(measured, **all_fields).signed_bytes()
    if gendata is not None:
        write_output(gendata, data, mode=0o644)
        if as_json:
            print_json({"data": str(gendata), "mrenclave": measured.hex()})
        elif str(gendata) != "-":
            note(f"sign {gendata} with RSA-3072 (exponent 3), PKCS#1 v1.5, SHA-256")
    elif remote is not None:
        _finish(remote.sign(data, public_key.read_bytes() if public_key else None), output_path, as_json)


def _check_fields(fields: dict[str, Any]) -> None:
    """Refuse a SIGSTRUCT that no processor accepts, whatever the enclave (SDM vol. 3D, ECREATE and EINIT)."""
    from ...errors import UsageError
    from ...sgx.structs import ATTRIBUTE_INIT, XFRM_LEGACY

    every = (1 << 64) - 1
    xfrm_mask = fields.get("xfrm_mask", every)
    for wrong, name, expected in (
        (fields.get("vendor", 0) not in (0, 0x8086), "vendor", "0 or 0x8086"),
        (
            fields["xfrm"] & xfrm_mask & XFRM_LEGACY != xfrm_mask & XFRM_LEGACY,
            "xfrm",
            "bits 0 and 1 (x87 and SSE) set: every enclave has them",
        ),
        (
            fields["attributes"] & fields.get("attribute_mask", every) & ATTRIBUTE_INIT,
            "attributes",
            "bit 0 (INIT) not set: the processor sets it after EINIT has compared",
        ),
    ):
        if wrong:
            raise UsageError(
                f"no processor accepts a SIGSTRUCT with this {name}",
                id=f"sgx.sign.{name}",
                found=f"{fields[name]:#x}",
                expected=expected,
                remedy=f"correct --{name}",
            )


def _measure(source: str, libpal: Path | None = None, manifest: Path | None = None) -> tuple[bytes, dict[str, Any]]:
    """MRENCLAVE, and the fields that the enclave's own format tells."""
    if libpal is not None:
        return _measure_gramine(Path(source), libpal, manifest)
    if source == "-":
        return _measure_stream(sys.stdin.buffer)
    with Path(source).open("rb") as file:
        if file.peek(4)[:4] != b"\x7fELF":
            return _measure_stream(file)
        from ...sgx.measure import measure
        from ...sgx.sdk import SdkEnclave
        from ...sgx.structs import Attributes

        enclave = SdkEnclave(file.read())
    image, before = enclave.image(), enclave.chosen.sigstruct
    own: dict[str, Any] = {"attributes": image.attributes, "xfrm": image.xfrm, "miscselect": image.miscselect}
    if before is not None:
        own |= {name: getattr(before, name) for name in _KEPT}
        own |= {
            "xfrm": Attributes.from_bytes(before.attributes).xfrm,
            "xfrm_mask": Attributes.from_bytes(before.attribute_mask).xfrm,
        }
    return measure(image), own


def _measure_gramine(source: Path, libpal: Path, manifest: Path | None) -> tuple[bytes, dict[str, Any]]:
    from ...enclave import gramine
    from ...sgx.measure import measure

    text = source.read_bytes()
    if manifest is not None:
        # Where Gramine is installed, its LibOS is one directory above the loader's.
        text = gramine.with_hashes(text, libos=libpal.resolve().parent.parent / "libsysdb.so")
        write_output(manifest, text, mode=0o644)
    else:
        gramine.require_hashes(text)
    return measure(gramine.image(text, libpal.read_bytes())), dict(gramine.sigstruct_fields(text))


def _measure_stream(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    from ...sgx.sgxs import Stream

    return Stream(file).measure(), {}


def _defaults() -> dict[str, int]:
    from ...enclave.signing import signing_date
    from ...sgx.structs import ATTRIBUTE_MODE64BIT, XFRM_LEGACY

    return {
        "attributes": ATTRIBUTE_MODE64BIT,
        "attribute_mask": (1 << 64) - 1,
        "xfrm": XFRM_LEGACY,
        "xfrm_mask": (1 << 64) - 1,
        "miscselect": 0,
        "misc_mask": (1 << 32) - 1,
        "isv_prod_id": 0,
        "isv_svn": 0,
        "date": signing_date(),
    }


def _read(path: Path) -> dict[str, Any]:
    """The fields of a TOML file.

    Raises:
        UsageError: not TOML, an unknown field, or a value that the field cannot have.
    """
    import tomllib

    from ...errors import UsageError

    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not TOML", id="sgx.sign.config", found=str(error)) from None
    found = {}
    for name, value in document.items():
        if name not in _FIELDS:
            raise UsageError(
                f"{path}: {name} is no field", id="sgx.sign.config", expected=", ".join(_FIELDS), remedy="correct it"
            )
        try:
            found[name] = _FIELDS[name][0](str(value))
        except click.BadParameter as error:
            raise UsageError(f"{path}: {name}: {error.message}", id="sgx.sign.config") from None
    return found


def _finish(signed: Sigstruct, output: Path | None, as_json: bool) -> None:
    from .._enclaves import sigstruct_fields

    raw = signed.to_bytes()
    to_stdout = output is None or str(output) == "-"
    if to_stdout and as_json:
        raise click.UsageError("With --json the SIGSTRUCT goes to a file: give -o.")
    write_output(output, raw, mode=0o644)
    if to_stdout:
        return
    fields = sigstruct_fields(raw)
    if as_json:
        print_json({"sigstruct": str(output), "mrenclave": fields.pop("enclave_hash"), **fields})
    else:
        names = (("MRENCLAVE", "enclave_hash"), ("MRSIGNER", "mrsigner"), ("date", "date"))
        print_fields([("SIGSTRUCT", output), *((label, fields[name]) for label, name in names)])

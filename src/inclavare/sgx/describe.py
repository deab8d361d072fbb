"""Any structure, quote or certificate as annotated rows: offset, size, field, value, meaning.

The rows of a structure or quote cover it completely, reserved bytes included; those of a certificate name its elements
that matter. Nothing is verified: :func:`describe` says what is written, not whether it is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InclavareError, UsageError
from . import certification, describe_certificate, launch, meanings, paging, quote, ssa, structs, tdx
from .rows import Row
from .structs import Structure, StructureError

#: Nothing described here is larger.
MAX_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of data.

    Attributes:
        title: for people.
        rows: takes the data apart; raises InclavareError or ValueError if it is of another kind.
        size: in bytes, for structures of a fixed size.
        plausible: whether data that has this form has a content that makes sense.
        loose: any bytes of this size have this form, so it is considered last.
        asked: never recognised, only used if it is asked for.
    """

    title: str
    rows: Callable[[bytes], list[Row]]
    size: int | None = None
    plausible: Callable[[bytes], bool] = bool
    loose: bool = False
    asked: bool = False


def describe(data: bytes, kind: str | None = None) -> tuple[str, list[Row]]:
    """The kind of ``data`` and its rows.

    Args:
        data: at most 1 MiB; certificates also as PEM.
        kind: one of ``KINDS``; recognised by size and content if it is not given.

    Raises:
        UsageError: ``sgx.describe.unknown`` or ``.ambiguous``: the kind cannot be told; ``.size``: too large.
        InclavareError: ``data`` is not of that kind; the structure's or quote's own refusal.
    """
    if len(data) > MAX_SIZE:
        raise UsageError(
            "the file is too large for any structure, quote or certificate",
            id="sgx.describe.size",
            found="more than 1 MiB",
            expected="at most 1 MiB",
        )
    name = recognise(data) if kind is None else kind
    return name, KINDS[name].rows(data)


def recognise(data: bytes) -> str:
    """The kind of ``data``, by its first bytes, its size, its reserved bytes and what its fields may hold.

    Raises:
        UsageError: ``sgx.describe.unknown`` or ``.ambiguous``.
    """
    of_size = [name for name, kind in KINDS.items() if kind.size == len(data) and not kind.asked]
    fitting = [name for name in KINDS if _fits(KINDS[name], data)]
    strict = [name for name in fitting if not KINDS[name].loose]
    # Zeros have every form of their size and mean nothing in any.
    candidates = (strict or fitting) if any(data) else of_size
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        # So that the kind that it nearly is says what is wrong with it.
        likely = of_size if len(of_size) == 1 else [name for start, name in _STARTS.items() if data.startswith(start)]
        if likely:
            return likely[0]
    names = ", ".join(candidates or of_size)
    raise UsageError(
        "it could be more than one thing"
        if candidates
        else "it is no structure, quote or certificate that is known here",
        id=f"sgx.describe.{'ambiguous' if candidates else 'unknown'}",
        found=names if candidates else f"{len(data)} bytes",
        expected="one kind" if candidates else names or "a structure of its exact size, a quote, a certificate",
        remedy="name the kind with --as"
        + (f": {names}" if names else "")
        + ("" if candidates or names else "; for a whole enclave (.sgxs, .so) use inclavare sgx measure"),
    )


#: First bytes of damaged data that are worth a guess.
_STARTS = {
    b"\3\0\2\0": "quote",
    b"\4\0\2\0": "quote",
    b"\5\0\2\0": "quote",
    b"-----BEGIN CERTIFICATE": "certificate",
    b"\x30\x82": "certificate",
}


def _fits(kind: Kind, data: bytes) -> bool:
    if kind.asked or kind.size not in (None, len(data)):
        return False
    try:
        kind.rows(data)
        return kind.plausible(data)
    except (InclavareError, ValueError):
        return False


def structure_rows(kind: type[Structure], data: bytes, base: int = 0, prefix: str = "") -> list[Row]:
    """Every field and every run of reserved bytes; structures in fields are taken apart as well.

    Raises:
        StructureError: see :meth:`Structure.from_bytes`.
    """
    layout = kind.LAYOUT
    values = layout.unpack(bytes(data))
    rows, at = [], 0
    for name, value in zip(layout.names, values, strict=True):
        offset, size = layout.offsets[name], layout.sizes[name]
        if offset > at:
            rows.append(Row(base + at, data[at:offset], f"{prefix}reserved"))
        at = offset + size
        nested = _NESTED.get((kind, name))
        if nested is not None:
            rows += structure_rows(nested, data[offset:at], base + offset, f"{prefix}{name}.")
        else:
            text = meanings.meaning(layout.name, name, value)
            rows.append(Row(base + offset, data[offset:at], prefix + name, text))
    if layout.size > at:
        rows.append(Row(base + at, data[at:], f"{prefix}reserved"))
    return rows


_NESTED: dict[tuple[type[Structure], str], type[Structure]] = {
    (structs.Report, "body"): structs.ReportBody,
    (tdx.TdReport, "report_mac_struct"): tdx.ReportMacStruct,
    (tdx.TdReport, "tee_tcb_info"): tdx.TeeTcbInfo,
    (tdx.TdReport, "td_info"): tdx.TdInfo,
}


class _Rows:
    """Rows one after the other."""

    def __init__(self, data: bytes) -> None:
        self.rows: list[Row] = []
        self._data = data
        self._at = 0

    def take(self, size: int, field: str, text: str = "") -> bytes:
        value = self._data[self._at : self._at + size]
        self.rows.append(Row(self._at, value, field, text))
        self._at += size
        return value

    def number(self, size: int, field: str, text: str | None = None) -> None:
        value = int.from_bytes(self._data[self._at : self._at + size], "little")
        self.take(size, field, str(value) if text is None else text)

    def structure(self, kind: type[Structure], prefix: str) -> None:
        size = kind.LAYOUT.size
        self.rows += structure_rows(kind, self._data[self._at : self._at + size], self._at, prefix)
        self._at += size


def _quote(data: bytes) -> list[Row]:
    """A quote, and the zeros that a service may have left behind it."""
    parsed, padding = quote.Quote.split(data)
    if any(padding):
        raise certification.refused("trailing", "bytes follow the quote", f"{len(padding)} bytes", "none, or zeros")
    rows = _Rows(data)
    rows.structure(quote.QuoteHeader, "header.")
    kind = parsed.body_type
    if parsed.header.version >= quote.VERSION_5:
        rows.number(2, "body_type", meanings.BODY_TYPES[kind])
        rows.number(4, "body_size")
    rows.structure(quote.BODIES[kind][1], "body.")
    rows.number(4, "signature_data_size")
    rows.take(64, "signature", "ECDSA P-256 r, s: by the attestation key, over all before signature_data_size")
    rows.take(64, "attestation_key", "ECDSA P-256 x, y")
    if parsed.header.version >= quote.VERSION_4:
        rows.number(2, "certification.type", certification.CERT_TYPES[certification.CERT_QE_REPORT])
        rows.number(4, "certification.size")
    rows.structure(structs.ReportBody, "qe_report.")
    rows.take(64, "qe_report_signature", "ECDSA P-256 r, s: by the PCK, over qe_report")
    rows.number(2, "qe_auth_data_size")
    rows.take(len(parsed.qe_auth_data), "qe_auth_data")
    rows.number(2, "cert_type", certification.CERT_TYPES.get(parsed.cert_type, f"unknown {parsed.cert_type}"))
    rows.number(4, "cert_data_size")
    rows.take(len(parsed.cert_data), "cert_data", _cert_data(parsed.cert_type, parsed.cert_data))
    if padding:
        rows.take(len(padding), "padding")
    return rows.rows


def _cert_data(cert_type: int, data: bytes) -> str:
    try:
        found = certification.parse(cert_type, data)
    except InclavareError as error:
        return error.message
    if isinstance(found, certification.PckIdentifier):
        return f"CPUSVN {found.cpusvn.hex()}, PCESVN {found.pce_svn}, PCE-ID {found.pce_id.hex()}"
    if isinstance(found, tuple):
        return describe_certificate.summary(found)
    return ""


def _ssa(data: bytes) -> list[Row]:
    """An SSA frame: what lies between XSAVE's header and EXINFO depends on XFRM, which a frame does not name."""
    misc = len(data) - ssa.GPRSGX_SIZE - ssa.EXINFO_SIZE
    if len(data) % paging.PAGE_SIZE or misc < ssa.XSAVE_MINIMUM:
        raise StructureError(
            "an SSA frame is whole pages", id="sgx.ssa.size", found=f"{len(data)} bytes", expected="a multiple of 4096"
        )
    rows = _Rows(data)
    rows.take(ssa.XSAVE_LEGACY_SIZE, "xsave.legacy", "x87 and SSE state")
    state = int.from_bytes(data[ssa.XSAVE_LEGACY_SIZE :][:8], "little")
    rows.take(8, "xsave.xstate_bv", meanings.bits(state, meanings.STATE))
    rows.take(ssa.XSAVE_MINIMUM - ssa.XSAVE_LEGACY_SIZE - 8, "xsave.header")
    rows.take(misc - ssa.XSAVE_MINIMUM, "xsave.extended", "extended state and padding")
    rows.structure(ssa.ExInfo, "misc.exinfo.")
    rows.structure(ssa.GprSgx, "gprsgx.")
    return rows.rows


def _certificate(data: bytes) -> list[Row]:
    if data.lstrip().startswith(b"-----BEGIN"):
        return describe_certificate.chain_rows(certification.certificates(data))
    return describe_certificate.certificate_rows(data)


def _plain(title: str, kind: type[Structure], plausible: Callable[[bytes], bool] = bool) -> Kind:
    layout = kind.LAYOUT
    loose = sum(layout.sizes.values()) == layout.size and plausible is bool
    return Kind(title, lambda data: structure_rows(kind, data), layout.size, plausible, loose)


def _attributes_plausible(data: bytes) -> bool:
    """Only defined flags, and the state that every enclave must name."""
    parsed = structs.Attributes.from_bytes(data)
    return not parsed.flags & ~structs.ATTRIBUTES_KNOWN and parsed.xfrm & structs.XFRM_LEGACY == structs.XFRM_LEGACY


def _secs_plausible(data: bytes) -> bool:
    size = structs.Secs.from_bytes(data).size
    return size.bit_count() == 1 and size >= 2 * paging.PAGE_SIZE


def _tcs_plausible(data: bytes) -> bool:
    tcs = structs.Tcs.from_bytes(data)
    return tcs.nssa > 0 and tcs.cssa <= tcs.nssa and tcs.ossa % paging.PAGE_SIZE == 0


def _key_request_plausible(data: bytes) -> bool:
    request = structs.KeyRequest.from_bytes(data)
    return request.key_name in meanings.KEY_NAMES and not request.key_policy & ~sum(meanings.KEY_POLICY)


def _td_info_plausible(data: bytes) -> bool:
    td = tdx.TdInfo.from_bytes(data)
    known = sum(meanings.STATE)
    return td.xfam & structs.XFRM_LEGACY == structs.XFRM_LEGACY and not td.xfam & ~known and any(td.mr_td)


KINDS: dict[str, Kind] = {
    "attributes": _plain("ATTRIBUTES", structs.Attributes, _attributes_plausible),
    "exinfo": _plain("EXINFO", ssa.ExInfo),
    "rdinfo": _plain("RDINFO", paging.RdInfo),
    "pageinfo": _plain("PAGEINFO", paging.PageInfo),
    "secinfo": _plain("SECINFO", structs.SecInfo),
    "pcmd": _plain("PCMD", paging.Pcmd),
    "gprsgx": _plain("GPRSGX", ssa.GprSgx),
    "einittoken": _plain("EINITTOKEN", launch.EinitToken),
    "report-body": _plain("report body", structs.ReportBody),
    "report": _plain("REPORT", structs.Report),
    "keyrequest": _plain("KEYREQUEST", structs.KeyRequest, _key_request_plausible),
    "targetinfo": _plain(
        "TARGETINFO", structs.TargetInfo, lambda data: _attributes_plausible(data[32:48]) and any(data[:32])
    ),
    "sigstruct": _plain("SIGSTRUCT", structs.Sigstruct),
    "secs": _plain("SECS", structs.Secs, _secs_plausible),
    "tcs": _plain("TCS", structs.Tcs, _tcs_plausible),
    "va": _plain("version array", paging.VersionArray),
    "ssa": Kind("SSA frame", _ssa, asked=True),
    "teetcbinfo": _plain("TEE_TCB_INFO", tdx.TeeTcbInfo),
    "reportmacstruct": _plain("REPORTMACSTRUCT", tdx.ReportMacStruct),
    "tdinfo": _plain("TDINFO_STRUCT", tdx.TdInfo, _td_info_plausible),
    "tdreport": _plain("TDREPORT_STRUCT", tdx.TdReport),
    "tdreport10": _plain("TD report 1.0", tdx.TdReport10),
    "tdreport15": _plain("TD report 1.5", tdx.TdReport15),
    "quote": Kind("quote", _quote),
    "pck-extension": Kind("SGX extension of a PCK certificate", describe_certificate.extension_rows),
    "certificate": Kind("X.509 certificate", _certificate),
}

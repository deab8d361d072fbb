"""What is fuzzed: every parser of bytes or text that comes from outside.

A target's ``parse`` may refuse with :class:`~inclavare.errors.InclavareError`. What it accepts is written again by
``write``, where the format has one form only, and must be the same bytes: damage that is accepted would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inclavare.errors import InclavareError

VECTORS = Path(__file__).resolve().parents[3] / "shared/vectors"


class Accepted(AssertionError):
    """Bytes were accepted that the parser's own writer would not have written."""


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    Attributes:
        parse: takes the input; refuses with an InclavareError.
        write: from what was parsed back to the same bytes; ``None`` where a value has several spellings.
        made: seeds that the project's own writers make.
        vectors: seeds from real data, as patterns below the vectors.
    """

    parse: Callable[[bytes], Any]
    write: Callable[[Any], bytes] | None = None
    made: Callable[[], list[bytes]] = list
    vectors: tuple[str, ...] = ()

    def run(self, data: bytes) -> None:
        """Parse one input."""
        try:
            parsed = self.parse(data)
        except InclavareError:
            return
        if self.write is not None and self.write(parsed) != data:
            raise Accepted(f"{len(data)} bytes were accepted and are written differently")

    def seeds(self) -> Iterator[bytes]:
        """Inputs to begin with."""
        yield from self.made()
        for pattern in self.vectors:
            for path in sorted(VECTORS.glob(pattern)):
                yield path.read_bytes()


def _text(parse: Callable[[str], Any]) -> Callable[[bytes], Any]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def _one(seed: bytes) -> Callable[[], list[bytes]]:
    return lambda: [seed]


def _structures() -> dict[str, Target]:
    """Every declared structure."""
    from inclavare.attestation.snp_report import VERSIONS
    from inclavare.sgx.structs import Structure

    found: dict[str, Target] = {}
    kinds = [Structure]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        layout = getattr(kind, "LAYOUT", None)
        if layout is None:
            continue
        seed = bytearray(layout.size)
        for name, value in layout.constants.items():
            seed[layout.offsets[name] : layout.offsets[name] + len(value)] = value
        if kind.__name__ == "SnpReport":
            at = layout.offsets["version"]
            seed[at : at + 4] = min(VERSIONS).to_bytes(4, "little")
        found[f"structure-{kind.__name__.lower()}"] = Target(kind.from_bytes, kind.to_bytes, made=_one(bytes(seed)))
    return found


def _manifests() -> list[bytes]:
    return [
        b'[enclave]\nsize = "64M"\nthreads = 4\ntee = ["sgx-sim"]\n[process]\nargs = ["/bin/true", "a"]\n'
        b'env = { A = "b" }\nuser = "1:2,3"\n[[files.encrypted]]\npath = "/v"\nkey = "sealed:mrenclave"\n'
        b'[exec]\ncommands = ["*", ["/bin/ls", "-l"]]\n[[secrets]]\nuri = "kbs:///a/b/c"\npath = "/run/k"\n'
    ]


def _canonical() -> list[bytes]:
    from inclavare.enclave.manifest import Manifest

    return [Manifest.parse(text.decode()).canonical() for text in _manifests()]


def _trees() -> list[bytes]:
    import tempfile

    from inclavare.enclave.tree import build

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "etc").mkdir()
        (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
        (root / "link").symlink_to("etc")
        return [build(root, cache=None, progress=None).to_bytes()]


def _sgxs() -> list[bytes]:
    import io

    from inclavare.sgx import sgxs
    from inclavare.tee import skeleton

    stream = io.BytesIO()
    sgxs.write(skeleton.image(), stream)
    return [stream.getvalue()]


def _sealed() -> list[bytes]:
    from inclavare.sgx import sealing
    from inclavare.sgx.keys import POLICY_MRENCLAVE
    from inclavare.sgx.structs import ReportBody

    identity = ReportBody.from_bytes(bytes(384))
    return [sealing.seal(b"state", sealing.new_request(identity, POLICY_MRENCLAVE), lambda _: bytes(16), aad=b"v1")]


def _gramine() -> list[bytes]:
    return [b'[sgx]\nenclave_size = "16M"\nmax_threads = 1\ndebug = true\n[sgx.cpu_features]\navx = "required"\n']


def _targets() -> dict[str, Target]:
    import io

    from inclavare.attestation import eventlog, references
    from inclavare.attestation.evidence import Evidence
    from inclavare.attestation.policy import Policy
    from inclavare.enclave.gramine import GramineManifest
    from inclavare.enclave.manifest import Manifest
    from inclavare.enclave.reference import Reference
    from inclavare.enclave.tree import Tree
    from inclavare.sgx import describe, sgxs
    from inclavare.sgx.certification import QeReportCertification, certificates
    from inclavare.sgx.elf import Elf
    from inclavare.sgx.pck import PckExtension
    from inclavare.sgx.quote import Quote
    from inclavare.sgx.sdk import SdkEnclave
    from inclavare.sgx.sealing import Sealed

    policy = b'mrenclave = ["' + b"ab" * 32 + b'"]\nsimulated = "allow"\ntcb = ["UpToDate"]\nmax_age = "1h"\n'
    return {
        "quote": Target(Quote.from_bytes, Quote.to_bytes, vectors=("sgx/*.bin", "tdx/*.bin", "tdx/*.dat")),
        "evidence": Target(Evidence.load, vectors=("sgx/phala*.bin", "ra-tls/*.pem")),
        "policy": Target(_text(Policy.parse), made=lambda: [policy]),
        "manifest": Target(_text(Manifest.parse), made=_manifests),
        "manifest-canonical": Target(Manifest.from_canonical, Manifest.canonical, made=_canonical),
        "certificates": Target(certificates, vectors=("ra-tls/*.pem",)),
        "describe": Target(describe.describe, vectors=("sgx/*.bin", "tdx/*.dat", "measure/*.sig")),
        "dsse": Target(
            references.envelope_payload, made=lambda: [b'{"payload":"e30=","payloadType":"x","signatures":[]}']
        ),
        "elf": Target(lambda data: list(Elf(data).relocations())),
        "event-log": Target(eventlog.parse, vectors=("ccel/*.dat",)),
        "gramine-manifest": Target(GramineManifest.parse, made=_gramine),
        "pck-extension": Target(PckExtension.from_bytes),
        "qe-certification": Target(QeReportCertification.from_bytes, QeReportCertification.to_bytes),
        "sdk-enclave": Target(lambda data: SdkEnclave(data).image()),
        "sealed": Target(Sealed.parse, made=_sealed),
        "sgxs": Target(lambda data: sgxs.Stream(io.BytesIO(data)).measure(), made=_sgxs, vectors=("measure/*.sgxs",)),
        "reference": Target(_text(Reference.parse), made=lambda: [b"oci:/a/b:tag", b"docker://localhost:5000/x:y"]),
        "tree": Target(Tree.from_bytes, Tree.to_bytes, made=_trees),
        **_structures(),
    }


TARGETS = _targets()

"""Measuring large enclaves beside openssl's bare SHA-256, and signing Gramine manifests beside gramine-sgx-sign.

    bench/measure.py [--json] [--rounds N]

EEXTEND hashes 5184 bytes for a page of 4096, so that 0.79 of openssl's rate is the most that can be had. Each work runs
in a process of its own, whose peak of resident memory is shown; what it reads is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from inclavare.enclave import gramine, signing
from inclavare.sgx import sgxs, sigstruct
from inclavare.sgx.image import PAGE_SIZE, PT_REG, SECINFO_R, SECINFO_W, EnclaveImage, PageRun, read_pages
from inclavare.sgx.measure import Measurement, measure
from inclavare.sgx.structs import ATTRIBUTE_MODE64BIT, XFRM_LEGACY

GIB = 1 << 30
_READ_WRITE = PT_REG | SECINFO_R | SECINFO_W
#: Any shared object will do as Gramine's loader.
_LOADER = next(
    line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if re.search(r"/libc[.-]\S*so", line)
)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        seconds: median of the rounds.
        rate: MB/s of pages, or of trusted files.
        ratio: the rate to openssl's in the same rounds, or the peer's seconds to these.
        peak: resident memory at its highest, MiB.
    """

    group: str
    name: str
    seconds: float
    rate: float | None
    ratio: float | None
    peak: float | None


def openssl_rate() -> float:
    """MB/s of SHA-256 as ``openssl speed`` measures it, one second of 16 KiB blocks."""
    done = subprocess.run(
        ["openssl", "speed", "-elapsed", "-bytes", "16384", "-seconds", "1", "sha256"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(re.findall(r"([\d.]+)k", done.stdout)[-1]) / 1000


def measuring(directory: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """MRENCLAVE of a GiB whose every page is measured: from a file, from zeros, from an .sgxs stream.

    Args:
        directory: has room for 1.3 GiB.
    """
    pages, stream = directory / "pages", directory / "enclave.sgxs"
    piece = os.urandom(1 << 20)
    with pages.open("wb") as file:
        for _ in range(GIB // len(piece)):
            file.write(piece)
    yield "pages of a file", partial(_measure_file, pages)
    zeros = PageRun(0, _READ_WRITE, GIB // PAGE_SIZE)
    yield "pages of zeros", partial(measure, _enclave(zeros))
    pages.unlink()
    with stream.open("wb") as file:
        sgxs.write(_enclave(zeros), file)
    yield "an .sgxs stream", partial(_measure_stream, stream)
    stream.unlink()


def signing_gramine(directory: Path) -> Iterator[tuple[str, int, Callable[[], object], list[str] | None]]:
    """Signing Gramine manifests: name, bytes of trusted files, one call, and the peer's command line, if it is here.

    Args:
        directory: has room for 1 GiB.
    """
    key = directory / "key.pem"
    key.touch(0o600)
    made = rsa.generate_private_key(public_exponent=3, key_size=3072)
    key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    peer = shutil.which("gramine-sgx-sign")
    for name, size, files in (("256M", "256M", 0), ("1G", "1G", 0), ("1G", "1G", 256 << 20), ("1G", "1G", GIB)):
        trusted = directory / "trusted"
        trusted.mkdir(exist_ok=True)
        for number in range(16 if files else 0):
            (trusted / str(number)).write_bytes(os.urandom(files // 16))
        manifest = directory / "app.manifest"
        manifest.write_text(
            f'libos.entrypoint = "/bin/app"\nloader.entrypoint.uri = "file:{_LOADER}"\n'
            f'sgx.enclave_size = "{size}"\nsgx.max_threads = 4\nsgx.trusted_files = ["file:{trusted}/"]\n'
        )
        words = ["--manifest", str(manifest), "--output", str(directory / "peer"), "--key", str(key)]
        command = None if peer is None else [peer, *words, "--libpal", _LOADER, "--quiet"]
        label = f"enclave of {name}, {files >> 20} MiB of trusted files"
        yield label, files, partial(_sign_gramine, manifest, key), command
        shutil.rmtree(trusted)


def _enclave(run: PageRun) -> EnclaveImage:
    return EnclaveImage(2 * GIB, 1, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, 0, (run,))


def _measure_file(path: Path) -> bytes:
    running = Measurement()
    running.ecreate(1, 2 * GIB)
    with path.open("rb") as file:
        running.add_all(read_pages(file, 0, _READ_WRITE, GIB // PAGE_SIZE))
    return running.digest()


def _measure_stream(path: Path) -> bytes:
    with path.open("rb") as file:
        return sgxs.Stream(file).measure()


def _sign_gramine(manifest: Path, key: Path) -> bytes:
    signed = gramine.with_hashes(manifest.read_bytes())
    image = gramine.image(signed, Path(_LOADER).read_bytes())
    fields = gramine.sigstruct_fields(signed)
    return sigstruct.sign(measure(image), signing.load_key(key), date=0x20260101, **fields).to_bytes()  # type: ignore[arg-type]


def apart(work: Callable[[], object]) -> tuple[float, float]:
    """Run in a process of its own: seconds, and MiB of resident memory at its peak."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            started = time.perf_counter()
            work()
            spent = time.perf_counter() - started
            peak = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]
            os.write(write, json.dumps([spent, int(peak) / 1024]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        raw = answer.read()
    os.waitpid(pid, 0)
    seconds, peak = json.loads(raw)
    return seconds, peak


def results(rounds: int) -> Iterator[Result]:
    """Everything, ``rounds`` times each."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="inclavare-bench-") as name:
        directory = Path(name)
        group = "MRENCLAVE of 1 GiB, every page measured"
        every: list[float] = []
        for title, work in measuring(directory):
            bare, took = [], []
            for _ in range(rounds):
                bare.append(openssl_rate())
                took.append(apart(work))
            every += bare
            seconds = statistics.median(spent for spent, _ in took)
            rate = GIB / 1e6 / seconds
            yield Result(group, title, seconds, rate, rate / statistics.median(bare), max(peak for _, peak in took))
        yield Result(group, "openssl speed sha256", 0, statistics.median(every), None, None)
        group = "signing a Gramine manifest"
        for title, size, work, command in signing_gramine(directory):
            took, peers = [], []
            for _ in range(rounds):
                took.append(apart(work))
                if command is not None:
                    started = time.perf_counter()
                    subprocess.run(command, check=True, capture_output=True)
                    peers.append(time.perf_counter() - started)
            seconds = statistics.median(spent for spent, _ in took)
            yield Result(
                group,
                title,
                seconds,
                size / 1e6 / seconds if size else None,
                statistics.median(peers) / seconds if peers else None,
                max(peak for _, peak in took),
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured")
    options = parser.parse_args()
    group, found = "", []
    for result in results(options.rounds):
        found.append(asdict(result))
        if options.json:
            continue
        if result.group != group:
            group = result.group
            print(f"\n{group}", flush=True)
        cells = (
            f"{result.seconds:.2f} s" if result.seconds else "",
            "" if result.rate is None else f"{result.rate:.0f} MB/s",
            "" if result.ratio is None else f"{result.ratio:.2f}",
            "" if result.peak is None else f"{result.peak:.0f} MiB",
        )
        print(f"  {result.name:42}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    if options.json:
        print(json.dumps({"cpus": os.cpu_count(), "results": found}, indent=2))
    elif shutil.which("gramine-sgx-sign") is None:
        print("\ngramine-sgx-sign is not installed: nothing to compare signing with", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Ratios against peers, side by side in one run: ``make bench`` (ARGS="--json", "--only start", "--repeat 30").

Every number is a median of n runs; contenders take turns, so that a busy moment hits them all. Timing never decides:
the exit code is 0 whenever everything ran.
"""

from __future__ import annotations

import argparse
import compileall
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from inclavare.rune import kernel, launcher, low_level

REPO = Path(__file__).resolve().parent.parent
READ_SIZE = 256 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table: seconds, and the ratio to the peer of the same group."""

    group: str
    name: str
    n: int
    median: float
    least: float
    most: float
    ratio: float | None
    peer: str
    unit: str = "ms"


# --- timing -----------------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs and times commands, in a view of the host that crun accepts if ``hide_unified``.

    The timing loop lives in the namespace itself, so that entering it costs no contender anything.
    """

    def __init__(self, env: dict[str, str], *, hide_unified: bool) -> None:
        ask_r, ask_w = os.pipe()
        answer_r, answer_w = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ask_w)
            os.close(answer_r)
            try:
                if hide_unified:
                    kernel.unshare(kernel.CLONE_NEWNS)
                    low_level.hide_unified_cgroup()
                    # crun leaves a file a container in what covers the v2 mount; rune's own cover is gone after a call.
                    kernel.mount("tmpfs", f"{low_level.CGROUP_ROOT}/unified", "tmpfs", kernel.MS_NOSUID, "size=64m")
                self._serve(os.fdopen(ask_r), os.fdopen(answer_w, "w"), env)
            finally:
                os._exit(0)
        os.close(ask_r)
        os.close(answer_w)
        self._ask, self._answer = os.fdopen(ask_w, "w"), os.fdopen(answer_r)

    @staticmethod
    def _serve(ask: IO[str], answer: IO[str], env: dict[str, str]) -> None:
        for line in ask:
            commands: list[list[str]] = json.loads(line)
            with tempfile.TemporaryFile() as output:
                started = time.perf_counter()
                running = [
                    subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
                    for argv in commands
                ]
                codes = [process.wait() for process in running]
                elapsed = time.perf_counter() - started
                output.seek(0)
                text = output.read().decode(errors="replace")
            print(json.dumps([elapsed, codes, text]), file=answer, flush=True)

    def run(self, *commands: list[str]) -> tuple[float, str]:
        """Run the commands at once; seconds until the last has ended, and what they printed."""
        print(json.dumps(commands), file=self._ask, flush=True)
        elapsed, codes, text = json.loads(self._answer.readline())
        if any(codes):
            raise SystemExit(f"bench: {commands[0]} ended with {codes}:\n{text}")
        return elapsed, text

    def hang_up(self) -> None:
        """Tell the process to end. A later worker has a copy of this pipe: hang up on all before waiting for any."""
        self._ask.close()
        self._answer.close()

    def wait(self) -> None:
        """Wait for the process's end."""
        os.waitpid(self.pid, 0)


Contender = Callable[[], float]


def compare(group: str, contenders: dict[str, Contender], peer: str, n: int) -> list[Measurement]:
    """Run each contender ``n`` times, in turns, after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(n + 1):
        for name, contender in contenders.items():
            seconds = contender()
            if turn:
                times[name].append(seconds)
    base = statistics.median(times[peer])
    return [
        Measurement(
            group, name, n, (middle := statistics.median(values)), min(values), max(values), middle / base, peer
        )
        for name, values in times.items()
    ]


# --- bundles ----------------------------------------------------------------------------------------------------------


class Bench:
    """The bundles, the runtimes and a configuration of the product, all below one directory on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        config = root / "inclavare.toml"
        config.write_text(
            f'state_dir = "{root}/lib"\nrun_dir = "{root}/run"\nlog_dir = "{root}/log"\n[sgx_sim]\nepc_size = "32G"\n'
        )
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env["INCLAVARE_CONFIG"] = str(config)
        self.rune = str(launcher.write(root / "rune"))
        compileall.compile_dir(str(REPO / "src"), quiet=2)
        self._workers = [Worker(env, hide_unified=False)]
        self.host = self._workers[0]
        if low_level.crun_needs_private_cgroups():
            self._workers.append(Worker(env, hide_unified=True))
        self.for_crun = self._workers[-1]
        self._count = 0

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.wait()

    def bundle(
        self, name: str, args: list[str], *, enclave: bool = False, fill: Callable[[Path], None] | None = None
    ) -> Path:
        """A bundle of the busybox root file system (shared by all of the same ``fill``)."""
        rootfs = self.root / f"rootfs-{fill.__name__ if fill else 'busybox'}"
        if not rootfs.exists():
            (rootfs / "bin").mkdir(parents=True)
            for directory in ("dev", "etc", "proc", "sys", "tmp"):
                (rootfs / directory).mkdir()
            shutil.copy("/bin/busybox", rootfs / "bin/busybox")
            for applet in ("sh", "true", "dd", "cat"):
                (rootfs / "bin" / applet).symlink_to("busybox")
            if fill:
                fill(rootfs)
        bundle = self.root / f"bundle-{name}"
        bundle.mkdir()
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(terminal=False, args=args, env=["PATH=/bin:/usr/bin"])
        if enclave:
            spec["process"]["env"].append("ENCLAVE_TYPE=sgx-sim")
        spec["root"] = {"path": str(rootfs), "readonly": True}
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    def command(self, runtime: str, bundle: Path) -> list[str]:
        """``RUNTIME run`` of a bundle under a fresh id."""
        self._count += 1
        kind = Path(runtime).name
        return [
            runtime,
            "--root",
            str(self.root / f"state-{kind}"),
            "run",
            "--bundle",
            str(bundle),
            f"bench-{kind}-{self._count}",
        ]

    def once(self, runtime: str, bundle: Path, *, at_once: int = 1) -> tuple[float, str]:
        """Run a bundle to its end; seconds and output."""
        worker = self.for_crun if Path(runtime).name == "crun" else self.host
        return worker.run(*(self.command(runtime, bundle) for _ in range(at_once)))


# --- what is measured -------------------------------------------------------------------------------------------------


def start(bench: Bench, n: int) -> Iterator[Measurement]:
    """An ordinary container and an enclave container of the same minimal bundle, to its end."""
    plain, enclave = bench.bundle("true", ["true"]), bench.bundle("true-enclave", ["true"], enclave=True)
    runtimes = {"runc run": "runc", "crun run": "crun", "rune run": bench.rune}
    contenders: dict[str, Contender] = {
        name: (lambda r=runtime: bench.once(r, plain)[0])  # type: ignore[misc]
        for name, runtime in runtimes.items()
        if shutil.which(runtime)
    }
    yield from compare("ordinary container", contenders, "runc run", n)
    contenders = {"runc run": contenders["runc run"], "rune run, enclave": lambda: bench.once(bench.rune, enclave)[0]}
    yield from compare("enclave container, measurement cached", contenders, "runc run", max(5, n // 2))


def with_python(rootfs: Path) -> None:
    """This machine's Python, without what a small program does not import."""
    interpreter = Path("/usr/bin/python3").resolve()
    library = Path("/usr/lib") / interpreter.name
    ignore = shutil.ignore_patterns(
        "__pycache__", "test", "config-*", "dist-packages", "ensurepip", "idlelib", "tkinter"
    )
    shutil.copytree(library, rootfs / "usr/lib" / interpreter.name, ignore=ignore)
    (rootfs / "usr/bin").mkdir()
    shutil.copy(interpreter, rootfs / "usr/bin/python3")
    linked = subprocess.run(["ldd", str(interpreter)], check=True, capture_output=True, text=True).stdout
    for path in sorted(set(re.findall(r"(/[^\s:]+\.so[^\s:]*)\s+\(0x", linked))):
        target = rootfs / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(path).resolve(), target)


def with_python_and_big_file(rootfs: Path) -> None:
    """Python, and a file to read."""
    with_python(rootfs)
    with (rootfs / "big").open("wb") as handle:
        for _ in range(READ_SIZE >> 20):
            handle.write(os.urandom(1 << 20))


_READER = """
import os, time
buffer = bytearray(1 << 20)
for _ in range(2):
    started = time.perf_counter()
    fd = os.open("/big", os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    print("took", time.perf_counter() - started)
"""

_WORK = """
import time
started = time.perf_counter()
counts = {}
for i in range(1_200_000):
    counts[i % 5003] = counts.get(i % 5003, 0) + i * i % 7
text = ",".join(map(str, sorted(counts.values())))
print("took", time.perf_counter() - started)
"""


def _took(output: str) -> list[float]:
    return [float(seconds) for seconds in re.findall(r"took ([\d.]+)", output)]


def read(bench: Bench, n: int) -> Iterator[Measurement]:
    """256 MB through the shielded root and from the plain disk, cold and warm, timed by the reader in the container."""
    args = ["/usr/bin/python3", "-ISc", _READER]
    bundles = {
        "plain disk": bench.bundle("read", args, fill=with_python_and_big_file),
        "shielded root": bench.bundle("read-enclave", args, enclave=True, fill=with_python_and_big_file),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in bundles}
    rounds = max(3, n // 5)
    for turn in range(rounds + 1):
        for name, bundle in bundles.items():
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            seconds = _took(bench.once(bench.rune, bundle)[1])
            if turn:
                found[name].append(seconds)
    for which, label in enumerate(("cold", "warm")):
        # Rates, so that the ratio reads as a share of the plain disk's.
        rates = {name: [READ_SIZE / 1e6 / both[which] for both in values] for name, values in found.items()}
        base = statistics.median(rates["plain disk"])
        for name, values in rates.items():
            middle, least, most = statistics.median(values), min(values), max(values)
            group = f"read 256 MB, {label}"
            yield Measurement(group, name, rounds, middle, least, most, middle / base, "plain disk", "MB/s")


def python(bench: Bench, n: int) -> Iterator[Measurement]:
    """A CPU-bound Python program, outside and inside; it times its own work."""
    args = ["/usr/bin/python3", "-ISc", _WORK]
    bundles = {
        "ordinary container": bench.bundle("python", args, fill=with_python),
        "enclave container": bench.bundle("python-enclave", args, enclave=True, fill=with_python),
    }
    contenders: dict[str, Contender] = {
        name: (lambda b=bundle: _took(bench.once(bench.rune, b)[1])[0])  # type: ignore[misc]
        for name, bundle in bundles.items()
    }
    yield from compare("CPU-bound Python, its own time", contenders, "ordinary container", max(5, n // 3))


def fifty(bench: Bench, n: int) -> Iterator[Measurement]:
    """Fifty containers started at once, until the last has ended."""
    plain, enclave = bench.bundle("fifty", ["true"]), bench.bundle("fifty-enclave", ["true"], enclave=True)
    contenders: dict[str, Contender] = {
        "runc run": lambda: bench.once("runc", plain, at_once=50)[0],
        "crun run": lambda: bench.once("crun", plain, at_once=50)[0],
        "rune run": lambda: bench.once(bench.rune, plain, at_once=50)[0],
        "rune run, enclave": lambda: bench.once(bench.rune, enclave, at_once=50)[0],
    }
    yield from compare("50 containers at once", contenders, "runc run", max(3, n // 10))


def measured(bench: Bench, n: int) -> Iterator[Measurement]:
    """MRENCLAVE of a GiB, beside openssl's bare SHA-256 of the same machine; EEXTEND hashes 1.27 bytes for each."""
    from measure import GIB, measuring, openssl_rate

    rounds = max(3, n // 10)
    bare: list[float] = []
    found: dict[str, list[float]] = {}
    for name, work in measuring(bench.root):
        for _ in range(rounds):
            bare.append(openssl_rate())
            started = time.perf_counter()
            work()
            found.setdefault(name, []).append(GIB / 1e6 / (time.perf_counter() - started))
    base = statistics.median(bare)
    for name, values in {"openssl speed sha256": bare, **found}.items():
        middle = statistics.median(values)
        yield Measurement(
            "MRENCLAVE of 1 GiB, every page measured",
            name,
            len(values),
            middle,
            min(values),
            max(values),
            middle / base,
            "openssl speed sha256",
            "MB/s",
        )


def sgx(bench: Bench, n: int) -> Iterator[Measurement]:
    """What the software platform does in a second; there is no peer to run beside it."""
    from sgx import contenders, rate

    for name, work in contenders():
        values = [rate(work, 0.2) for _ in range(max(3, n // 6))]
        middle = statistics.median(values)
        yield Measurement("sgx-sim, per second", name, len(values), middle, min(values), max(values), None, "", "/s")


PARTS: dict[str, Callable[[Bench, int], Iterator[Measurement]]] = {
    "start": start,
    "read": read,
    "python": python,
    "fifty": fifty,
    "measured": measured,
    "sgx": sgx,
}


# --- the table --------------------------------------------------------------------------------------------------------


def table(measurements: list[Measurement]) -> str:
    """Groups of lines: name, median, range, ratio, n."""
    lines = []
    group = ""
    for m in measurements:
        if m.group != group:
            group = m.group
            lines.append(f"\n{group}")
        scale, digits = (1000, 1) if m.unit == "ms" else (1, 0)
        values = [f"{value * scale:.{digits}f}" for value in (m.median, m.least, m.most)]
        ratio = "" if m.ratio is None else f"{m.ratio:6.2f} x {m.peer}"
        lines.append(f"  {m.name:26} {values[0]:>8} {m.unit:5} ({values[1]} – {values[2]})  n={m.n:<3} {ratio}")
    return "\n".join(lines)


@contextmanager
def workspace() -> Iterator[Bench]:
    """A bench on disk that is gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="inclavare-bench-", dir="/var/tmp"))
    bench = Bench(root)
    try:
        yield bench
    finally:
        bench.close()
        shutil.rmtree(root)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure only this part (may be repeated)")
    parser.add_argument(
        "--repeat", type=int, default=30, metavar="N", help="runs of the shortest thing; long ones get fewer"
    )
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench: containers and cold reads need root")
    missing = [name for name in ("runc", "crun", "busybox", "gocryptfs") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"bench: not installed: {', '.join(missing)} (make setup)")
    measurements: list[Measurement] = []
    with workspace() as bench:
        for name in options.only or PARTS:
            if not options.json:
                print(f"measuring: {name} …", file=sys.stderr)
            measurements += PARTS[name](bench, options.repeat)
    if options.json:
        document: dict[str, Any] = {"machine": " ".join(os.uname()[i] for i in (0, 2, 4)), "cpus": os.cpu_count()}
        print(json.dumps({**document, "measurements": [asdict(m) for m in measurements]}, indent=2))
    else:
        print(table(measurements))


if __name__ == "__main__":
    main()

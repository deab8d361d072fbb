"""Suites that others wrote, run against several OCI runtimes; prints their scores side by side.

    make conformance ARGS="crun --path ~/crun"                     # crun's own Python tests (tests/init must be built)
    make conformance ARGS="runtime-tools --path ~/runtime-tools"   # validation (make runtimetest validation-executables)

The suites are not part of this repository: --path names a checkout in which they are built already. The first --runtime is the
reference (default: crun, runc, this tree's rune). Everything runs in mount and PID namespaces of its own, with a private /dev,
/run and view of /sys/fs/cgroup (where crun works although the host's cgroups are hybrid), so a runtime that misbehaves cannot
damage the host, and whatever it leaves behind ends with the namespace.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from inclavare.rune import kernel, launcher, low_level

CLONE_NEWPID = 0x20000000
PASS, FAIL, SKIP = "ok", "not ok", "skip"
_TAP = re.compile(r"^(not )?ok\b(?:\s+(\d+))?\s*-?\s*(.*?)\s*(?:#\s*((?:skip|todo)\b)?.*)?$", re.IGNORECASE)


def tap(text: str) -> dict[str, str]:
    """Results by name from a program's TAP output; a repeated name gets a number."""
    results: dict[str, str] = {}
    for line in text.splitlines():
        found = _TAP.match(line)
        if found is None:
            continue
        name = found[3] or found[2] or "unnamed"
        seen = sum(1 for known in results if known == name or known.startswith(f"{name} #"))
        results[f"{name} #{seen + 1}" if seen else name] = SKIP if found[4] else FAIL if found[1] else PASS
    return results


# --- namespaces -------------------------------------------------------------------------------------------------------


def isolated(action: Callable[[], object]) -> str:
    """Call it in namespaces of its own; what it returns, as JSON."""
    reader, writer = os.pipe()
    outer = os.fork()
    if outer == 0:
        os.close(reader)
        try:
            kernel.unshare(kernel.CLONE_NEWNS | CLONE_NEWPID)
            inner = os.fork()
            if inner:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
            _private_view()
            before = _cgroups()
            try:
                os.write(writer, json.dumps(action()).encode())
            finally:
                _tidy(before)
        except BaseException as error:
            print(f"conformance: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(outer, 0)[1]:
        raise SystemExit("conformance: the run did not finish")
    return text


def _private_view() -> None:
    # If the caller is killed, so is everything here: this is the namespace's process 1.
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    kernel.mount(None, "/", None, kernel.MS_PRIVATE | 0x4000)  # MS_REC
    kernel.mount("proc", "/proc", "proc", 0)
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID, "mode=755")
    if low_level.crun_needs_private_cgroups():
        low_level.hide_unified_cgroup()
        kernel.mount("tmpfs", f"{low_level.CGROUP_ROOT}/unified", "tmpfs", kernel.MS_NOSUID, "size=64m")
    devices = [(path, os.stat(path)) for path in DEVICES if Path(path).exists()]
    kernel.mount("tmpfs", "/dev", "tmpfs", kernel.MS_NOSUID, "mode=755")
    for path, status in devices:
        os.mknod(path, stat.S_IFCHR | 0o666, status.st_rdev)
        os.chmod(path, 0o666)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("ptmx", "pts/ptmx"),
    ):
        Path("/dev", name).symlink_to(target)
    for name, kind, options in (
        ("pts", "devpts", "newinstance,ptmxmode=0666"),
        ("shm", "tmpfs", "mode=1777"),
        ("mqueue", "mqueue", None),
    ):
        Path("/dev", name).mkdir()
        kernel.mount(kind, f"/dev/{name}", kind, kernel.MS_NOSUID, options)


DEVICES = [
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "fuse", "kmsg", "loop-control")
]


def _cgroups() -> set[Path]:
    return {path for path in Path(low_level.CGROUP_ROOT).glob("**") if path.is_dir()}


def _tidy(before: set[Path]) -> None:
    """Thaw what a suite left frozen, which no signal would end, kill it, and remove the cgroups that it made."""
    for path in sorted(_cgroups(), key=lambda path: -len(path.parts)):
        try:
            # Processes of other PID namespaces show as 0: they are not ours.
            ours = [int(pid) for pid in (path / "cgroup.procs").read_text().split() if pid not in ("0", "1")]
            for pid in ours:
                os.kill(pid, signal.SIGKILL)
            if ours and (path / "freezer.state").exists():
                (path / "freezer.state").write_text("THAWED")
            if path not in before:
                _remove(path)
        except OSError:
            continue  # gone, or somebody else's


def _remove(cgroup: Path) -> None:
    for _ in range(20):
        try:
            cgroup.rmdir()
            return
        except OSError:
            time.sleep(0.01)  # a killed process leaves its cgroup in a moment


# --- suites -----------------------------------------------------------------------------------------------------------


class Suite:
    """A checkout of a suite, built.

    Attributes:
        path: the checkout.
        timeout: seconds for one of its programs.
    """

    def __init__(self, path: Path, only: str, timeout: int) -> None:
        self.path, self.timeout = path.resolve(), timeout
        self._only = re.compile(only)

    def programs(self) -> list[Path]:
        """What is run, each giving TAP."""
        found = sorted(path for path in self.all_programs() if self._only.search(path.name))
        if not found:
            raise SystemExit(f"conformance: nothing to run below {self.path} ({self.needs})")
        return found

    needs = ""

    def all_programs(self) -> Iterator[Path]:
        """Every program of the suite."""
        raise SystemExit("conformance: unknown suite")

    def run(self, program: Path, runtime: str, scratch: Path) -> dict[str, str]:
        """Run one program; results by test name."""
        scratch.mkdir()
        environment = {
            **os.environ,
            "TMPDIR": str(scratch),
            "RUNTIME": runtime,
            "OCI_RUNTIME": runtime,
            "INIT": str(self.path / "tests/init"),
        }
        environment.pop("XDG_RUNTIME_DIR", None)
        argv = [sys.executable, str(program)] if program.suffix == ".py" else [str(program)]
        process = subprocess.Popen(
            argv, cwd=self.path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output = process.communicate(timeout=self.timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] + b"\nnot ok - ran out of time\n"
        text = output.decode(errors="replace")
        (scratch.parent / f"{scratch.name}.log").write_text(text)
        results = tap(text)
        if process.returncode and FAIL not in results.values():
            results[f"ended with {process.returncode}"] = FAIL
        return results


class Crun(Suite):
    """crun's own tests of its command line."""

    needs = "tests/test_*.py, and tests/init built"

    def all_programs(self) -> Iterator[Path]:
        if not os.access(self.path / "tests/init", os.X_OK):
            raise SystemExit(f"conformance: {self.path}/tests/init is not built")
        return (self.path / "tests").glob("test_*.py")


class RuntimeTools(Suite):
    """opencontainers/runtime-tools' validation."""

    needs = "make runtimetest validation-executables"

    def all_programs(self) -> Iterator[Path]:
        if not os.access(self.path / "runtimetest", os.X_OK):
            raise SystemExit(f"conformance: {self.path}/runtimetest is not built ({self.needs})")
        return (self.path / "validation").glob("**/*.t")


SUITES: dict[str, type[Suite]] = {"crun": Crun, "runtime-tools": RuntimeTools}


_REWRITE = """#!/bin/sh
# Runs {runtime} after giving the bundle the version {version}.
bundle=. before=
for word; do
    case $before in --bundle | -b) bundle=$word ;; esac
    case $word in --bundle=*) bundle=${{word#*=}} ;; esac
    before=$word
done
[ ! -f "$bundle/config.json" ] || sed -i 's/"ociVersion": *"[^"]*"/"ociVersion":"{version}"/' "$bundle/config.json"
exec {runtime} "$@"
"""


def with_version(runtime: Path, version: str, directory: Path) -> Path:
    """A wrapper of the same name that rewrites ``ociVersion``, for a suite newer than what a runtime accepts."""
    directory.mkdir(parents=True)
    wrapper = directory / runtime.name
    wrapper.write_text(_REWRITE.format(runtime=runtime, version=version))
    wrapper.chmod(0o755)
    return wrapper


# --- running and comparing --------------------------------------------------------------------------------------------


def run(suite: Suite, runtime: str, logs: Path) -> dict[str, dict[str, str]]:
    """Every program with one runtime: program → test → result."""

    def inside() -> dict[str, dict[str, str]]:
        out = {}
        for program in suite.programs():
            out[program.stem] = suite.run(program, runtime, logs / program.stem)
            counts = Counter(out[program.stem].values())
            print(
                f"  {program.stem:40} {counts[PASS]:4} ok {counts[FAIL]:4} not ok {counts[SKIP]:4} skipped",
                file=sys.stderr,
            )
        return out

    logs.mkdir(parents=True)
    loaded: dict[str, dict[str, str]] = json.loads(isolated(inside))
    return loaded


def compare(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """The totals, and the tests on which a runtime differs from the first one."""
    names = list(results)
    lines = [f"{'':30}" + "".join(f"{Path(name).name:>12}" for name in names)]
    totals = {name: Counter(r for tests in results[name].values() for r in tests.values()) for name in names}
    for label in (PASS, FAIL, SKIP):
        lines.append(f"{label:30}" + "".join(f"{totals[name][label]:>12}" for name in names))
    for other in names[1:]:
        worse = _passed_only_by(results[names[0]], results[other])
        better = _passed_only_by(results[other], results[names[0]])
        for tests, winner, loser in ((worse, names[0], other), (better, other, names[0])):
            lines.append(f"\npassed by {Path(winner).name}, not by {Path(loser).name}: {sum(map(len, tests.values()))}")
            for program, missed in tests.items():
                lines += [f"  {program}: {test}" for test in missed[:8]]
                lines += [f"  {program}: … and {len(missed) - 8} more"] if len(missed) > 8 else []
    return "\n".join(lines)


def _passed_only_by(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Program → ``test: its result with the other``."""
    out: dict[str, list[str]] = {}
    for program, tests in one.items():
        for test, result in tests.items():
            there = other.get(program, {}).get(test, "not run")
            if result == PASS and there != PASS:
                out.setdefault(program, []).append(f"{test}: {there}")
    return out


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--path", type=Path, required=True, help="the suite's checkout, built")
    parser.add_argument(
        "--runtime", action="append", help="a runtime's name or path (may be repeated; the first is the reference)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only programs whose file name matches")
    parser.add_argument(
        "--timeout", type=int, default=120, metavar="S", help="seconds for one program (default: %(default)s)"
    )
    parser.add_argument(
        "--oci-version", metavar="V", help="give every bundle this ociVersion, the same for all runtimes"
    )
    parser.add_argument("--logs", type=Path, help="keep the programs' output in this new directory")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("conformance: containers need root")
    suite = SUITES[options.suite](options.path, options.only, options.timeout)
    work = Path(tempfile.mkdtemp(prefix="inclavare-conformance-", dir="/var/tmp"))
    try:
        runtimes = options.runtime or ["crun", "runc", str(launcher.write(work / "rune"))]
        results: dict[str, dict[str, dict[str, str]]] = {}
        for number, runtime in enumerate(runtimes):
            path = shutil.which(runtime)
            if path is None:
                raise SystemExit(f"conformance: {runtime} is not there")
            print(f"{options.suite} with {path}", file=sys.stderr)
            logs = (options.logs or work / "logs").absolute() / f"{number}-{Path(path).name}"
            program = Path(path).absolute()
            if options.oci_version:
                program = with_version(program, options.oci_version, work / f"wrapper-{number}")
            results[path] = run(suite, str(program), logs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(results, indent=2) if options.json else compare(results))


if __name__ == "__main__":
    main()

"""Real container engines in private directories: started for the tests, stopped after them, leaving nothing.

Nothing here touches the machine's own docker, containerd or podman: each engine gets its own configuration, sockets, data and
state below one directory, and a configuration of the product below the same directory.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

Result = subprocess.CompletedProcess[str]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Poll until the condition holds; tells what it waited for otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds} s still waiting for {what}")
        time.sleep(0.05)


def processes_naming(text: str) -> dict[int, str]:
    """Processes with the text in their command line or environment, ourselves left out: pid → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command or text in environment:
            found[int(entry.name)] = command.strip()
    return found


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below a directory in this mount namespace, innermost first."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [p for p in reversed(points) if p == str(directory) or p.startswith(f"{directory}/")]


class Workspace:
    """A short directory on a real disk, with the product's configuration in it.

    Attributes:
        root: the directory; short, because sockets' paths are limited to 107 bytes.
        env: environment for everything that is started: ``INCLAVARE_CONFIG`` and a plain ``PATH``.
    """

    def __init__(self, name: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix=f"inclavare-{name}-", dir="/var/tmp"))
        config = self.root / "inclavare.toml"
        config.write_text(
            f'state_dir = "{self.root}/lib"\nrun_dir = "{self.root}/run"\nlog_dir = "{self.root}/log"\n'
            '[sgx_sim]\nepc_size = "16G"\n'
        )
        self.env = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.root),
            "TERM": "xterm",
            "INCLAVARE_CONFIG": str(config),
        }
        #: Mounts that an engine makes for itself and may keep: not counted as left behind.
        self.own_mounts: list[str] = []
        self._daemons: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, name: str, argv: list[str], ready: Callable[[], bool], **env: str) -> None:
        """Start a daemon and wait until it answers; its log is shown if it does not."""
        log = self.root / f"{name}.log"
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**self.env, **env}, cwd=self.root
            )
        self._daemons.append((daemon, log))
        deadline = time.monotonic() + 60
        while not ready():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)

    def run(self, *argv: str | Path, input: str | None = None, timeout: float = 120) -> Result:
        """Run a command to its end with this environment."""
        return subprocess.run(
            [str(word) for word in argv],
            check=False,
            text=True,
            capture_output=True,
            env=self.env,
            timeout=timeout,
            input=input or "",
        )

    def enclaves(self) -> list[str]:
        """What is left of enclaves: run directories, EPC entries, runelets."""
        run = self.root / "run"
        left = [str(p) for p in run.rglob("*") if p.is_file() or p.is_socket()] if run.is_dir() else []
        left = [p for p in left if not Path(p).name.endswith(".lock")]
        return left + [c for c in processes_naming(str(self.root)).values() if "/rune " in c or "gocryptfs" in c]

    def runelets(self) -> list[int]:
        """The processes that hold enclave memory of the simulated platform."""
        return [int(path.name.partition("-")[0]) for path in (self.root / "run" / "epc").glob("[0-9]*")]

    def close(self) -> None:
        """Stop the daemons in reverse order; fail if anything of them stays, having removed it."""
        for daemon, _ in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        time.sleep(0.2)
        deadline = time.monotonic() + 10
        while (left := processes_naming(str(self.root))) and time.monotonic() < deadline:
            time.sleep(0.2)
        for point in set(self.own_mounts) & set(mounts_below(self.root)):
            subprocess.run(["umount", point], check=False)
        mounts = mounts_below(self.root)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for point in mounts_below(self.root):
            subprocess.run(["umount", "--lazy", point], check=False)
        shutil.rmtree(self.root, ignore_errors=True)
        assert not left, f"processes left behind: {left}"
        assert not mounts, f"mounts left behind: {mounts}"


# --- the image --------------------------------------------------------------------------------------------------------


def busybox_files() -> Iterable[tuple[str, int, bytes | str]]:
    """``(path, mode, content or link target)`` of a minimal root file system; a mode with bit 0o40000 is a directory."""
    busybox = Path("/bin/busybox").read_bytes()
    applets = subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for directory in ("bin", "dev", "etc", "home/user", "proc", "root", "sys", "var"):
        yield directory, 0o40755, b""
    yield "tmp", 0o41777, b""
    yield "bin/busybox", 0o755, busybox
    for applet in applets:
        if applet != "busybox":
            yield f"bin/{applet}", 0o777, "busybox"
    yield "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"
    yield "etc/group", 0o644, b"root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"
    yield "etc/notes", 0o600, b"only root reads this\n"
    yield "home/user/hello", 0o644, b"hello\n"
    yield "etc/plain", 0o644, b"not a program\n"


def busybox_tar(path: Path) -> Path:
    """A tar of the root file system, with fixed times so that its digest is the same on each run."""
    with tarfile.open(path, "w") as archive:
        for name, mode, content in busybox_files():
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = mode & 0o7777, 1_700_000_000
            if name.startswith("home/user"):
                info.uid = info.gid = 1000
            if mode & 0o40000:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, BytesIO(content))
    return path


def oci_archive(work: Path, name: str) -> Path:
    """An OCI image archive of the same root file system, its name as the archive's reference."""
    layout, rootfs = work / "layout", work / "rootfs"
    rootfs.mkdir()
    with tarfile.open(busybox_tar(work / "rootfs.tar")) as archive:
        archive.extractall(rootfs, filter="fully_trusted") if hasattr(tarfile, "data_filter") else archive.extractall(
            rootfs
        )
    tag = f"{layout}:latest"
    for argv in (
        ["umoci", "init", "--layout", str(layout)],
        ["umoci", "new", "--image", tag],
        ["umoci", "insert", "--image", tag, str(rootfs), "/"],
        ["umoci", "config", "--image", tag, "--config.cmd", "sh", "--config.env", "PATH=/bin"],
    ):
        subprocess.run(argv, check=True, capture_output=True)
    archive_path = work / "image.tar"
    copy = ["skopeo", "copy", "--insecure-policy", f"oci:{tag}", f"oci-archive:{archive_path}:{name}"]
    subprocess.run(copy, check=True, capture_output=True)
    return archive_path


BUILT_MANIFEST = """
[process]
args = ["/bin/sh", "-c", "cat /dev/attestation/attestation_type; echo; id -u; pwd; echo $MODE; env"]
user = "1000:1000"
cwd = "/tmp"
env = { MODE = "measured" }
"""
#: How what the manifest above starts begins to speak.
BUILT_OUTPUT = "dcap\n1000\n/tmp\nmeasured\n"


def build_enclave_image(work: Workspace, source: str, destination: str) -> None:
    """``inclavare build`` with a manifest of its own: other arguments, user and directory than the image's."""
    manifest = work.root / "built.toml"
    manifest.write_text(BUILT_MANIFEST)
    program = "from inclavare.cli import main; main()"
    words = ["build", source, destination, "--manifest", str(manifest), "--tee", "sgx-sim"]
    done = work.run(sys.executable, "-c", program, *words)
    assert done.returncode == 0, done.stderr


# --- terminals --------------------------------------------------------------------------------------------------------


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, env)
        self.output = ""

    def send(self, text: str) -> None:
        """Type."""
        os.write(self._fd, text.encode())

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read until the text has been shown; returns everything shown so far."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self._read(deadline), f"expected {text!r} on the terminal, found {self.output!r}"
        return self.output

    def finish(self, seconds: float = 60) -> int:
        """Read to the end; returns the exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        os.close(self._fd)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running; shown: {self.output!r}")
            time.sleep(0.02)

    def _read(self, deadline: float) -> bool:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([self._fd], [], [], remaining)[0]:
            return False
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:
            return False  # EIO: the other side is closed
        self.output += chunk.decode(errors="replace")
        return bool(chunk)


# --- engines ----------------------------------------------------------------------------------------------------------


def start_containerd(work: Workspace, config: str = "version = 2\n", **env: str) -> Path:
    """A containerd with its own root, state and socket; returns the socket's path."""
    socket, file = work.root / "c.sock", work.root / "containerd.toml"
    file.write_text(config)
    argv = [
        "containerd", "--config", str(file), "--address", str(socket),
        "--root", str(work.root / "cr"), "--state", str(work.root / "cs"),
    ]  # fmt: skip

    def ready() -> bool:
        return socket.exists() and work.run("ctr", "--address", socket, "version").returncode == 0

    work.start("containerd", argv, ready, **env)
    return socket


class Docker:
    """dockerd on a containerd of its own, overlay2 on disk, no bridge and no firewall rules.

    Args:
        daemon_json: its configuration file's text, written by the product's own ``install``.
    """

    image = "inclavare/busybox"

    def __init__(self, work: Workspace, daemon_json: str) -> None:
        self.work = work
        self.socket = work.root / "d.sock"
        # Where the disk's mount is private, dockerd shares its data directory by a bind mount of its own.
        work.own_mounts.append(f"{work.root}/dr")
        (work.root / "daemon.json").write_text(daemon_json)
        # CRI has no use here and would look for CNI.
        containerd = start_containerd(work, 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        self._cgroup = f"/{work.root.name}"
        argv = [
            "dockerd", "--config-file", str(work.root / "daemon.json"), "--containerd", str(containerd),
            "--host", f"unix://{self.socket}", "--data-root", str(work.root / "dr"), "--exec-root", str(work.root / "de"),
            "--pidfile", str(work.root / "d.pid"), "--iptables=false", "--ip6tables=false", "--bridge=none",
            "--storage-driver", "overlay2", "--cgroup-parent", self._cgroup,
        ]  # fmt: skip
        work.start("dockerd", argv, lambda: self("version").returncode == 0)
        tar = busybox_tar(work.root / "busybox.tar")
        done = self("import", "--change", 'CMD ["sh"]', "--change", "ENV PATH=/bin", str(tar), self.image)
        assert done.returncode == 0, done.stderr

    def argv(self, *words: str) -> list[str]:
        """The command line of ``docker words…``."""
        return ["docker", "--config", str(self.work.root / "docker-config"), "--host", f"unix://{self.socket}", *words]

    def __call__(self, *words: str, input: str | None = None, timeout: float = 120) -> Result:
        return self.work.run(*self.argv(*words), input=input, timeout=timeout)

    def close(self) -> None:
        """Remove every container, then stop."""
        ids = self("ps", "-aq").stdout.split()
        if ids:
            self("rm", "-f", "-v", *ids)
        self.work.close()
        remove_cgroups(self._cgroup)


class Containerd:
    """containerd, driven with ``ctr`` in a namespace of its own."""

    image = "docker.io/inclavare/busybox:latest"

    def __init__(self, work: Workspace, config: str, **env: str) -> None:
        self.work = work
        # mkdtemp may end in or begin with what a namespace must not.
        self.namespace = work.root.name.replace("_", "u")
        self.socket = start_containerd(work, config, **env)
        scratch = work.root / "image"
        scratch.mkdir()
        done = self("image", "import", str(oci_archive(scratch, self.image)))
        assert done.returncode == 0, done.stderr

    def argv(self, *words: str) -> list[str]:
        """The command line of ``ctr words…``."""
        return ["ctr", "--address", str(self.socket), "--namespace", self.namespace, *words]

    def __call__(self, *words: str, input: str | None = None, timeout: float = 120) -> Result:
        return self.work.run(*self.argv(*words), input=input, timeout=timeout)

    def close(self) -> None:
        """Remove every task and container, then stop."""
        for task in self("task", "ls", "-q").stdout.split():
            self("task", "kill", "-s", "KILL", task)
            self("task", "rm", "-f", task)
        for container in self("container", "ls", "-q").stdout.split():
            self("container", "rm", container)
        self.work.close()
        remove_cgroups(f"/{self.namespace}")


class Podman:
    """podman with its own storage; it has no daemon."""

    image = "localhost/inclavare/busybox:latest"

    def __init__(self, work: Workspace, containers_conf: str) -> None:
        self.work = work
        (work.root / "containers.conf").write_text(containers_conf)
        (work.root / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        work.own_mounts += [f"{work.root}/pr/overlay", f"{work.root}/pp"]
        work.env.update(CONTAINERS_CONF=str(work.root / "containers.conf"), TMPDIR=str(work.root))
        self._cgroup = f"/{work.root.name}"
        tar = busybox_tar(work.root / "busybox.tar")
        done = self("import", "--change", "CMD=sh", "--change", "ENV=PATH=/bin", str(tar), self.image)
        assert done.returncode == 0, done.stderr

    def argv(self, *words: str) -> list[str]:
        """The command line of ``podman words…``; ``run`` and ``create`` get limits that an unprivileged host allows."""
        root = self.work.root
        options = [
            "--root", str(root / "pr"), "--runroot", str(root / "pp"), "--tmpdir", str(root / "pt"),
            "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file",
        ]  # fmt: skip
        out = ["podman", *options]
        for word in words:
            out.append(word)
            if word in ("run", "create") and out[-2] != "container":
                out += ["--network", "none", "--cgroup-parent", self._cgroup, "--ulimit", "nofile=1024:1024"]
                out += ["--ulimit", "nproc=4096:4096"]
                words = words[words.index(word) + 1 :]
                out += words
                break
        return out

    def __call__(self, *words: str, input: str | None = None, timeout: float = 120) -> Result:
        return self.work.run(*self.argv(*words), input=input, timeout=timeout)

    def close(self) -> None:
        """Remove every container and image, then the storage."""
        self("rm", "-f", "-a", "-t", "0")
        self("rmi", "-f", "-a")
        self.work.close()
        remove_cgroups(self._cgroup)


def remove_cgroups(parent: str) -> None:
    """Remove the empty cgroups that an engine leaves below the parent that we named."""
    for top in Path("/sys/fs/cgroup").glob(f"*{parent}"):
        for path in sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)):
            path.rmdir()
        top.rmdir()

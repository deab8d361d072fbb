"""podman: an ordinary container behaves the same with rune as with runc."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import BUILT_OUTPUT, Podman, Result, Terminal, build_enclave_image, mounts_below, wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.crun]

both = pytest.mark.parametrize("runtime", ["runc", "rune"])


@pytest.fixture(autouse=True)
def nothing_stays(podman: Podman) -> Iterator[None]:
    """After each test: no container, no enclave, no mount of one."""
    yield
    podman("rm", "-f", "-a", "-t", "0")
    wait_for(lambda: not podman.work.enclaves(), "the enclaves' end", 15)
    assert [m for m in mounts_below(podman.work.root) if m.endswith("/merged")] == []


def run(podman: Podman, runtime: str, *words: str, input: str | None = None) -> Result:
    return podman("--runtime", runtime, "run", "--rm", *words, input=input)


@both
@pytest.mark.parametrize(
    ("command", "code"), [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["/nothing"], 127), (["/etc/plain"], 126)]
)
def test_exit_codes(podman: Podman, runtime: str, command: list[str], code: int) -> None:
    done = run(podman, runtime, podman.image, *command)
    assert done.returncode == code, done.stderr


@both
def test_streams_environment_user_mounts(podman: Podman, runtime: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    tmp_path.chmod(0o755)
    done = run(
        podman, runtime, "-i", "-e", "A=b c", "-w", "/var", "-u", "user", "--read-only", "--tmpfs", "/scratch",
        "-v", f"{tmp_path}:/data:ro", podman.image, "sh", "-c",
        'echo "$A $(pwd) $(id -u)"; cat; cat /data/in; touch /scratch/x && echo ok; touch /var/x', input="typed\n",
    )  # fmt: skip
    assert done.stdout == "b c /var 1000\ntyped\nfrom the host\nok\n"
    assert "Read-only file system" in done.stderr


@both
def test_terminal(podman: Podman, runtime: str) -> None:
    terminal = Terminal(podman.argv("--runtime", runtime, "run", "--rm", "-it", podman.image, "sh"), podman.work.env)
    terminal.expect("#")
    terminal.send("tty; echo $((6*7))\n")
    terminal.expect("42")
    assert "/dev/pts/0" in terminal.output
    terminal.send("exit 5\n")
    assert terminal.finish() == 5


@both
def test_detached_logs_exec_kill_stop(podman: Podman, runtime: str) -> None:
    script = 'trap "echo term; exit 4" TERM; trap "echo usr1" USR1; echo up; while :; do sleep 0.05; done'
    made = podman("--runtime", runtime, "run", "-d", "--name", "d", "-m", "64m", podman.image, "sh", "-c", script)
    assert made.returncode == 0, made.stderr
    wait_for(lambda: "up" in podman("logs", "d").stdout, "its first line")
    assert podman("exec", "d", "sh", "-c", "exit 9").returncode == 9
    assert (
        podman("exec", "-i", "-u", "1000", "-e", "A=b", "d", "sh", "-c", "id -u; echo $A; cat", input="x").stdout
        == "1000\nb\nx"
    )
    assert podman("kill", "-s", "USR1", "d").returncode == 0
    wait_for(lambda: "usr1" in podman("logs", "d").stdout, "the signal")
    assert podman("pause", "d").returncode == 0
    assert podman("unpause", "d").returncode == 0
    assert "sleep" in podman("top", "d").stdout
    assert podman("stop", "-t", "10", "d").returncode == 0
    assert podman("inspect", "-f", "{{.State.ExitCode}}", "d").stdout.strip() == "4"
    assert podman("start", "d").returncode == 0
    started = time.monotonic()
    assert podman("rm", "-f", "-t", "0", "d").returncode == 0
    assert time.monotonic() - started < 20


ENCLAVE = ("-e", "ENCLAVE_TYPE=sgx-sim")


@pytest.mark.parametrize(("command", "code"), [(["true"], 0), (["sh", "-c", "exit 7"], 7)])
def test_enclave_exit_codes(podman: Podman, command: list[str], code: int) -> None:
    done = run(podman, "rune", *ENCLAVE, podman.image, *command)
    assert done.returncode == code, done.stderr


def test_enclave_device_streams_and_mounts(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    done = run(
        podman, "rune", "-i", *ENCLAVE, "-v", f"{tmp_path}:/data:ro", "--read-only", "--tmpfs", "/scratch", podman.image, "sh", "-c",
        "cat /dev/attestation/attestation_type; env | grep -c ENCLAVE; cat; cat /data/in; touch /scratch/x && echo ok", input="typed\n",
    )  # fmt: skip
    assert done.stdout == "dcap0\ntyped\nfrom the host\nok\n", done.stderr


def test_enclave_terminal(podman: Podman) -> None:
    terminal = Terminal(
        podman.argv("--runtime", "rune", "run", "--rm", "-it", *ENCLAVE, podman.image, "sh"), podman.work.env
    )
    terminal.expect("#")
    terminal.send("tty; echo $((6*7))\n")
    terminal.expect("42")
    terminal.send("exit 5\n")
    assert terminal.finish() == 5


def test_enclave_signals_exec_and_removal(podman: Podman) -> None:
    script = 'trap "echo usr1" USR1; echo up; while :; do sleep 0.05; done'
    made = podman("--runtime", "rune", "run", "-d", "--name", "e1", *ENCLAVE, podman.image, "sh", "-c", script)
    assert made.returncode == 0, made.stderr
    wait_for(lambda: "up" in podman("logs", "e1").stdout, "its first line")
    assert podman("kill", "-s", "USR1", "e1").returncode == 0
    wait_for(lambda: "usr1" in podman("logs", "e1").stdout, "the signal")
    refused = podman("exec", "e1", "id")
    assert refused.returncode != 0
    assert "exec" in refused.stderr
    debug = podman(
        "--runtime",
        "rune",
        "run",
        "-d",
        "--name",
        "e2",
        *ENCLAVE,
        "-e",
        "ENCLAVE_DEBUG=true",
        podman.image,
        "sleep",
        "1000",
    )
    assert debug.returncode == 0, debug.stderr
    assert podman("exec", "e2", "sh", "-c", "exit 9").returncode == 9
    assert podman("rm", "-f", "-t", "0", "e1", "e2").returncode == 0
    wait_for(lambda: not podman.work.enclaves(), "the enclaves' end", 15)


def test_hardware_enclave_is_refused_with_the_reason(podman: Podman) -> None:
    if Path("/dev/sgx_enclave").exists():
        pytest.skip("this machine has SGX")
    done = run(podman, "rune", "-e", "ENCLAVE_TYPE=intelSgx", podman.image, "true")
    assert done.returncode == 126
    assert "tee.platform.unusable" in done.stderr


def test_the_drop_in_written_by_install_is_read_by_podman(rune: Path) -> None:
    # The real /etc/containers is covered in a mount namespace of its own.
    script = (
        'mount -t tmpfs tmpfs /etc/containers && echo \'{"default": [{"type": "insecureAcceptAnything"}]}\' '
        '> /etc/containers/policy.json && "$1" -c "from pathlib import Path; from inclavare.cli import _engines as e; '
        "[c.write() for c in e.install(e.ENGINES['podman'], Path('$2'))]\" && "
        'podman --root "$3/r" --runroot "$3/u" --tmpdir "$3/t" --runtime rune info --format "{{.Host.OCIRuntime.Path}}"'
    )
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-ec", script, "sh", sys.executable, rune, scratch],
            check=False,
            capture_output=True,
            text=True,
        )
        subprocess.run(["umount", f"{scratch}/r/overlay"], check=False, capture_output=True)
    assert done.stdout.strip() == str(rune), done.stderr


def test_built_image_runs_as_it_was_measured(podman: Podman) -> None:
    root = podman.work.root
    assert podman("save", "-o", f"{root}/in.tar", podman.image).returncode == 0
    build_enclave_image(
        podman.work, f"docker-archive:{root}/in.tar", f"docker-archive:{root}/out.tar:localhost/built:1"
    )
    assert podman("load", "-i", f"{root}/out.tar").returncode == 0
    done = run(podman, "rune", "localhost/built:1")
    assert done.stdout.startswith(BUILT_OUTPUT), done.stderr

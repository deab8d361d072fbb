"""docker: an ordinary container behaves the same with rune as with runc, and an enclave container is one."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import BUILT_OUTPUT, Docker, Terminal, build_enclave_image, mounts_below, processes_naming, wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.crun]

both = pytest.mark.parametrize("runtime", ["runc", "rune"])


@pytest.fixture(autouse=True)
def nothing_stays(docker: Docker) -> Iterator[None]:
    """After each test: no container, no enclave, no mount of one."""
    yield
    ids = docker("ps", "-aq").stdout.split()
    if ids:
        docker("rm", "-f", *ids)
    wait_for(lambda: not docker.work.enclaves(), f"the end of {docker.work.enclaves()}", 15)
    layers = [m for m in mounts_below(docker.work.root) if "/overlay2/" in m]
    assert not layers, layers


def run(docker: Docker, runtime: str, *words: str, **options: str) -> str:
    """``docker run --rm`` that must succeed; its standard output."""
    done = docker("run", "--rm", "--runtime", runtime, *words, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@both
@pytest.mark.parametrize(
    ("command", "code"),
    [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137)],
)
def test_exit_codes(docker: Docker, runtime: str, command: list[str], code: int) -> None:
    done = docker("run", "--rm", "--runtime", runtime, docker.image, *command)
    assert done.returncode == code, done.stderr


@both
@pytest.mark.parametrize(
    ("command", "reason"), [("/nothing", "no such file or directory"), ("/etc/plain", "permission denied")]
)
def test_a_program_that_cannot_start_is_named(docker: Docker, runtime: str, command: str, reason: str) -> None:
    done = docker("run", "--rm", "--runtime", runtime, docker.image, command)
    # docker's client looks for runc's spelling to turn the 125 of a failed create into 126 or 127; crun spells otherwise.
    assert done.returncode in (125, 126, 127)
    assert reason in done.stderr.lower()


@both
def test_streams_and_environment(docker: Docker, runtime: str) -> None:
    script = 'echo "$WORD $(pwd) $(hostname)"; cat; echo err >&2; exit 3'
    done = docker(
        "run", "--rm", "-i", "--runtime", runtime, "-e", "WORD=a b", "-w", "/var", "--hostname", "inside",
        docker.image, "sh", "-c", script, input="typed\n",
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("a b /var inside\ntyped\n", "err\n", 3)


@both
def test_large_output_arrives_whole(docker: Docker, runtime: str) -> None:
    assert run(docker, runtime, docker.image, "sh", "-c", "seq 1 200000 | md5sum") == run(
        docker, runtime, "-i", docker.image, "md5sum", input="".join(f"{n}\n" for n in range(1, 200001))
    )


@both
def test_terminal(docker: Docker, runtime: str) -> None:
    terminal = Terminal(docker.argv("run", "--rm", "-it", "--runtime", runtime, docker.image, "sh"), docker.work.env)
    terminal.expect("#")
    terminal.send("tty; echo $((6*7))\n")
    terminal.expect("/dev/pts/0")
    terminal.expect("42")
    terminal.send("exit 5\n")
    assert terminal.finish() == 5


@both
def test_detached_logs_exec_kill_stop(docker: Docker, runtime: str) -> None:
    script = 'trap "echo term; exit 4" TERM; trap "echo usr1" USR1; echo up; while :; do sleep 0.05; done'
    name = run(docker, runtime, "-d", "--name", f"d-{runtime}", docker.image, "sh", "-c", script).strip()
    wait_for(lambda: "up" in docker("logs", name).stdout, "its first line")
    assert docker("exec", name, "sh", "-c", "exit 9").returncode == 9
    assert (
        docker("exec", "-i", "-u", "1000:1000", "-e", "A=b", name, "sh", "-c", "id -u; echo $A; cat", input="x").stdout
        == "1000\nb\nx"
    )
    terminal = Terminal(docker.argv("exec", "-it", name, "tty"), docker.work.env)
    terminal.expect("/dev/pts/")
    assert terminal.finish() == 0
    assert docker("kill", "-s", "USR1", name).returncode == 0
    wait_for(lambda: "usr1" in docker("logs", name).stdout, "the signal")
    waiting = docker.work
    assert docker("stop", "-t", "10", name).returncode == 0
    assert waiting.run(*docker.argv("ps", "-q", "--filter", f"name={name}")).stdout == ""


@both
def test_stop_of_a_deaf_container_kills_it(docker: Docker, runtime: str) -> None:
    made = docker(
        "run", "-d", "--runtime", runtime, docker.image, "sh", "-c", 'trap "" TERM; while :; do sleep 0.05; done'
    )
    name = made.stdout.strip()
    started = time.monotonic()
    assert docker("stop", "-t", "1", name).returncode == 0
    assert time.monotonic() - started < 20
    assert docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip() == "137"


@both
def test_start_again_after_the_end(docker: Docker, runtime: str) -> None:
    name = docker(
        "create", "--runtime", runtime, docker.image, "sh", "-c", "echo x >> /tmp/n; wc -l < /tmp/n"
    ).stdout.strip()
    assert docker("start", "-a", name).stdout.strip() == "1"
    assert docker("start", "-a", name).stdout.strip() == "2"


@both
def test_pause_update_top_inspect(docker: Docker, runtime: str) -> None:
    name = docker("run", "-d", "--runtime", runtime, "-m", "64m", docker.image, "sleep", "1000").stdout.strip()
    assert docker("pause", name).returncode == 0
    assert docker("inspect", "-f", "{{.State.Status}}", name).stdout.strip() == "paused"
    assert docker("unpause", name).returncode == 0
    updated = docker("update", "--memory", "96m", "--memory-swap", "96m", name)
    assert updated.returncode == 0, updated.stderr
    assert str(96 << 20) in docker("exec", name, "cat", *MEMORY).stdout
    assert "sleep 1000" in docker("top", name).stdout
    assert docker("rm", "-f", name).returncode == 0


MEMORY = ("/sys/fs/cgroup/memory/memory.limit_in_bytes",)
if Path("/sys/fs/cgroup/cgroup.controllers").exists():
    MEMORY = ("/sys/fs/cgroup/memory.max",)


@both
def test_limits(docker: Docker, runtime: str) -> None:
    assert run(docker, runtime, "-m", "48m", docker.image, "cat", *MEMORY).strip() == str(48 << 20)
    killed = docker(
        "run", "--rm", "--runtime", runtime, "-m", "16m", "--memory-swap", "16m", docker.image,
        "sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1",
    )  # fmt: skip
    assert killed.returncode == 137
    forks = docker(
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--pids-limit",
        "4",
        docker.image,
        "sh",
        "-c",
        "sleep 1 & sleep 1 & sleep 1 & sleep 1 & wait",
    )
    assert "can't fork" in forks.stderr


@both
def test_mounts_and_read_only(docker: Docker, runtime: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    script = "cat /data/in; echo back > /data/out; touch /ro/x; touch /scratch/x && echo tmpfs; touch /x; mount | grep -c ' /scratch '"
    done = docker(
        "run", "--rm", "--runtime", runtime, "--read-only", "-v", f"{tmp_path}:/data", "-v", f"{tmp_path}:/ro:ro",
        "--tmpfs", "/scratch", docker.image, "sh", "-c", script,
    )  # fmt: skip
    assert done.stdout == "from the host\ntmpfs\n1\n"
    assert done.stderr.count("Read-only file system") == 2
    assert (tmp_path / "out").read_text() == "back\n"


@both
def test_user(docker: Docker, runtime: str) -> None:
    out = run(
        docker,
        runtime,
        "-u",
        "user",
        "--group-add",
        "3000",
        docker.image,
        "sh",
        "-c",
        "id -u; id -g; id -G; cat /etc/notes || echo no",
    )
    lines = out.split("\n")
    assert lines[:2] == ["1000", "1000"]
    assert set(lines[2].split()) == {"1000", "2000", "3000"}
    assert lines[3] == "no"


@both
def test_capabilities_and_seccomp_are_those_of_docker(docker: Docker, runtime: str) -> None:
    status = ("grep", "-E", "CapEff|CapBnd|Seccomp:|NoNewPrivs", "/proc/self/status")
    out = run(docker, runtime, docker.image, *status)
    assert out == run(docker, "runc", docker.image, *status)
    more = run(docker, runtime, "--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN", docker.image, *status)
    assert more == run(docker, "runc", "--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN", docker.image, *status)
    assert more != out


@both
def test_volume_is_removed_with_its_container(docker: Docker, runtime: str) -> None:
    name = docker("run", "-d", "--runtime", runtime, "-v", "/volume", docker.image, "sleep", "1000").stdout.strip()
    assert docker("cp", f"{name}:/etc/plain", "-").returncode == 0
    assert docker("rm", "-f", "-v", name).returncode == 0
    assert docker("volume", "ls", "-q").stdout == ""


def test_the_configuration_written_by_install_is_what_docker_shows(docker: Docker, rune: Path) -> None:
    shown = json.loads(docker("info", "--format", "{{json .Runtimes}}").stdout)
    assert shown["rune"]["path"] == str(rune)
    assert not [c for c in processes_naming(str(docker.work.root)).values() if "/rune" in c], "rune does not stay"


# --- enclave containers -----------------------------------------------------------------------------------------------

ENCLAVE = ("--runtime", "rune", "-e", "ENCLAVE_TYPE=sgx-sim")


def test_enclave_has_its_device_and_not_the_hosts_switches(docker: Docker) -> None:
    done = docker(
        "run", "--rm", *ENCLAVE, docker.image, "sh", "-c",
        "cat /dev/attestation/attestation_type; echo; env; wc -c < /dev/attestation/my_target_info; wc -c < /dev/attestation/report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "dcap"
    assert lines[-2:] == ["512", "432"]
    assert not [line for line in lines if "ENCLAVE" in line]
    assert "PATH=/bin" in lines


def test_enclave_quote_carries_the_report_data(docker: Docker) -> None:
    script = "printf '%064d' 7 > /dev/attestation/user_report_data && base64 /dev/attestation/quote"
    done = docker("run", "--rm", *ENCLAVE, docker.image, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    quote = base64.b64decode(done.stdout)
    assert int.from_bytes(quote[:2], "little") == 3
    assert quote[48 + 320 : 48 + 384] == b"%064d" % 7


@pytest.mark.parametrize(
    ("command", "code"),
    [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137)],
)
def test_enclave_exit_codes(docker: Docker, command: list[str], code: int) -> None:
    done = docker("run", "--rm", *ENCLAVE, docker.image, *command)
    assert done.returncode == code, done.stderr


def test_enclave_streams(docker: Docker) -> None:
    text = "".join(f"{n}\n" for n in range(50_000))
    done = docker("run", "--rm", "-i", *ENCLAVE, docker.image, "sh", "-c", "cat; echo e >&2", input=text)
    assert (done.stdout, done.stderr) == (text, "e\n")


def test_enclave_terminal(docker: Docker) -> None:
    terminal = Terminal(docker.argv("run", "--rm", "-it", *ENCLAVE, docker.image, "sh"), docker.work.env)
    terminal.expect("#")
    terminal.send("tty; echo $((6*7))\n")
    terminal.expect("42")
    assert "/dev/pts/0" in terminal.output
    terminal.send("exit 5\n")
    assert terminal.finish() == 5


def test_enclave_signals_stop_and_start_again(docker: Docker) -> None:
    script = 'trap "echo term; exit 4" TERM; trap "echo usr1" USR1; echo up; while :; do sleep 0.05; done'
    made = docker("run", "-d", *ENCLAVE, docker.image, "sh", "-c", script)
    assert made.returncode == 0, made.stderr
    name = made.stdout.strip()
    for turn in (1, 2):
        wait_for(lambda t=turn: docker("logs", name).stdout.count("up") == t, "its first line")  # type: ignore[misc]
        assert docker("kill", "-s", "USR1", name).returncode == 0
        wait_for(lambda t=turn: docker("logs", name).stdout.count("usr1") == t, "the signal")  # type: ignore[misc]
        assert docker("stop", "-t", "10", name).returncode == 0
        assert docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip() == "4"
        wait_for(lambda: not docker.work.enclaves(), "the enclave's end")
        if turn == 1:
            assert docker("start", name).returncode == 0


def test_enclave_exec_is_refused_unless_it_is_a_debug_enclave(docker: Docker) -> None:
    name = docker("run", "-d", *ENCLAVE, docker.image, "sleep", "1000").stdout.strip()
    refused = docker("exec", name, "id")
    assert refused.returncode != 0
    assert "exec" in refused.stdout + refused.stderr
    assert "uid=" not in refused.stdout
    assert docker("inspect", "-f", "{{.State.Running}}", name).stdout.strip() == "true"
    debug = docker("run", "-d", *ENCLAVE, "-e", "ENCLAVE_DEBUG=true", docker.image, "sleep", "1000").stdout.strip()
    allowed = docker("exec", "-i", debug, "sh", "-c", "id -u; cat; exit 9", input="x\n")
    assert (allowed.returncode, allowed.stdout) == (9, "0\nx\n"), allowed.stderr


def test_enclave_limits_user_and_mounts(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    tmp_path.chmod(0o755)
    done = docker(
        "run", "--rm", *ENCLAVE, "-u", "user", "-m", "64m", "--read-only", "--tmpfs", "/scratch", "-v", f"{tmp_path}:/data:ro",
        docker.image, "sh", "-c", f"id -u; cat {MEMORY[0]} /data/in; touch /scratch/x && echo ok; touch /x",
    )  # fmt: skip
    assert done.stdout == f"1000\n{64 << 20}\nfrom the host\nok\n", done.stderr
    assert "Read-only file system" in done.stderr
    killed = docker(
        "run", "--rm", *ENCLAVE, "-m", "16m", "--memory-swap", "16m", docker.image, "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"
    )  # fmt: skip
    assert killed.returncode == 137


def test_enclave_is_removed_by_force_without_a_trace(docker: Docker) -> None:
    names = [docker("run", "-d", *ENCLAVE, docker.image, "sleep", "1000").stdout.strip() for _ in range(3)]
    assert len(docker.work.enclaves()) >= 3
    assert docker("rm", "-f", *names).returncode == 0
    wait_for(lambda: not docker.work.enclaves(), "the enclaves' end", 15)


def test_enclave_container_dies_with_its_runelet(docker: Docker) -> None:
    name = docker("run", "-d", *ENCLAVE, docker.image, "sleep", "1000").stdout.strip()
    (runelet,) = docker.work.runelets()
    os.kill(runelet, signal.SIGKILL)
    wait_for(
        lambda: docker("inspect", "-f", "{{.State.Running}}", name).stdout.strip() == "false", "the container's end", 15
    )


@pytest.mark.skipif(Path("/dev/sgx_enclave").exists(), reason="this machine has SGX")
def test_hardware_enclave_is_refused_with_the_reason(docker: Docker) -> None:
    done = docker("run", "--rm", "--runtime", "rune", "-e", "ENCLAVE_TYPE=intelSgx", docker.image, "true")
    assert done.returncode == 125
    assert "tee.platform.unusable" in done.stderr
    assert "sgx" in done.stderr
    unknown = docker("run", "--rm", "--runtime", "rune", "-e", "ENCLAVE_TYPE=nonsense", docker.image, "true")
    assert "nonsense" in unknown.stderr


def test_built_image_runs_as_it_was_measured(docker: Docker) -> None:
    root = docker.work.root
    assert docker("save", "-o", f"{root}/in.tar", docker.image).returncode == 0
    build_enclave_image(docker.work, f"docker-archive:{root}/in.tar", f"docker-archive:{root}/out.tar:built:latest")
    assert docker("load", "-i", f"{root}/out.tar").returncode == 0
    output = run(docker, "rune", "built:latest")
    assert output.startswith(BUILT_OUTPUT)
    assert "ENCLAVE" not in output
    done = docker("run", "--rm", "--runtime", "rune", "built:latest", "id")
    assert done.returncode == 125 and "admission.args.refused" in done.stderr
    done = docker("run", "--rm", "--runtime", "rune", "-u", "0", "built:latest")
    assert done.returncode == 125 and "admission.user.refused" in done.stderr

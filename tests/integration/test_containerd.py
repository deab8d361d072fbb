"""containerd: rune through the stock shim's BinaryName, and through the runtime type io.containerd.rune.v2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import (
    BUILT_OUTPUT,
    Containerd,
    Result,
    Terminal,
    build_enclave_image,
    mounts_below,
    processes_naming,
    wait_for,
)

pytestmark = [pytest.mark.daemon, pytest.mark.crun]

#: Words for ``ctr run``: runc as the reference, rune by its path, rune by its own runtime type.
WAYS = ["runc", "binary", "type"]
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def nothing_stays(containerd: Containerd) -> Iterator[None]:
    """After each test: no task, no shim, no enclave, no mount."""
    yield
    for task in containerd("task", "ls", "-q").stdout.split():
        containerd("task", "kill", "-s", "KILL", task)
        wait_for(lambda t=task: containerd("task", "rm", "-f", t).returncode == 0, "the task's end", 10)  # type: ignore[misc]
    for container in containerd("container", "ls", "-q").stdout.split():
        containerd("container", "rm", container)
    wait_for(lambda: not containerd.work.enclaves(), "the enclaves' end", 15)
    assert [m for m in mounts_below(containerd.work.root) if "/cs/" in m] == []
    wait_for(lambda: not shims(containerd), "the shims' end", 10)


def shims(containerd: Containerd) -> list[str]:
    return [c for c in processes_naming(str(containerd.socket)).values() if "containerd-shim" in c]


def how(way: str, rune: Path) -> list[str]:
    return {
        "runc": ["--runtime", "io.containerd.runc.v2"],
        "binary": ["--runc-binary", str(rune)],
        "type": ["--runtime", "io.containerd.rune.v2"],
    }[way]


def run(containerd: Containerd, words: list[str], *command: str, name: str = "c", input: str | None = None) -> Result:
    return containerd("run", "--rm", *words, containerd.image, name, *command, input=input)


@ways
@pytest.mark.parametrize(("command", "code"), [(["true"], 0), (["sh", "-c", "exit 7"], 7)])
def test_exit_codes_and_streams(containerd: Containerd, rune: Path, way: str, command: list[str], code: int) -> None:
    done = run(containerd, how(way, rune), *command)
    assert done.returncode == code, done.stderr
    done = run(
        containerd, [*how(way, rune), "--env", "A=b c"], "sh", "-c", 'echo "$A"; head -n 1; echo e >&2', input="typed\n"
    )
    assert (done.stdout, done.stderr) == ("b c\ntyped\n", "e\n")


@ways
def test_a_program_that_is_not_there(containerd: Containerd, rune: Path, way: str) -> None:
    done = run(containerd, how(way, rune), "/nothing")
    assert done.returncode == 1
    assert "no such file or directory" in done.stderr.lower()


@ways
def test_terminal(containerd: Containerd, rune: Path, way: str) -> None:
    argv = containerd.argv("run", "--rm", "-t", *how(way, rune), containerd.image, "tty", "sh")
    terminal = Terminal(argv, containerd.work.env)
    terminal.expect("#")
    terminal.send("tty; echo $((6*7))\n")
    terminal.expect("42")
    assert "/dev/pts/0" in terminal.output
    terminal.send("exit 5\n")
    assert terminal.finish() == 5


@ways
def test_detached_exec_kill_pause(containerd: Containerd, rune: Path, way: str) -> None:
    script = 'trap "exit 4" TERM; while :; do sleep 0.05; done'
    done = containerd(
        "run", "-d", *how(way, rune), "--memory-limit", str(64 << 20), containerd.image, "d", "sh", "-c", script
    )
    assert done.returncode == 0, done.stderr
    assert containerd("task", "exec", "--exec-id", "e1", "d", "sh", "-c", "exit 9").returncode == 9
    out = containerd(
        "task", "exec", "--exec-id", "e2", "--cwd", "/tmp", "d", "sh", "-c", "pwd; head -n 1", input="x\n"
    ).stdout
    assert out == "/tmp\nx\n"
    assert containerd("task", "pause", "d").returncode == 0
    assert "PAUSED" in containerd("task", "ls").stdout
    assert containerd("task", "resume", "d").returncode == 0
    assert containerd("task", "ps", "d").stdout.count("\n") >= 2
    assert containerd("task", "metrics", "d").returncode == 0
    assert containerd("task", "kill", "-s", "TERM", "d").returncode == 0
    wait_for(lambda: "STOPPED" in containerd("task", "ls").stdout, "the end after SIGTERM")
    assert "non-zero exit code 4" in containerd("task", "rm", "d").stderr
    assert containerd("container", "rm", "d").returncode == 0


@ways
def test_mounts_directory_and_read_only(containerd: Containerd, rune: Path, way: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    words = [
        *how(way, rune), "--read-only", "--cwd", "/home/user",
        "--mount", f"type=bind,src={tmp_path},dst=/var,options=rbind:ro",
        "--mount", "type=tmpfs,src=tmpfs,dst=/tmp,options=nosuid",
    ]  # fmt: skip
    done = run(containerd, words, "sh", "-c", "pwd; cat /var/in; touch /tmp/x && echo ok; touch /x")
    assert done.stdout == "/home/user\nfrom the host\nok\n"
    assert "Read-only file system" in done.stderr


def test_the_runtime_type_runs_rune_and_not_runc(containerd: Containerd, rune: Path) -> None:
    done = containerd("run", "-d", *how("type", rune), containerd.image, "which", "sleep", "1000")
    assert done.returncode == 0, done.stderr
    state = json.loads(
        (
            containerd.work.root / "cs/io.containerd.runtime.v2.task" / containerd.namespace / "which/config.json"
        ).read_text()
    )
    assert state["process"]["args"] == ["sleep", "1000"]
    assert any("containerd-shim-runc-v2" in c for c in shims(containerd)), "the stock shim serves it"
    environment = [
        Path(f"/proc/{pid}/environ").read_bytes()
        for pid, command in processes_naming(str(containerd.socket)).items()
        if "containerd-shim-runc-v2" in command
    ]
    assert all(b"/lib/inclavare/shim:" in e for e in environment)


def test_containerd_loads_its_cri_plugin_with_the_configuration_written_by_install(
    containerd: Containerd, rune: Path
) -> None:
    dump = containerd.work.run("containerd", "--config", containerd.work.root / "containerd.toml", "config", "dump")
    assert dump.returncode == 0, dump.stderr
    assert f'BinaryName = "{rune}"' in dump.stdout
    plugins = containerd("plugins", "ls").stdout
    (line,) = [line for line in plugins.splitlines() if "io.containerd.grpc.v1 " in line and " cri " in line]
    # A table of runtimes without the default one would stop the plugin with another error than the missing CNI.
    log = (containerd.work.root / "containerd.log").read_text()
    assert "no corresponding runtime configured" not in log, line


enclave_ways = pytest.mark.parametrize("way", ["binary", "type"])


@enclave_ways
def test_enclave_container(containerd: Containerd, rune: Path, way: str) -> None:
    words = [*how(way, rune), "--env", "ENCLAVE_TYPE=sgx-sim"]
    done = run(
        containerd,
        words,
        "sh",
        "-c",
        "cat /dev/attestation/attestation_type; env | grep -c ENCLAVE; head -n 1; exit 7",
        input="typed\n",
    )
    assert (done.stdout, done.returncode) == ("dcap0\ntyped\n", 7), done.stderr


@enclave_ways
def test_enclave_is_killed_and_leaves_nothing(containerd: Containerd, rune: Path, way: str) -> None:
    words = [*how(way, rune), "--env", "ENCLAVE_TYPE=sgx-sim"]
    done = containerd("run", "-d", *words, containerd.image, "e", "sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert containerd.work.runelets()
    refused = containerd("task", "exec", "--exec-id", "x", "e", "id")
    assert refused.returncode != 0
    assert "exec" in refused.stderr
    assert containerd("task", "kill", "-s", "KILL", "e").returncode == 0
    wait_for(lambda: "STOPPED" in containerd("task", "ls").stdout, "the end after SIGKILL")
    wait_for(lambda: not containerd.work.runelets(), "the runelet's end", 15)
    assert containerd("task", "rm", "e").returncode == 0
    wait_for(lambda: not containerd.work.enclaves(), "the enclave's last file", 15)


@enclave_ways
def test_hardware_enclave_is_refused_with_the_reason(containerd: Containerd, rune: Path, way: str) -> None:
    if Path("/dev/sgx_enclave").exists():
        pytest.skip("this machine has SGX")
    done = run(containerd, [*how(way, rune), "--env", "ENCLAVE_TYPE=intelSgx"], "true")
    assert done.returncode != 0
    assert "tee.platform.unusable" in done.stderr


@pytest.mark.parametrize("way", ["binary", "type"])
def test_built_image_runs_as_it_was_measured(containerd: Containerd, rune: Path, way: str) -> None:
    name, out = f"docker.io/inclavare/built:{way}", containerd.work.root / "out.tar"
    out.unlink(missing_ok=True)
    source = containerd.work.root / "image/image.tar"
    build_enclave_image(containerd.work, f"oci-archive:{source}", f"oci-archive:{out}:{name}")
    assert containerd("image", "import", str(out)).returncode == 0
    done = containerd("run", "--rm", *how(way, rune), name, "c")
    assert done.stdout.startswith(BUILT_OUTPUT), done.stderr

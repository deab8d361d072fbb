"""Enclave containers through rune itself, on crun, FUSE and gocryptfs for real."""

from __future__ import annotations

import array
import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from runebox import RuneBox, wait_for

from inclavare.attestation.evidence import Evidence
from inclavare.config import load as load_config
from inclavare.runelet import client

pytestmark = pytest.mark.crun


def shell(script: str) -> tuple[str, str, str]:
    return "/bin/sh", "-c", script


# --- the same experience as an ordinary container


def test_output_exit_code_and_environment(box: RuneBox) -> None:
    done = box.run(box.bundle(*shell("echo out; echo err >&2; env; exit 7"), env=("A=b c",)))
    assert (done.returncode, done.stderr) == (7, "err\n")
    assert done.stdout.startswith("out\n")
    assert "A=b c\n" in done.stdout
    assert "ENCLAVE" not in done.stdout


@pytest.mark.parametrize("low_level", ["crun", "runc"])
def test_either_low_level_runtime(box: RuneBox, low_level: str) -> None:
    box.configure(f'[runtime]\nlow_level = "{low_level}"')
    directory = box.create(box.bundle("/bin/sleep", "100"))
    assert (directory / "control.sock").exists()
    assert (box.root / "c1" / ("state.json" if low_level == "runc" else "status")).exists()
    assert box.call("kill", "c1", "KILL").returncode == 0
    assert wait_for(lambda: box.status() == "stopped", 5) == []
    assert box.call("delete", "c1").returncode == 0


def test_standard_input(box: RuneBox) -> None:
    done = box.run(box.bundle("/bin/cat"), input=b"through the pipe\n" * 1000)
    assert done.stdout == "through the pipe\n" * 1000


def test_terminal(box: RuneBox) -> None:
    path = box.base / "console.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(20)

        def terminal(config: dict[str, Any]) -> None:
            config["process"]["terminal"] = True

        bundle = box.bundle(
            *shell("test -t 0 && test -t 1 && echo terminal; read line; echo got $line"), change=terminal
        )
        box.create(bundle, "c1", "--console-socket", str(path), start=False)
        connection, _ = server.accept()
        fds = array.array("i")
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_LEN(fds.itemsize))
        fds.frombytes(ancillary[0][2])
    assert box.call("start", "c1").returncode == 0
    master = fds[0]
    os.write(master, b"hello\n")
    seen = b""
    while b"got hello" not in seen:
        seen += os.read(master, 4096)
    assert b"terminal" in seen
    os.close(master)


def test_signals_reach_the_application(box: RuneBox) -> None:
    bundle = box.bundle(*shell("trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"))
    process = subprocess.Popen(
        [box.rune, "--root", box.root, "run", "--bundle", bundle, "c1"],
        env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert box.call("kill", "c1", "TERM").returncode == 0
    assert process.stdout.read() == b"caught\n"
    assert process.wait(10) == 9


def test_state_list_and_pid_file_show_the_callers_bundle(box: RuneBox) -> None:
    bundle = box.bundle("/bin/sleep", "100")
    pid_file = box.base / "pid"
    pid_file.write_text("1")
    box.create(bundle, "c1", "--pid-file", str(pid_file), start=False)
    state = json.loads(box.call("state", "c1").stdout)
    assert (state["status"], state["bundle"], state["pid"]) == ("created", str(bundle), int(pid_file.read_text()))
    assert re.fullmatch(r"[0-9a-f]{64}", state["annotations"]["org.inclavare.mrenclave"])
    assert str(bundle) in box.call("list").stdout
    assert json.loads(box.call("list", "--format", "json").stdout)[0]["bundle"] == str(bundle)
    assert box.call("list", "-q").stdout.split() == ["c1"]
    assert json.loads((bundle / "config.json").read_text())["process"]["env"][-1] == "ENCLAVE_TYPE=sgx-sim"


def test_detached_run_goes_on_without_its_caller(box: RuneBox) -> None:
    bundle = box.bundle("/bin/sleep", "100")
    done = subprocess.run(
        [box.rune, "--root", box.root, "run", "--detach", "--bundle", bundle, "c1"],
        env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    time.sleep(0.5)
    assert box.status() == "running"
    assert box.call("delete", "c1").returncode != 0  # it runs
    assert box.status() == "running"
    assert box.call("delete", "--force", "c1").returncode == 0
    assert box.status() == "gone"


def test_pause_resume_update_ps_and_events(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    assert box.call("pause", "c1").returncode == 0
    assert box.status() == "paused"
    assert box.call("resume", "c1").returncode == 0
    assert box.call("update", "--pids-limit", "20", "c1").returncode == 0
    assert str(box.pid()) in box.call("ps", "c1").stdout
    event = json.loads(box.call("events", "--stats", "c1").stdout)
    assert (event["type"], event["id"]) == ("stats", "c1")
    assert event["data"]["pids"]["current"] >= 1
    assert event["data"]["memory"]["usage"]["usage"] > 0


def test_user_limits_and_read_only_root(box: RuneBox) -> None:
    def change(config: dict[str, Any]) -> None:
        config["process"]["user"] = {"uid": 1000, "gid": 1000}
        config["root"]["readonly"] = True
        config["linux"]["resources"] = {"memory": {"limit": 48 << 20}, "pids": {"limit": 17}}

    box.create(box.bundle(*shell("id > /tmp/id; sleep 100"), change=change), start=False)
    groups = dict(line.split(":")[1:] for line in Path(f"/proc/{box.pid()}/cgroup").read_text().splitlines())
    if "memory" in groups:
        assert int(Path(f"/sys/fs/cgroup/memory{groups['memory']}/memory.limit_in_bytes").read_text()) == 48 << 20
        assert int(Path(f"/sys/fs/cgroup/pids{groups['pids']}/pids.max").read_text()) == 17
    else:
        assert int(Path(f"/sys/fs/cgroup{groups['']}/memory.max").read_text()) == 48 << 20
    box.call("delete", "--force", "c1")
    done = box.run(box.bundle(*shell("id; touch /tmp/x"), change=change))
    assert "uid=1000(app) gid=1000" in done.stdout
    assert "Read-only file system" in done.stderr


def test_mounts_of_the_host_are_measured_at_first_use(box: RuneBox) -> None:
    shared = box.base / "shared"
    shared.mkdir()
    (shared / "in").write_text("from the host\n")

    def change(config: dict[str, Any]) -> None:
        config["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(shared), "options": ["rbind", "rw"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ]

    bundle = box.bundle(*shell("cat /data/in; echo back > /data/out; stat -f -c %T /tmp"), change=change)
    with_mounts = box.run(bundle)
    assert with_mounts.stdout == "from the host\ntmpfs\n", with_mounts.stderr
    assert (shared / "out").read_text() == "back\n"
    manifest_events = [e for e in box.events() if e["event"] == "enclave.started"]
    box.run(box.bundle(*shell("cat /data/in; echo back > /data/out; stat -f -c %T /tmp"), name="other"))
    other = [e for e in box.events() if e["event"] == "enclave.started"]
    assert manifest_events[0]["mrenclave"] != other[-1]["mrenclave"]


def test_hooks_run(box: RuneBox) -> None:
    trace = box.base / "hooks"

    def hook(name: str) -> dict[str, Any]:
        return {"path": "/bin/sh", "args": ["sh", "-c", f"echo {name} >> {trace}"]}

    names = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")

    def change(config: dict[str, Any]) -> None:
        config["hooks"] = {name: [hook(name)] for name in names}

    assert box.run(box.bundle(change=change)).returncode == 0
    assert wait_for(lambda: set(trace.read_text().split()) == set(names), 5, trace.read_text) == []


def test_preserved_file_descriptors(box: RuneBox) -> None:
    reader, writer = os.pipe()
    bundle = box.bundle(*shell("echo through >&3"))
    done = subprocess.run(
        ["bash", "-c", f"exec {box.rune} --root {box.root} run --bundle {bundle} --preserve-fds 1 c1 3>&{writer}"],
        env=box.env, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[writer], timeout=30,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert os.read(reader, 100) == b"through\n"
    os.close(reader)


def test_exec_follows_the_policy(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    refused = box.call("exec", "c1", "/bin/echo", "hi")
    assert refused.returncode == 1
    assert "admission.exec.refused" in refused.stderr
    box.create(box.bundle("/bin/sleep", "100", env=("ENCLAVE_DEBUG=true",), name="debug"), "c2")
    assert box.meta("c2")["debug"] is True
    allowed = box.call("exec", "c2", *shell("echo hi; env"))
    assert allowed.returncode == 0, allowed.stderr
    assert allowed.stdout.startswith("hi\n")
    process = box.base / "process.json"
    spec = {
        "args": ["/bin/env"],
        "cwd": "/",
        "env": ["PATH=/bin", "ENCLAVE_TYPE=sgx-sim"],
        "user": {"uid": 0, "gid": 0},
    }
    process.write_text(json.dumps(spec))
    by_file = box.call("exec", "--process", str(process), "c2")
    assert "PATH=/bin" in by_file.stdout and "ENCLAVE" not in by_file.stdout, by_file.stderr
    spec["env"] = ["EVIL=1"]
    process.write_text(json.dumps(spec))
    assert "admission.env.refused" in box.call("exec", "--process", str(process), "c2").stderr


def test_checkpoint_is_refused(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    done = box.call("checkpoint", "--image-path", str(box.base / "image"), "c1")
    assert done.returncode == 1
    assert "rune.checkpoint.enclave" in done.stderr
    assert box.status() == "running"


# --- the shield


def test_annotation_also_asks_for_an_enclave_and_env_wins(box: RuneBox) -> None:
    def annotate(config: dict[str, Any]) -> None:
        config["annotations"] = {"enclave.type": "sgx-sim"}

    done = box.run(box.bundle("/bin/cat", "/dev/attestation/attestation_type", tee=None, change=annotate))
    assert done.stdout == "dcap"
    refused = box.run(box.bundle(tee="intelSgx", change=annotate))
    assert "sgx" in refused.stderr and refused.returncode == 1


def test_a_file_changed_on_the_host_is_an_error_and_is_reported(box: RuneBox) -> None:
    bundle = box.bundle(
        *shell("while ! test -e /data/go; do sleep 0.02; done; cat /etc/greeting; echo status $?; ls /etc")
    )
    shared = box.base / "shared"
    shared.mkdir()

    def change(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/data", "type": "bind", "source": str(shared), "options": ["bind"]})

    bundle = box.bundle(*json.loads((bundle / "config.json").read_text())["process"]["args"], change=change)
    process = subprocess.Popen(
        [box.rune, "--root", box.root, "run", "--bundle", bundle, "c1"],
        env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert wait_for(lambda: box.status() == "running", 10) == []
    (bundle / "rootfs/etc/greeting").write_text("tampered\n")
    (bundle / "rootfs/etc/planted").write_text("planted\n")
    (shared / "go").touch()
    output, _ = process.communicate(timeout=20)
    assert "tampered" not in output and "planted" not in output
    assert "I/O error" in output or "Input/output error" in output
    assert "status 1" in output
    violations = [event for event in box.events() if event["event"] == "shield.tree.violation"]
    assert [event["path"] for event in violations] == ["/etc/greeting"]


def test_metadata_and_links_come_from_the_tree(box: RuneBox) -> None:
    bundle = box.bundle("/bin/sleep", "100", env=("ENCLAVE_DEBUG=1",))
    rootfs = bundle / "rootfs"
    (rootfs / "etc/link").symlink_to("greeting")
    (rootfs / "etc/greeting").chmod(0o604)
    os.chown(rootfs / "etc/greeting", 1000, 1000)
    os.utime(rootfs / "etc/greeting", (1234567890, 1234567890))
    box.create(bundle)
    (rootfs / "etc/link").unlink()
    (rootfs / "etc/link").symlink_to("passwd")
    (rootfs / "etc/greeting").chmod(0o777)
    os.chown(rootfs / "etc/greeting", 0, 0)
    done = box.call("exec", "c1", *shell("stat -c '%a %u %g %Y' /etc/greeting; cat /etc/link; ls -a /etc"))
    assert done.stdout.split("\n")[:2] == ["604 1000 1000 1234567890", "measured"], done.stderr
    assert ".." in done.stdout.split()


def test_the_host_sees_neither_root_nor_what_is_written(box: RuneBox) -> None:
    secret = "only the enclave may know this"
    directory = box.create(
        box.bundle(*shell(f"echo {secret} > /etc/secret; mkdir /newdir; echo done > /tmp/x; sleep 100"))
    )
    scratch = box.state_dir / "scratch"
    assert wait_for(lambda: sum(path.is_file() for path in scratch.rglob("*")) >= 2, 5) == []
    assert list((directory / "root").iterdir()) == []
    assert list((directory / "layer").iterdir()) == []
    for path in scratch.rglob("*"):
        assert "secret" not in path.name and "newdir" not in path.name
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
    status = Path(f"/proc/{box.meta()['runelet']}")
    assert os.stat(status / "environ").st_uid == 0
    # A process that is not dumpable belongs to root in /proc, whoever it runs as, and cannot be traced by its owner.
    core = Path(f"/proc/{box.meta()['runelet']}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", core)


def test_nobody_else_can_look_in(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    runelet = box.meta()["runelet"]
    for target in (f"/proc/{runelet}/root/{box.directory()}/root", f"/proc/{runelet}/mem", str(box.directory())):
        done = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "cat", target], capture_output=True)
        assert done.returncode != 0
        assert b"ermission denied" in done.stderr


def test_writing_renaming_and_deleting_in_the_shielded_root(box: RuneBox) -> None:
    script = """
set -e
echo more >> /etc/greeting; cat /etc/greeting
rm /etc/passwd; ! test -e /etc/passwd
mv /etc/greeting /tmp/moved; cat /tmp/moved; ! test -e /etc/greeting
mkdir /a; echo x > /a/b; ln /a/b /a/c; ln -s b /a/d; cat /a/c /a/d; chmod 4755 /a/b; stat -c %a /a/b
dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null; wc -c < /big
"""
    done = box.run(box.bundle(*shell(script)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["measured", "more", "measured", "more", "x", "x", "4755", "8388608"]


def test_large_files_read_whole_and_at_random(box: RuneBox) -> None:
    bundle = box.bundle(*shell("md5sum /big; dd if=/big bs=1000 skip=3333 count=7 2>/dev/null | md5sum"))
    data = os.urandom(5_000_001)
    (bundle / "rootfs/big").write_bytes(data)
    done = box.run(bundle)
    expected = [hashlib.md5(data).hexdigest(), hashlib.md5(data[3333 * 1000 : 3340 * 1000]).hexdigest()]
    assert [line.split()[0] for line in done.stdout.splitlines()] == expected


def test_encrypted_volume_survives_and_is_bound_to_the_enclave(box: RuneBox) -> None:
    volume = box.base / "volume"
    volume.mkdir()
    template = box.base / "default.toml"
    template.write_text('[[files.encrypted]]\npath = "/data"\nkey = "sealed:mrenclave"\n')
    box.configure(f'[signing]\ndefault_manifest = "{template}"')

    def mount(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/data", "type": "bind", "source": str(volume), "options": ["bind"]})

    script = shell("cat /data/state; echo kept >> /data/state")
    first = box.run(box.bundle(*script, change=mount))
    assert "No such file" in first.stderr
    second = box.run(box.bundle(*script, change=mount))
    assert second.stdout == "kept\n", second.stderr
    assert all("state" not in path.name for path in volume.iterdir())
    other = box.run(box.bundle(*shell("cat /data/state; ls /data"), change=mount))
    assert "kept" not in other.stdout


def test_a_read_only_encrypted_volume_stays_read_only(box: RuneBox) -> None:
    volume = box.base / "volume"
    volume.mkdir()
    template = box.base / "default.toml"
    template.write_text('[[files.encrypted]]\npath = "/data"\nkey = "sealed:mrsigner"\n')
    box.configure(f'[signing]\ndefault_manifest = "{template}"')

    def mount(*options: str) -> Any:
        def change(config: dict[str, Any]) -> None:
            config["mounts"].append(
                {"destination": "/data", "type": "bind", "source": str(volume), "options": ["bind", *options]}
            )

        return change

    assert box.run(box.bundle(*shell("echo kept > /data/state"), change=mount("rw"))).returncode == 0
    done = box.run(box.bundle(*shell("cat /data/state; echo more >> /data/state"), change=mount("ro")))
    assert done.stdout == "kept\n"
    assert "Read-only file system" in done.stderr


# --- /dev/attestation


def attest_lines(box: RuneBox, script: str) -> list[bytes]:
    done = box.run(box.bundle(*shell(script)))
    assert done.returncode == 0, done.stderr
    return [bytes.fromhex(line.replace(" ", "")) for line in done.stdout.splitlines() if line]


HEX = "od -An -v -tx1 | while read l; do echo -n $l; done; echo"


def test_attestation_files_have_gramines_sizes(box: RuneBox) -> None:
    from inclavare.sgx.structs import Report, ReportBody

    target, report, quote, mine, sealed, signer, data = attest_lines(
        box,
        f"""cd /dev/attestation
echo -n 0123456789 > user_report_data
cat my_target_info > target_info
cat target_info | {HEX}; cat report | {HEX}; cat quote | {HEX}; cat my_target_info | {HEX}
cat keys/_sgx_mrenclave | {HEX}; cat keys/_sgx_mrsigner | {HEX}; cat user_report_data | {HEX}""",
    )
    assert [len(x) for x in (target, report, mine, sealed, signer, data)] == [512, 432, 512, 16, 16, 64]
    assert target == mine
    assert sealed != signer
    assert data == b"0123456789".ljust(64, b"\0")
    assert ReportBody.from_bytes(Report.from_bytes(report).body).report_data == data
    assert quote[48 + 320 : 48 + 384] == data
    assert quote[:2] == b"\x03\x00"


def test_attestation_files_refuse_what_gramine_refuses(box: RuneBox) -> None:
    script = f"""cd /dev/attestation
echo x > quote; echo $?; echo x > keys/_sgx_mrenclave; echo $?
echo -n 0123456789abcdef > keys/default; echo $?; cat keys/default; echo
echo x > keys/unknown; echo $?; rm quote; echo $?; ls keys; {HEX} < /dev/null"""
    done = box.run(box.bundle(*shell(script)))
    lines = done.stdout.split()
    assert lines == ["1", "1", "0", "0123456789abcdef", "1", "1", "_sgx_mrenclave", "_sgx_mrsigner", "default"]


def test_a_key_of_a_wrong_length_is_refused_when_the_file_is_closed(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    key = Path(f"/proc/{box.pid()}/root/dev/attestation/keys/default")
    fd = os.open(key, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"short")
    with pytest.raises(PermissionError):
        os.close(fd)
    assert key.read_bytes() == b""


def test_report_data_belongs_to_the_process_that_wrote_it(box: RuneBox) -> None:
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("needs python3 on the host")
    script = """
import os, sys
def write(text):
    with open("/dev/attestation/user_report_data", "wb") as f: f.write(text.ljust(64, b"."))
def read():
    return open("/dev/attestation/user_report_data", "rb").read().rstrip(b".").decode()
r, w = os.pipe(); r2, w2 = os.pipe()
write(b"parent")
if os.fork() == 0:
    write(b"child"); os.write(w, b"x"); os.read(r2, 1); print(read()); sys.stdout.flush(); os._exit(0)
os.read(r, 1); print(read()); sys.stdout.flush(); os.write(w2, b"x"); os.wait()
"""

    def change(config: dict[str, Any]) -> None:
        config["mounts"] += [
            {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
            for path in ("/usr", "/lib", "/lib64")
        ]

    done = box.run(box.bundle("/usr/bin/python3", "-I", "-S", "-c", script, change=change))
    assert done.stdout.split() == ["parent", "child"], done.stderr


def test_keys_belong_to_the_application_user(box: RuneBox) -> None:
    def change(config: dict[str, Any]) -> None:
        config["process"]["user"] = {"uid": 1000, "gid": 1000}

    done = box.run(
        box.bundle(*shell("wc -c < /dev/attestation/keys/_sgx_mrenclave; ls -n /dev/attestation/keys"), change=change)
    )
    assert done.stdout.startswith("16\n")
    assert re.search(r"-r-------- +1 1000 +1000 +16 .*_sgx_mrenclave", done.stdout)


def test_challenge_and_release(box: RuneBox, monkeypatch: pytest.MonkeyPatch) -> None:
    from inclavare.attestation import channel

    monkeypatch.setenv("INCLAVARE_CONFIG", str(box.config))
    box.create(box.bundle("/bin/sleep", "100", env=("ENCLAVE_DEBUG=1",)))
    directory = client.find(load_config(), "c1")
    nonce = os.urandom(32)
    reply = client.call(directory, {"op": "attest", "nonce": base64.b64encode(nonce).decode()})
    evidence = Evidence.from_dict(reply["evidence"])
    key = evidence.runtime_data["tee-pubkey"]
    request = {"op": "release", "name": "token", "tee_pubkey": key, "jwe": channel.encrypt(key, b"s3cret value")}
    assert client.call(directory, request) == {"released": "token"}
    assert box.call("exec", "c1", "/bin/cat", "/dev/attestation/secrets/token").stdout == "s3cret value"
    with pytest.raises(Exception, match="used already"):
        client.call(directory, request)
    assert b"s3cret" not in (box.log_dir / "runelet.log").read_bytes()
    assert client.call(directory, {"op": "info"})["secrets"] == ["token"]


# --- nothing is left behind


def test_a_dead_runelet_kills_the_container(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    pid = box.pid()
    os.kill(box.meta()["runelet"], signal.SIGKILL)
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists() or box.status() == "stopped", 5) == []
    assert box.status() == "stopped"


def test_a_dead_encrypted_layer_kills_the_container(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    runelet = box.meta()["runelet"]
    [helper] = Path(f"/proc/{runelet}/task/{runelet}/children").read_text().split()
    os.kill(int(helper), signal.SIGKILL)
    assert wait_for(lambda: box.status() == "stopped", 5) == []
    assert any(event["event"] == "shield.encrypted.died" for event in box.events())


def test_a_dead_guard_kills_the_container(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    guard = int(Path(f"/proc/{box.meta()['runelet']}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    assert wait_for(lambda: box.status() == "stopped", 5) == []


def test_a_killed_container_ends_its_enclave(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    runelet = box.meta()["runelet"]
    os.kill(box.pid(), signal.SIGKILL)
    assert wait_for(lambda: _gone(runelet), 5) == []
    assert box.status() == "stopped"
    assert list((box.run_dir / "epc").glob("[!.]*")) == []


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_rune_interrupted_at_any_point(box: RuneBox) -> None:
    bundle = box.bundle("/bin/sleep", "100")
    assert box.run(box.bundle(name="warm")).returncode == 0
    for step in range(30):
        process = subprocess.Popen(
            [box.rune, "--root", box.root, "run", "--bundle", bundle, f"c{step}"],
            env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(step * 0.007)
        if step % 2:
            process.send_signal(signal.SIGTERM)  # what runs by now may ignore it, as sleep does as process 1
            time.sleep(0.05)
        process.kill()
        process.wait(20)
    assert box.settled(20) == []


def test_fifty_at_once_leave_nothing(box: RuneBox) -> None:
    bundle = box.bundle(*shell("echo $$ > /tmp/x; cat /tmp/x"))
    assert box.run(bundle, "warm").returncode == 0
    processes = [
        subprocess.Popen(
            [box.rune, "--root", box.root, "run", "--bundle", bundle, f"many{number}"],
            env=box.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(50)
    ]  # fmt: skip
    results = [process.communicate(timeout=120) for process in processes]
    failed = [result for process, result in zip(processes, results, strict=True) if process.returncode != 0]
    assert failed == []
    assert {out for out, _ in results} == {b"1\n"}
    assert box.settled(30) == []


# --- wrong inputs, each with a clear error and nothing left


def refused(box: RuneBox, bundle: Path, *fragments: str, id: str = "c1") -> str:
    log = box.base / "log.json"
    log.unlink(missing_ok=True)
    done = box.call("--log", str(log), "--log-format", "json", "run", "--bundle", str(bundle), id)
    assert done.returncode != 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["level"] == "error"
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr
        assert fragment in records[-1]["msg"]
    assert box.settled() == []
    return done.stderr


def test_hardware_that_is_not_there(box: RuneBox) -> None:
    if Path("/dev/sgx_enclave").exists():
        pytest.skip("this machine has SGX")
    refused(box, box.bundle(tee="intelSgx"), "tee.platform.unusable", "sgx-sim")
    refused(box, box.bundle(tee="AwsNitroEnclaves"), "tee.type.unknown", "AwsNitroEnclaves")


def test_bundle_without_configuration(box: RuneBox) -> None:
    empty = box.base / "empty"
    empty.mkdir()
    refused(box, empty, "bundle.config.missing", str(empty))


def test_malformed_configuration(box: RuneBox) -> None:
    bundle = box.bundle()
    text = (bundle / "config.json").read_text()
    (bundle / "config.json").write_text(text[:-40])
    refused(box, bundle, "bundle.config.syntax")
    config = json.loads(text)
    config["process"]["args"] = "/bin/true"
    (bundle / "config.json").write_text(json.dumps(config))
    refused(box, bundle, "config.oci.shape", "process.args")
    config["process"]["args"] = ["/bin/true"]
    config["root"]["path"] = "nowhere"
    (bundle / "config.json").write_text(json.dumps(config))
    refused(box, bundle, "bundle.rootfs.missing")
    config["root"]["path"] = "rootfs"
    config["linux"]["namespaces"] = [{"type": "pid"}]
    (bundle / "config.json").write_text(json.dumps(config))
    refused(box, bundle, "config.oci.namespace")


def test_duplicate_id(box: RuneBox) -> None:
    box.create(box.bundle("/bin/sleep", "100"))
    done = box.run(box.bundle(name="second"))
    assert done.returncode == 1
    assert "rune.id.exists" in done.stderr
    assert box.status() == "running"


@pytest.mark.parametrize("id", ["../escape", "a/b", "..", "."])
def test_ids_that_name_other_places(box: RuneBox, id: str) -> None:
    done = box.run(box.bundle(), id)
    assert done.returncode == 1
    assert "rune.id.malformed" in done.stderr
    assert not (box.base / "escape").exists()


def test_missing_low_level_runtime(box: RuneBox) -> None:
    box.configure('[runtime]\nlow_level = "/nowhere/crun"')
    refused(box, box.bundle(), "rune.runtime.missing", "apt-get install crun")


def test_full_epc(box: RuneBox) -> None:
    box.configure('[sgx_sim]\nepc_size = "300M"')
    box.create(box.bundle("/bin/sleep", "100"))
    done = box.run(box.bundle(name="second"), "c2")
    assert done.returncode == 1
    assert "EPC" in done.stderr and "c1" in done.stderr
    box.call("delete", "--force", "c1")
    assert box.run(box.bundle(name="second"), "c2").returncode == 0


def test_full_disk(box: RuneBox) -> None:
    box.state_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", box.state_dir], check=True)
    try:
        done = box.run(box.bundle(*shell("dd if=/dev/zero of=/big bs=64k count=64")))
        assert done.returncode != 0
        assert "No space left" in done.stderr or "no space" in done.stderr.lower()
        assert wait_for(lambda: all("tmpfs" in path for path in box.leftovers()), 10, box.leftovers) == []
    finally:
        subprocess.run(["umount", box.state_dir], check=True)


def test_manifest_of_the_node_that_is_wrong(box: RuneBox) -> None:
    template = box.base / "default.toml"
    template.write_text("[enclave]\nsizes = 3\n")
    box.configure(f'[signing]\ndefault_manifest = "{template}"')
    refused(box, box.bundle(), "sizes", "default.toml")


def test_on_node_signing_can_be_switched_off(box: RuneBox) -> None:
    box.configure("[signing]\non_node = []")
    refused(box, box.bundle(), "admission.unsigned.refused", "inclavare build")


def test_unknown_carrier(box: RuneBox) -> None:
    refused(box, box.bundle(env=("RUNE_CARRIER=graphene",)), "runtime.carrier.missing", "graphene")
    refused(box, box.bundle(env=("ENCLAVE_RUNTIME_PATH=/usr/lib/liberpal.so",)), "runtime.carrier.missing")


def test_masked_paths_cannot_hide_measured_files(box: RuneBox) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["maskedPaths"] = ["/etc/greeting"]

    refused(box, box.bundle(change=change), "admission.mask.refused", "/etc/greeting")


def test_unknown_command_and_option(box: RuneBox) -> None:
    assert "rune.usage" in box.call("frobnicate").stderr
    assert "rune.usage" in box.call("--frobnicate", "run", "x").stderr
    assert "rune.usage" in box.call("run", "--bundle").stderr
    assert box.call("--help").returncode == 0
    assert "low-level runtime" in box.call("--version").stdout
    assert json.loads(box.call("features").stdout)["ociVersionMax"] == "1.2.0"

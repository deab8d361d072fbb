"""/dev/attestation over a real mount, in front of an enclave of the simulated platform; Gramine's behaviour throughout."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attestation_files import calls_of, mounted, needs_fuse

from inclavare.config import Config
from inclavare.errors import PlatformError
from inclavare.sgx import keys
from inclavare.sgx.codes import Status
from inclavare.sgx.structs import KeyRequest, Report, ReportBody
from inclavare.shield.secrets import SecretStore
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, create

pytestmark = needs_fuse

OWNER = 4321


@dataclass
class Mounted:
    """The mount, and what is behind it."""

    point: Path
    secrets: SecretStore
    enclave: SimulatedEnclave
    faults: list[BaseException]

    def read(self, name: str) -> bytes:
        return (self.point / name).read_bytes()

    def write(self, name: str, data: bytes, flags: int = os.O_WRONLY | os.O_TRUNC) -> None:
        fd = os.open(self.point / name, flags)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)

    def reported(self) -> bytes:
        """The report data in a fresh report."""
        return ReportBody.from_bytes(Report.from_bytes(self.read("report")).body).report_data


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A node of these tests' own, for they leave counters behind."""
    base = tmp_path_factory.mktemp("node")
    return Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=64 << 20)


@pytest.fixture(scope="module")
def platform(node: Config) -> SimulatedPlatform:
    return create(node)


@pytest.fixture
def dev(platform: SimulatedPlatform, load: Any) -> Iterator[Mounted]:
    enclave = load()
    secrets = SecretStore()
    faults: list[BaseException] = []

    def quote(data: bytes) -> bytes:
        return platform.quote(enclave.report(platform.quote_target_info(), data))

    with mounted(calls_of(enclave, quote), faults, secrets, OWNER) as point:
        yield Mounted(point, secrets, enclave, faults)
    enclave.destroy()


def test_names_sizes_and_modes(dev: Mounted) -> None:
    assert sorted(os.listdir(dev.point)) == [
        "attestation_type", "collateral", "counter", "egetkey", "keys", "my_target_info", "quote", "report", "secrets",
        "target_info", "user_report_data",
    ]  # fmt: skip
    assert sorted(os.listdir(dev.point / "keys")) == ["_sgx_mrenclave", "_sgx_mrsigner", "default"]
    sizes = {name: (dev.point / name).stat().st_size for name in os.listdir(dev.point)}
    assert sizes["quote"] == len(dev.read("quote")) > 1000
    assert {name: sizes[name] for name in ("user_report_data", "target_info", "my_target_info", "report")} == {
        "user_report_data": 64, "target_info": 512, "my_target_info": 512, "report": 432,
    }  # fmt: skip
    assert dev.read("attestation_type") == b"dcap"
    assert len(dev.read("report")) == 432
    modes = {
        name: stat.S_IMODE((dev.point / name).stat().st_mode) for name in ("report", "user_report_data", "keys/default")
    }
    assert modes == {"report": 0o444, "user_report_data": 0o666, "keys/default": 0o600}
    assert (dev.point / "keys/_sgx_mrenclave").stat().st_uid == OWNER
    for missing in ("nothing", "keys/other", "secrets/x", "report/x"):
        assert not (dev.point / missing).exists()
    assert dev.faults == []


def test_report_and_quote_carry_what_was_written(dev: Mounted, tmp_path: Path) -> None:
    dev.write("user_report_data", bytes(range(64)))
    dev.write("target_info", dev.read("my_target_info"))
    assert dev.reported() == bytes(range(64))
    assert dev.read("quote")[48 + 320 : 48 + 384] == bytes(range(64))
    assert dev.read("target_info") == dev.read("my_target_info") == dev.enclave.target_info()
    shutil.copyfile(dev.point / "report", tmp_path / "report")  # by sendfile
    assert len((tmp_path / "report").read_bytes()) == 432


def test_collateral_is_the_platforms_and_is_not_fetched_at_every_look(load: Any, tmp_path: Path) -> None:
    asked: list[float] = []
    answers: list[bytes | Exception] = [b'{"tcb_info": 1}', b'{"tcb_info": 2}']

    def collateral() -> bytes:
        asked.append(time.monotonic())
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    enclave, faults = load(), list[BaseException]()
    with mounted(calls_of(enclave, collateral=collateral), faults) as point:
        file = point / "collateral"
        assert (file.stat().st_size, stat.S_IMODE(file.stat().st_mode)) == (15, 0o444)
        shutil.copyfile(file, tmp_path / "copy")
        assert file.read_bytes() == (tmp_path / "copy").read_bytes() == b'{"tcb_info": 1}'
        with pytest.raises(PermissionError):
            file.write_bytes(b"{}")
    assert (len(asked), faults) == (1, [])
    asked.clear()
    answers[:] = [PlatformError("the PCCS does not answer")]
    with mounted(calls_of(enclave, collateral=collateral), faults) as point:
        assert (point / "collateral").stat().st_size == 0
        assert "quote" in os.listdir(point)
        with pytest.raises(OSError, match="Input/output error"):
            (point / "collateral").read_bytes()
    assert len(asked) == 1
    enclave.destroy()


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (1, 1), (10, 10), (64, 64), (65, 64), (3000, 64)])
def test_short_writes_are_padded_and_long_ones_cut(dev: Mounted, length: int, kept: int) -> None:
    dev.write("user_report_data", b"\xee" * 64)
    data = os.urandom(length)
    dev.write("user_report_data", data)
    if length:  # to write nothing is no write
        assert dev.read("user_report_data") == data[:kept].ljust(64, b"\0") == dev.reported()
    else:
        assert dev.reported() == b"\xee" * 64


def test_a_write_is_in_force_before_the_file_is_closed(dev: Mounted) -> None:
    fd = os.open(dev.point / "user_report_data", os.O_WRONLY)
    os.write(fd, b"A" * 64)
    assert dev.reported() == b"A" * 64
    os.write(fd, b"B" * 20)  # another write through the same descriptor replaces the whole
    assert dev.reported() == b"B" * 20 + bytes(44)
    os.pwrite(fd, b"C" * 64, 0)
    assert dev.reported() == b"C" * 64
    os.close(fd)
    assert dev.reported() == b"C" * 64


def test_pieces_that_follow_one_another_are_put_together(dev: Mounted) -> None:
    with open(dev.point / "target_info", "wb", buffering=0) as file:
        for at in range(0, 512, 100):
            file.write(dev.enclave.target_info()[at : at + 100])
    assert dev.read("target_info") == dev.enclave.target_info()


def test_reading_and_writing_through_one_descriptor(dev: Mounted) -> None:
    dev.write("user_report_data", b"old".ljust(64, b"."))
    fd = os.open(dev.point / "user_report_data", os.O_RDWR)
    assert os.pread(fd, 100, 0) == b"old".ljust(64, b".")
    os.pwrite(fd, b"new", 0)
    assert os.pread(fd, 100, 0) == b"new"
    os.close(fd)
    assert dev.read("user_report_data") == b"new".ljust(64, b"\0")


@pytest.mark.parametrize("name", [
    "attestation_type", "my_target_info", "report", "quote", "keys/_sgx_mrenclave", "keys/_sgx_mrsigner",
])  # fmt: skip
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_not_even_root_writes_what_is_read_only(dev: Mounted, name: str, flags: int) -> None:
    before = dev.read("target_info"), dev.read("user_report_data")
    with pytest.raises(PermissionError):
        dev.write(name, b"x" * 16, flags)
    assert (dev.read("target_info"), dev.read("user_report_data")) == before
    assert dev.faults == []


def test_modes_owners_and_names_are_fixed(dev: Mounted) -> None:
    file = dev.point / "user_report_data"
    with pytest.raises(PermissionError):
        file.chmod(0o777)
    with pytest.raises(PermissionError):
        os.chown(file, 1, 1)
    new = dev.point / "new"
    for refused, *arguments in ((file.unlink,), (file.rename, new), (new.touch,), (new.mkdir,), (new.symlink_to, "x")):
        with pytest.raises(OSError):
            refused(*arguments)
    os.truncate(file, 3)
    assert len(dev.read("user_report_data")) == 64
    assert dev.faults == []


# --- keys


def test_sealing_keys_are_the_enclaves(dev: Mounted) -> None:
    for name in ("mrenclave", "mrsigner"):
        assert dev.read(f"keys/_sgx_{name}") == dev.enclave.seal_key(name)
        assert len(dev.read(f"keys/_sgx_{name}")) == 16


@pytest.mark.parametrize("length", [1, 15, 17, 32, 5000])
def test_a_key_has_16_bytes(dev: Mounted, length: int) -> None:
    assert dev.read("keys/default") == b""
    dev.write("keys/default", b"0123456789abcdef")
    with pytest.raises(PermissionError):
        dev.write("keys/default", b"k" * length)
    assert dev.read("keys/default") == b"0123456789abcdef"
    fd = os.open(dev.point / "keys/default", os.O_WRONLY)
    os.write(fd, b"fedcba98")
    os.write(fd, b"76543210")
    os.close(fd)
    assert dev.read("keys/default") == b"fedcba9876543210"


def _as(user: int, path: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["cat", path], user=user, group=user, extra_groups=[], capture_output=True, cwd="/")


def test_keys_and_secrets_are_the_applications_alone(dev: Mounted) -> None:
    dev.secrets.put(b"token", b"hush")
    dev.write("keys/default", b"0123456789abcdef")
    for user in (OWNER, 65534):
        assert _as(user, dev.point / "attestation_type").stdout == b"dcap"
    for name in ("egetkey", "counter"):
        assert _as(OWNER, dev.point / name).returncode == 0
        assert b"Permission denied" in _as(65534, dev.point / name).stderr
    for name, value in (("keys/default", b"0123456789abcdef"), ("keys/_sgx_mrenclave", dev.enclave.seal_key("mrenclave")),
                        ("secrets/token", b"hush")):  # fmt: skip
        assert _as(OWNER, dev.point / name).stdout == value
        other = _as(65534, dev.point / name)
        assert other.stdout == b"" and b"Permission denied" in other.stderr


def test_secrets_come_and_go(dev: Mounted) -> None:
    assert os.listdir(dev.point / "secrets") == []
    dev.secrets.put(b"b", b"2")
    dev.secrets.put(b"a", b"first")
    assert os.listdir(dev.point / "secrets") == ["a", "b"]
    numbers = {name: (dev.point / "secrets" / name).stat().st_ino for name in "ab"}
    dev.secrets.put(b"a", b"replaced")
    assert dev.read("secrets/a") == b"replaced"
    assert (dev.point / "secrets/a").stat().st_size == 8
    assert {name: (dev.point / "secrets" / name).stat().st_ino for name in "ab"} == numbers
    assert stat.S_IMODE((dev.point / "secrets/a").stat().st_mode) == 0o400
    with pytest.raises(PermissionError):
        dev.write("secrets/a", b"x")
    dev.secrets.wipe()
    assert os.listdir(dev.point / "secrets") == []
    with pytest.raises(FileNotFoundError):
        dev.read("secrets/a")
    assert dev.faults == []


# --- requests and answers


@contextlib.contextmanager
def opened(dev: Mounted, name: str) -> Iterator[int]:
    fd = os.open(dev.point / name, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def ask(dev: Mounted, name: str, request: bytes) -> bytes:
    with opened(dev, name) as fd:
        assert os.write(fd, request) == len(request)
        return os.read(fd, 4096)


def seal_request(**fields: Any) -> bytes:
    return KeyRequest(keys.KEY_SEAL, keys.POLICY_MRENCLAVE, **{"key_id": os.urandom(32), **fields}).to_bytes()


def test_a_key_for_a_request(dev: Mounted) -> None:
    request = seal_request(isv_svn=3)
    answer = ask(dev, "egetkey", request)
    assert answer == bytes(4) + dev.enclave.egetkey(request)
    assert len(answer) == 20
    assert dev.read("egetkey") == b""


@pytest.mark.parametrize(("fields", "status"), [
    ({"isv_svn": 4}, Status.SGX_INVALID_ISVSVN),
    ({"cpusvn": b"\xff" * 16}, Status.SGX_INVALID_CPUSVN),
    ({"key_name": keys.KEY_PROVISION}, Status.SGX_INVALID_ATTRIBUTE),
    ({"key_name": 99}, Status.SGX_INVALID_KEYNAME),
])  # fmt: skip
def test_what_egetkey_refuses(dev: Mounted, fields: dict[str, Any], status: Status) -> None:
    request = KeyRequest(**{"key_name": keys.KEY_SEAL, "key_policy": 1, **fields}).to_bytes()
    assert ask(dev, "egetkey", request) == status.to_bytes(4, "little") + bytes(16)
    assert dev.faults == []


@pytest.mark.parametrize("request_", [
    b"", b"x", seal_request()[:-1], seal_request() + b"\0", seal_request()[:100] + b"\1" + seal_request()[101:],
    KeyRequest(keys.KEY_SEAL, 1 << 7).to_bytes(),
    KeyRequest(keys.KEY_SEAL, keys.POLICY_MRSIGNER | keys.POLICY_CONFIGID).to_bytes(),
])  # fmt: skip
def test_a_request_for_which_egetkey_faults(dev: Mounted, request_: bytes) -> None:
    if not request_:
        assert ask(dev, "egetkey", request_) == b""  # to write nothing is no write
        return
    with opened(dev, "egetkey") as fd:
        os.write(fd, seal_request())
        with pytest.raises(OSError, match="Invalid argument"):
            os.write(fd, request_)
        assert os.read(fd, 100) == b""  # nor is the answer to an earlier request still there
    assert dev.faults == []


def test_an_answer_is_read_once_and_in_pieces(dev: Mounted) -> None:
    request = seal_request()
    key = bytes(4) + dev.enclave.egetkey(request)
    with opened(dev, "egetkey") as fd:
        os.write(fd, request)
        assert [os.read(fd, 7), os.pread(fd, 7, 0), os.read(fd, 100), os.read(fd, 100)] == [
            key[:7], key[7:14], key[14:], b"",
        ]  # fmt: skip
        os.write(fd, request)
        os.write(fd, request)
        assert os.read(fd, 100) == key
    with open(dev.point / "egetkey", "wb", buffering=0) as file:
        file.write(request)
    assert dev.read("egetkey") == b""


def test_answers_belong_to_the_open_file(dev: Mounted) -> None:
    requests = [seal_request() for _ in range(8)]
    expected = [bytes(4) + dev.enclave.egetkey(request) for request in requests]

    def repeat(number: int) -> None:
        for _ in range(20):
            if ask(dev, "egetkey", requests[number]) != expected[number]:
                wrong.append(number)

    wrong: list[int] = []
    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_counters(dev: Mounted) -> None:
    def line(request: str) -> list[str]:
        return ask(dev, "counter", request.encode()).decode().split()

    name = "state" + os.urandom(4).hex()
    id, *numbers = line(f"create mrenclave {name}\n")
    assert numbers == ["0", "0"]
    assert line(f"increment mrenclave {name}") == [id, "1", "0"]
    assert line(f"increment mrenclave {name}") == [id, "2", "0"]
    assert line(f"confirm mrenclave {name} {id} 1") == [id, "2", "1"]
    assert line(f"read mrenclave {name}") == [id, "2", "1"]
    found = dev.enclave.counters.read("mrenclave", name)
    assert (found.id.hex(), found.value, found.confirmed) == (id, 2, 1)
    for request, code in {
        f"create mrenclave {name}": errno.EEXIST,
        f"read mrsigner {name}": errno.ENOENT,
        f"confirm mrenclave {name} {'0' * 32} 1": errno.ESTALE,
        f"confirm mrenclave {name} {id} 3": errno.ERANGE,
    }.items():
        with pytest.raises(OSError) as caught:
            line(request)
        assert caught.value.errno == code, request
    assert line(f"destroy mrenclave {name}") == []
    assert dev.faults == []


@pytest.mark.parametrize("request_", [
    b"read", b"read mrenclave", b"read mrenclave a b", b"grow mrenclave a", b"read anyone a", b"read mrenclave ../a",
    b"confirm mrenclave a", b"confirm mrenclave a zz 1", b"confirm mrenclave a 00 x", b"\xff\xfe a b", b"\0",
])  # fmt: skip
def test_what_is_no_request_about_a_counter(dev: Mounted, request_: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        ask(dev, "counter", request_)
    assert dev.faults == []


def test_counters_in_a_shell(dev: Mounted) -> None:
    name = "shell" + os.urandom(4).hex()
    script = f"exec 3<>{dev.point}/counter; echo create mrsigner {name} >&3; cat <&3; echo increment mrsigner {name} >&3; cat <&3"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    id = dev.enclave.counters.read("mrsigner", name).id.hex()
    assert done.stdout == f"{id} 0 0\n{id} 1 0\n", done.stderr


def test_without_counters_there_is_no_such_file(load: Any) -> None:
    with mounted(calls_of(load(), bytes, counters=None), []) as point:
        assert "counter" not in os.listdir(point)
        assert not (point / "counter").exists()
        assert (point / "egetkey").exists()


def test_a_damaged_counter_is_an_error_and_is_reported(dev: Mounted, node: Config) -> None:
    name = "damaged" + os.urandom(4).hex()
    ask(dev, "counter", f"create mrenclave {name}".encode())
    [path] = node.platform_dir.glob(f"counters/*/{name}.counter")
    path.write_bytes(b"damaged")
    with pytest.raises(OSError, match="Input/output error"):
        ask(dev, "counter", f"read mrenclave {name}".encode())
    assert [error.id for error in dev.faults if isinstance(error, PlatformError)] == ["tee.counter.damaged"]


# --- processes

_CHILD = """
import sys
point, text = sys.argv[1:]
with open(point + "/user_report_data", "wb") as file: file.write(text.encode().ljust(64, b"."))
sys.stdout.write(open(point + "/user_report_data", "rb").read().rstrip(b".").decode())
sys.stdout.flush()
sys.stdin.read(1)
sys.stdout.write(open(point + "/user_report_data", "rb").read().rstrip(b".").decode())
"""


def test_what_a_process_writes_is_its_own(dev: Mounted) -> None:
    children = []
    for text in ("one", "two"):
        child = subprocess.Popen(
            [sys.executable, "-ISc", _CHILD, dev.point, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.read(3) == text.encode()
        children.append(child)
    # Who has written nothing sees what was written last.
    assert _as(65534, dev.point / "user_report_data").stdout == b"two".ljust(64, b".")
    dev.write("user_report_data", b"parent".ljust(64, b"."))
    assert [child.communicate(b"x")[0] for child in children] == [b"one", b"two"]
    assert dev.reported() == b"parent".ljust(64, b".")


def test_threads_of_a_process_share(dev: Mounted) -> None:
    thread = threading.Thread(target=dev.write, args=("user_report_data", b"T" * 64))
    thread.start()
    thread.join()
    assert dev.reported() == b"T" * 64


def test_many_processes_at_once(dev: Mounted) -> None:
    script = f"""i=0; while [ $i -lt 10 ]; do
printf %-64s $$-$i > {dev.point}/user_report_data
# The shell itself reads, as it wrote.
read -r line < {dev.point}/user_report_data; [ "$line" = "$$-$i" ] || echo "$$ wrote $i and saw $line"
i=$((i+1)); done"""
    shells = [subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE) for _ in range(8)]
    assert [shell.communicate()[0] for shell in shells] == [b""] * 8


def test_an_enclave_that_cannot_answer_is_an_error_and_is_reported(platform: SimulatedPlatform, load: Any) -> None:
    enclave = load()
    faults: list[BaseException] = []

    def quote(data: bytes) -> bytes:
        return platform.quote(enclave.report(platform.quote_target_info(), data))

    with mounted(calls_of(enclave, quote), faults) as point:
        assert len((point / "report").read_bytes()) == 432
        enclave.destroy()
        for name in ("report", "quote", "keys/_sgx_mrsigner"):
            with pytest.raises(OSError, match="Input/output error"):
                (point / name).read_bytes()
        assert faults
        assert (point / "attestation_type").read_bytes() == b"dcap"

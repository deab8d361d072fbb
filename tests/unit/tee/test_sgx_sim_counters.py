"""Monotonic counters: they only grow, they survive whatever kills, and they are their owner's alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import InclavareError, PlatformError, ResourceError, UsageError
from inclavare.sgx.keys import Identity
from inclavare.sgx.structs import ATTRIBUTE_INIT, Attributes
from inclavare.tee.base import Counter
from inclavare.tee.sgx_sim import SimulatedEnclave, counters, create
from inclavare.tee.sgx_sim.counters import SimulatedCounters

ENCLAVE = Identity(
    mrenclave=b"e" * 32, mrsigner=b"g" * 32, attributes=Attributes(ATTRIBUTE_INIT | 4, 3), isv_prod_id=7, isv_svn=3
)
OWNERS = ("mrenclave", "mrsigner")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "platform"


@pytest.fixture
def mine(state: Path) -> SimulatedCounters:
    return SimulatedCounters(state, lambda: ENCLAVE)


@pytest.fixture
def load(config: Config, signers: Signers) -> Callable[..., SimulatedEnclave]:
    """Loads small enclaves on a platform of this test's own."""
    platform = create(config)

    def loader(content: bytes, *, key: Any = None, debug: bool = False, **overrides: Any) -> SimulatedEnclave:
        image = small_image(content, debug=debug)
        signed = sign_image(image, key or signers.ours, **overrides)
        return platform.load(image, signed.to_bytes(), label="test")

    return loader


def refused(id: str, call: Callable[..., Any], *arguments: Any) -> InclavareError:
    with pytest.raises(InclavareError) as caught:
        call(*arguments)
    assert caught.value.id == id
    return caught.value


@pytest.mark.parametrize("owner", OWNERS)
def test_life_of_a_counter(mine: SimulatedCounters, owner: str) -> None:
    assert refused("tee.counter.unknown", mine.read, owner, "state").exit_code == UsageError.exit_code
    made = mine.create(owner, "state")
    assert (len(made.id), made.value, made.confirmed) == (16, 0, 0)
    refused("tee.counter.exists", mine.create, owner, "state")
    assert [mine.increment(owner, "state").value for _ in range(3)] == [1, 2, 3]
    assert mine.read(owner, "state") == Counter(made.id, 3, 0)
    assert mine.confirm(owner, "state", made.id, 2) == mine.read(owner, "state") == Counter(made.id, 3, 2)
    mine.destroy(owner, "state")
    for call in (mine.read, mine.increment, mine.destroy):
        refused("tee.counter.unknown", call, owner, "state")
    refused("tee.counter.unknown", mine.confirm, owner, "state", made.id, 2)


def test_numbers_never_fall(mine: SimulatedCounters) -> None:
    made = mine.create("mrenclave", "n")
    for _ in range(5):
        mine.increment("mrenclave", "n")
    assert mine.confirm("mrenclave", "n", made.id, 4).confirmed == 4
    assert mine.confirm("mrenclave", "n", made.id, 1) == mine.read("mrenclave", "n") == Counter(made.id, 5, 4)
    error = refused("tee.counter.ahead", mine.confirm, "mrenclave", "n", made.id, 6)
    assert (error.found, error.expected) == (6, "at most 5")
    assert mine.read("mrenclave", "n") == Counter(made.id, 5, 4)


def test_one_that_is_made_again_is_another(mine: SimulatedCounters) -> None:
    old = mine.create("mrenclave", "n")
    mine.increment("mrenclave", "n")
    mine.destroy("mrenclave", "n")
    new = mine.create("mrenclave", "n")
    assert new.id != old.id
    mine.increment("mrenclave", "n")
    refused("tee.counter.stale", mine.confirm, "mrenclave", "n", old.id, 1)
    assert mine.read("mrenclave", "n").confirmed == 0


def test_the_end_of_numbers(mine: SimulatedCounters, state: Path) -> None:
    mine.create("mrenclave", "n")
    [path] = state.glob("counters/*/n.counter")
    counters._write(path, Counter(b"i" * 16, (1 << 64) - 2))
    assert mine.increment("mrenclave", "n").value == (1 << 64) - 1
    refused("tee.counter.end", mine.increment, "mrenclave", "n")
    assert mine.read("mrenclave", "n").value == (1 << 64) - 1


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 65, "a/b", "../x", "a b", "ä", "a\0", "a\n"])
def test_names(mine: SimulatedCounters, state: Path, name: str) -> None:
    if name in (".", ".."):  # dots are letters like any other: a suffix keeps them from being directories
        assert mine.create("mrenclave", name).value == 0
        assert mine.increment("mrenclave", name).value == 1
        return
    for call in (mine.create, mine.read, mine.increment, mine.destroy):
        refused("tee.counter.name", call, "mrenclave", name)
    assert not state.exists()


def test_owners(mine: SimulatedCounters) -> None:
    refused("tee.counter.owner", mine.create, "anyone", "n")
    mine.create("mrenclave", "n")
    refused("tee.counter.unknown", mine.read, "mrsigner", "n")
    assert mine.create("mrsigner", "n").id != mine.read("mrenclave", "n").id


def test_another_enclave_sees_nothing(load: Any, signers: Signers) -> None:
    ours, twin, newer = load(b"one"), load(b"one"), load(b"two", isv_svn=4)
    others = {
        "signer": load(b"one", key=signers.theirs),
        "product": load(b"one", isv_prod_id=8),
        "debug": load(b"one", debug=True),
    }
    for owner in OWNERS:
        made = ours.counters.create(owner, f"{owner}-state")
        assert twin.counters.increment(owner, f"{owner}-state") == Counter(made.id, 1)
    assert newer.counters.increment("mrsigner", "mrsigner-state").value == 2
    refused("tee.counter.unknown", newer.counters.increment, "mrenclave", "mrenclave-state")
    for enclave in others.values():
        for call in (enclave.counters.read, enclave.counters.increment, enclave.counters.destroy):
            refused("tee.counter.unknown", call, "mrsigner", "mrsigner-state")
    # MRENCLAVE does not cover the signer, and seal keys under it do not depend on it either.
    assert others["signer"].counters.read("mrenclave", "mrenclave-state").value == 1
    for name in ("product", "debug"):
        refused("tee.counter.unknown", others[name].counters.read, "mrenclave", "mrenclave-state")
    for owner in OWNERS:
        for name, enclave in others.items():
            same = enclave.seal_key(owner) == ours.seal_key(owner)
            assert same == ((name, owner) == ("signer", "mrenclave"))


def test_an_enclave_that_has_ended_has_no_counters(load: Any) -> None:
    enclave: SimulatedEnclave = load(b"ends")
    opened = enclave.counters
    opened.create("mrenclave", "n")
    enclave.destroy()
    for call in (opened.read, opened.increment):
        with pytest.raises(PlatformError):
            call("mrenclave", "n")


def test_so_many_and_no_more(mine: SimulatedCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "MAX_COUNTERS", 3)
    for number in range(3):
        mine.create("mrenclave", str(number))
    refused("tee.counter.many", mine.create, "mrenclave", "more")
    mine.create("mrsigner", "0")  # another owner
    mine.destroy("mrenclave", "1")
    mine.create("mrenclave", "more")


def test_files_are_private_and_damage_is_noticed(mine: SimulatedCounters, state: Path) -> None:
    mine.create("mrenclave", "n")
    mine.increment("mrenclave", "n")
    [path] = state.glob("counters/*/n.counter")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == path.parent.parent.stat().st_mode & 0o777 == 0o700
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes((good[at] ^ 1,)) + good[at + 1 :])
        refused("tee.counter.damaged", mine.read, "mrenclave", "n")
        refused("tee.counter.damaged", mine.increment, "mrenclave", "n")
    for wrong in (b"", good[:-1], good + b"\0"):
        path.write_bytes(wrong)
        refused("tee.counter.damaged", mine.read, "mrenclave", "n")


def test_a_full_disk_gives_out_no_number(mine: SimulatedCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    mine.create("mrenclave", "n")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResourceError):
            mine.increment("mrenclave", "n")
    assert mine.increment("mrenclave", "n").value == 1


def test_a_number_is_durable_before_it_is_given_out(
    mine: SimulatedCounters, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.create("mrenclave", "n")
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    mine.increment("mrenclave", "n")
    [path] = state.glob("counters/*/n.counter")
    assert synced == [str(path.with_name(".n.counter.new")), str(path.parent)]


def _take(state: Path, count: int, out: Any) -> None:
    found = SimulatedCounters(state, lambda: ENCLAVE)
    out.put([found.increment("mrenclave", "n").value for _ in range(count)])


def test_no_number_is_given_out_twice(mine: SimulatedCounters, state: Path) -> None:
    mine.create("mrenclave", "n")
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=_take, args=(state, 25, out)) for _ in range(6)]
    for worker in workers:
        worker.start()
    numbers = [number for _ in workers for number in out.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(numbers) == list(range(1, 151))


_KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_sgx_sim_counters import ENCLAVE
from inclavare.tee.sgx_sim.counters import SimulatedCounters
mine = SimulatedCounters(Path(sys.argv[1]), lambda: ENCLAVE)
while True:
    os.write(1, b"%d\\n" % mine.increment("mrenclave", "n").value)
"""


def test_killed_at_any_moment(mine: SimulatedCounters, state: Path) -> None:
    made = mine.create("mrenclave", "n")
    highest = 0
    here = Path(__file__).parent
    for moment in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(state), str(here)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(here.parent)},
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(0.003 * moment)
        child.send_signal(signal.SIGKILL)
        given = [int(line) for line in (first + child.stdout.read()).split()]
        child.wait()
        assert given[0] > highest and given == sorted(set(given))
        highest = given[-1]
        found = mine.read("mrenclave", "n")
        assert found.id == made.id and found.value in (highest, highest + 1)


def test_another_platform_has_other_counters(tmp_path: Path, signers: Signers) -> None:
    # A new session of the same platform (as after a reboot, with a new run directory) finds them; another platform not.
    image = small_image(b"code")
    signed = sign_image(image, signers.ours).to_bytes()

    def session(run: str, state: str) -> SimulatedEnclave:
        config = Config(state_dir=tmp_path / state, run_dir=tmp_path / run, log_dir=tmp_path / "log", epc_size=4 << 20)
        return create(config).load(image, signed, label="t")

    made = session("run1", "a").counters.create("mrsigner", "n")
    assert session("run2", "a").counters.increment("mrsigner", "n") == Counter(made.id, 1)
    refused("tee.counter.unknown", session("run3", "b").counters.read, "mrsigner", "n")

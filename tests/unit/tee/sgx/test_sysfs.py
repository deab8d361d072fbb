"""EPC sizes and the misc cgroup's account of it, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inclavare.tee.sgx import sysfs
from inclavare.tee.sgx.sysfs import EpcGroup, epc_accounting, epc_nodes

MOUNTS = """\
22 1 0:20 / /sys rw,nosuid - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup{0} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
31 22 0:27 / /sys/fs/other rw - cgroup cgroup rw,misc
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cgroup(
    root: Path, path: str = "", current: int = 0, limit: str | None = None, events: str = "", mount: str = ""
) -> None:
    directory = root / f"sys/fs/cgroup{mount}" / path
    write(directory / "misc.current", f"sev 7\nsgx_epc {current}\n")
    if limit is not None:
        write(directory / "misc.max", f"sev max\nsgx_epc {limit}\n")
    write(directory / "misc.events", events)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/self/mountinfo", MOUNTS.format(""))
    write(tmp_path / "proc/self/cgroup", "3:misc:/elsewhere\n0::/system.slice/rune.service\n")
    write(tmp_path / "sys/fs/cgroup/misc.capacity", "sev 10\nsgx_epc 8589934592\n")
    cgroup(tmp_path, current=300)
    cgroup(tmp_path, "system.slice", 200, "4096", "sev.max 9\nsgx_epc.max 5\n")
    cgroup(tmp_path, "system.slice/rune.service", 100, "max")
    return tmp_path


def test_nodes(tmp_path: Path) -> None:
    assert epc_nodes(tmp_path) == {}
    for node, text in (("node10", "4096\n"), ("node2", "8192\n"), ("node3", "broken\n"), ("nodex", "1\n")):
        write(tmp_path / f"sys/devices/system/node/{node}/x86/sgx_total_bytes", text)
    write(tmp_path / "sys/devices/system/node/node4/meminfo", "")
    assert list(epc_nodes(tmp_path).items()) == [(2, 8192), (10, 4096)]


def test_the_own_group_and_its_parents(root: Path) -> None:
    found = epc_accounting(root)
    assert found is not None and found.capacity == 8 << 30
    assert found.groups == (
        EpcGroup("/system.slice/rune.service", 100, None, 0),
        EpcGroup("/system.slice", 200, 4096, 5),
        EpcGroup("/", 300, None, 0),
    )
    assert found.tightest == found.groups[1]


def test_the_least_room_counts_not_the_least_limit(root: Path) -> None:
    cgroup(root, "system.slice/rune.service", 5000, "6000")
    cgroup(root, "system.slice", 5000, "8000")
    found = epc_accounting(root)
    assert found is not None and found.tightest is not None and found.tightest.limit == 6000
    cgroup(root, "system.slice", 7900, "8000")
    found = epc_accounting(root)
    assert found is not None and found.tightest is not None and found.tightest.limit == 8000


def test_without_limits(root: Path) -> None:
    (root / "sys/fs/cgroup/system.slice/misc.max").unlink()
    found = epc_accounting(root)
    assert found is not None and found.tightest is None


def test_the_root_group(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    found = epc_accounting(root)
    assert found is not None and [group.path for group in found.groups] == ["/"]


def test_a_hybrid_hierarchy_and_a_name_with_a_space(root: Path) -> None:
    write(root / "proc/self/mountinfo", MOUNTS.format("/uni\\040fied"))
    write(root / "sys/fs/cgroup/uni fied/misc.capacity", "sgx_epc 4096\n")
    cgroup(root, "system.slice/rune.service", 1, mount="/uni fied")
    found = epc_accounting(root)
    assert found is not None and found.capacity == 4096 and found.groups[0].current == 1


@pytest.mark.parametrize("missing", ["proc/self/mountinfo", "proc/self/cgroup", "sys/fs/cgroup/misc.capacity"])
def test_a_kernel_that_does_not_account(root: Path, missing: str) -> None:
    (root / missing).unlink()
    assert epc_accounting(root) is None


def test_a_machine_without_epc(root: Path) -> None:
    write(root / "sys/fs/cgroup/misc.capacity", "sev 10\n")
    assert epc_accounting(root) is None


def test_this_machine() -> None:
    found = epc_accounting()
    assert found is None or (found.capacity > 0 and sysfs.RESOURCE == "sgx_epc")
    assert all(size > 0 for size in epc_nodes().values())

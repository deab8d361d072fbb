"""What the kernel tells about enclave memory: its size per node, and the misc cgroup's ``sgx_epc`` limit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: The resource's name in the misc controller's files. Only kernels with EPC cgroups have it.
RESOURCE = "sgx_epc"
_NODES = "sys/devices/system/node"


def epc_nodes(root: Path = Path("/")) -> dict[int, int]:
    """EPC bytes by NUMA node, from ``x86/sgx_total_bytes`` (Linux 5.17 with NUMA); empty where that is not offered."""
    found = {}
    for path in (root / _NODES).glob("node*/x86/sgx_total_bytes"):
        number, size = path.parts[-3].removeprefix("node"), _read(path)
        if number.isdigit() and size is not None and size.strip().isdigit():
            found[int(number)] = int(size)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class EpcGroup:
    """One cgroup's EPC account; bytes.

    Attributes:
        path: within the cgroup file system, ``/`` is the root.
        current: charged to it and to what is below it.
        limit: ``None`` where there is no limit (and at the root, which has none).
        refused: how many times a charge met the limit here or below (``misc.events``).
    """

    path: str
    current: int
    limit: int | None
    refused: int


@dataclass(frozen=True, slots=True)
class EpcAccounting:
    """The misc controller's view.

    Attributes:
        capacity: EPC bytes of the machine.
        groups: this process's cgroup and its parents, the innermost first.
    """

    capacity: int
    groups: tuple[EpcGroup, ...]

    @property
    def tightest(self) -> EpcGroup | None:
        """The group with the least room left, if any has a limit."""
        limited = [group for group in self.groups if group.limit is not None]
        return min(limited, key=lambda group: (group.limit or 0) - group.current, default=None)


def epc_accounting(root: Path = Path("/")) -> EpcAccounting | None:
    """Where this process's enclaves are charged; ``None`` if the kernel does not account for EPC or there is no EPC."""
    mount = _cgroup2(root)
    own = re.search(r"^0::(/.*)$", _read(root / "proc/self/cgroup") or "", re.MULTILINE)
    if mount is None or own is None:
        return None
    capacity = _entry(mount / "misc.capacity")
    if capacity is None:
        return None
    groups = []
    path = own[1].rstrip("/")
    while True:
        directory = mount / path.lstrip("/")
        current = _entry(directory / "misc.current")
        if current is not None:
            refused = _entry(directory / "misc.events", f"{RESOURCE}.max") or 0
            groups.append(EpcGroup(path or "/", current, _entry(directory / "misc.max"), refused))
        if not path:
            return EpcAccounting(capacity, tuple(groups))
        path = path.rpartition("/")[0]


def _cgroup2(root: Path) -> Path | None:
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if after.startswith("cgroup2 ") and len(fields) > 4:
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            return root / point.lstrip("/")
    return None


def _entry(path: Path, name: str = RESOURCE) -> int | None:
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None

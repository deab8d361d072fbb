"""``events``: cgroup statistics in runc's format, also for containers that crun made (crun has no such command)."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import load as load_config
from ..errors import UsageError
from .dispatch import forward, low_level_output

if TYPE_CHECKING:
    from .main import Call

_ROOT = Path("/sys/fs/cgroup")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNLIMITED = (1 << 64) - 1


def run(call: Call) -> None:
    """Print one JSON line now (``--stats``), or one each interval until the container ends."""
    config = load_config()
    if os.path.exists(f"{call.root}/{call.container}/state.json"):
        forward(call, config)  # runc's own container
    interval = _interval(call.values.get("--interval", "5s"))
    code, output = low_level_output(call, config, ["state", str(call.container)])
    if code != 0:
        os._exit(code)
    state = json.loads(output)
    if state.get("status") not in ("running", "paused", "created"):
        raise UsageError(
            f"container {call.container} does not run", id="rune.events.stopped", found=state.get("status")
        )
    pid = int(state["pid"])
    pidfd = os.pidfd_open(pid)
    groups = _groups(pid)
    while True:
        sys.stdout.write(json.dumps({"type": "stats", "id": call.container, "data": statistics(groups)}) + "\n")
        sys.stdout.flush()
        if "--stats" in call.flags or select.select([pidfd], [], [], interval)[0]:
            return


def _interval(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if match is None or float(match[1]) == 0:
        raise UsageError("not an interval", id="rune.usage", found=text, expected="for example 500ms, 5s or 1m")
    return float(match[1]) * _UNITS[match[2]]


def _groups(pid: int) -> dict[str, Path]:
    """Controller → directory; ``""`` for the unified hierarchy."""
    groups = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            base = _ROOT / controller if controller else _ROOT
            if controller and not base.is_dir():
                base = _ROOT / controllers  # mounted together, as cpu,cpuacct is
            groups[controller] = base / path.lstrip("/")
    return groups


def _number(path: Path, default: int = 0) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return default
    return _UNLIMITED if text == "max" else int(text)


def _table(path: Path) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
    except (OSError, ValueError):
        return {}


def statistics(groups: dict[str, Path]) -> dict[str, Any]:
    """CPU in nanoseconds, memory in bytes, processes; from cgroup v1 where a controller has a hierarchy, else v2."""
    return {
        "cpu": _cpu_v1(groups) if "cpuacct" in groups else _cpu_v2(groups[""]),
        "memory": _memory_v1(groups["memory"]) if "memory" in groups else _memory_v2(groups[""]),
        "pids": {
            "current": _number(groups.get("pids", groups.get("", _ROOT)) / "pids.current"),
            "limit": _number(groups.get("pids", groups.get("", _ROOT)) / "pids.max"),
        },
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": None,
    }


def _cpu_v1(groups: dict[str, Path]) -> dict[str, Any]:
    base = groups["cpuacct"]
    stat = _table(groups.get("cpu", base) / "cpu.stat")
    try:
        each = [int(word) for word in (base / "cpuacct.usage_percpu").read_text().split()]
    except OSError:
        each = []
    return {
        "usage": {
            "total": _number(base / "cpuacct.usage"),
            "percpu": each,
            "kernel": _number(base / "cpuacct.usage_sys"),
            "user": _number(base / "cpuacct.usage_user"),
        },
        "throttling": {
            "periods": stat.get("nr_periods", 0),
            "throttledPeriods": stat.get("nr_throttled", 0),
            "throttledTime": stat.get("throttled_time", 0),
        },
    }


def _cpu_v2(base: Path) -> dict[str, Any]:
    stat = _table(base / "cpu.stat")
    return {
        "usage": {
            "total": stat.get("usage_usec", 0) * 1000,
            "kernel": stat.get("system_usec", 0) * 1000,
            "user": stat.get("user_usec", 0) * 1000,
        },
        "throttling": {
            "periods": stat.get("nr_periods", 0),
            "throttledPeriods": stat.get("nr_throttled", 0),
            "throttledTime": stat.get("throttled_usec", 0) * 1000,
        },
    }


def _memory_v1(base: Path) -> dict[str, Any]:
    def usage(prefix: str) -> dict[str, int]:
        return {
            "limit": _number(base / f"{prefix}.limit_in_bytes"),
            "usage": _number(base / f"{prefix}.usage_in_bytes"),
            "max": _number(base / f"{prefix}.max_usage_in_bytes"),
            "failcnt": _number(base / f"{prefix}.failcnt"),
        }

    raw = _table(base / "memory.stat")
    return {
        "cache": raw.get("cache", 0),
        "usage": usage("memory"),
        "swap": usage("memory.memsw"),
        "kernel": usage("memory.kmem"),
        "kernelTCP": usage("memory.kmem.tcp"),
        "raw": raw,
    }


def _memory_v2(base: Path) -> dict[str, Any]:
    raw = _table(base / "memory.stat")
    return {
        "cache": raw.get("file", 0),
        "usage": {
            "limit": _number(base / "memory.max"),
            "usage": _number(base / "memory.current"),
            "max": _number(base / "memory.peak"),
            "failcnt": _table(base / "memory.events").get("max", 0),
        },
        "raw": raw,
    }

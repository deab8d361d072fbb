"""The two settings that the forwarding path needs, without parsing TOML on every call.

The parsed values are kept in a small file under ``/run`` whose name is the configuration file's inode, size and
times; a changed configuration has another name.
"""

from __future__ import annotations

import os

#: Where the values are remembered; only root can write there.
CACHE = "/run/inclavare-settings"
#: Values that are remembered before all are dropped; a node has one configuration, a test machine many.
_KEPT = 16


def load() -> tuple[str, str]:
    """``(run_dir, low_level)`` of the node's configuration (see :mod:`inclavare.config`)."""
    name = os.environ.get("INCLAVARE_CONFIG") or "/etc/inclavare/config.toml"
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if not os.environ.get("INCLAVARE_CONFIG"):
            return "/run/inclavare", "auto"
        return _parse()
    cached = f"{CACHE}/{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    try:
        with open(cached, encoding="utf-8") as handle:
            run_dir, low_level = handle.read().split("\n")
            return run_dir, low_level
    except (OSError, ValueError):
        pass
    run_dir, low_level = _parse()
    try:
        os.makedirs(CACHE, mode=0o700, exist_ok=True)
        _prune()
        temporary = f"{cached}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(f"{run_dir}\n{low_level}")
        os.rename(temporary, cached)
    except OSError:
        pass  # an unprivileged caller parses each time
    return run_dir, low_level


def _prune() -> None:
    """Keep the directory small: changed configurations leave their old values behind."""
    names = os.listdir(CACHE)
    for name in names if len(names) >= _KEPT else ():
        try:
            os.unlink(f"{CACHE}/{name}")
        except FileNotFoundError:
            pass  # another rune does the same


def _parse() -> tuple[str, str]:
    from ..config import load as load_config

    config = load_config()
    return str(config.run_dir), config.low_level

"""The node's configuration: ``/etc/inclavare/config.toml`` (or ``$INCLAVARE_CONFIG``), every key with a default.

::

    state_dir = "/var/lib/inclavare"       # platform keys, signing key, caches, encrypted scratch space
    run_dir = "/run/inclavare"             # one directory per running enclave; lost at reboot
    log_dir = "/var/log/inclavare"         # runelet.log, JSON lines

    [runtime]
    low_level = "auto"                     # auto (crun where it can run, else runc), crun, runc or a path

    [sgx_sim]
    epc_size = "32G"                       # enclave memory of the simulated platform, shared by all enclaves

    [signing]
    on_node = ["sgx-sim"]                  # TEE platforms on which an image without a SIGSTRUCT is signed at first use
    key = "/var/lib/inclavare/signing-key.pem"   # RSA-3072, e=3; made at first use
    default_manifest = ""                  # enclave.toml that images without a manifest of their own start from
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError

DEFAULT_PATH = "/etc/inclavare/config.toml"
ENV_PATH = "INCLAVARE_CONFIG"


@dataclass(frozen=True, slots=True)
class Config:
    """The node's configuration; sizes in bytes, paths absolute."""

    state_dir: Path = Path("/var/lib/inclavare")
    run_dir: Path = Path("/run/inclavare")
    log_dir: Path = Path("/var/log/inclavare")
    low_level: str = "auto"
    epc_size: int = 32 << 30
    on_node_signing: tuple[str, ...] = ("sgx-sim",)
    signing_key: Path | None = None
    default_manifest: Path | None = None
    source: str = field(default="defaults", compare=False)

    @property
    def platform_dir(self) -> Path:
        """Where the simulated platform keeps its fuse keys, certificates and collateral."""
        return self.state_dir / "sgx-sim"

    @property
    def node_signing_key(self) -> Path:
        """The PEM file of the on-node signing key."""
        return self.signing_key or self.state_dir / "signing-key.pem"


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: object) -> int:
    """Bytes from ``4096``, ``"256M"``, ``"1GiB"``, ``"300MB"`` (units are powers of two).

    Raises:
        ValueError: not a size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"not a size: {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"negative size: {value}")
        return value
    text = value.strip().upper().removesuffix("IB").removesuffix("B")
    digits = text.rstrip("KMGT")
    if not digits.isascii() or not digits.isdigit() or text[len(digits) :] not in _UNITS:
        raise ValueError(f'not a size: {value!r} (write for example 4096, "256M" or "1G")')
    return int(digits) * _UNITS[text[len(digits) :]]


def config_path() -> str:
    """The file that :func:`load` reads."""
    return os.environ.get(ENV_PATH) or DEFAULT_PATH


def load(path: str | None = None) -> Config:
    """Read the configuration.

    Args:
        path: the file; by default ``$INCLAVARE_CONFIG``, else ``/etc/inclavare/config.toml``, which may be absent.

    Raises:
        UsageError: the file named explicitly is missing, is not TOML, or has an unknown key or a wrong type.
    """
    name = path or config_path()
    try:
        with open(name, "rb") as handle:
            raw = handle.read()
    except FileNotFoundError:
        if path is None and not os.environ.get(ENV_PATH):
            return Config()
        raise UsageError(
            f"configuration file {name} does not exist",
            id="config.file.missing",
            remedy=f"create it, or unset {ENV_PATH}",
        ) from None
    import tomllib

    try:
        document = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: {error}", id="config.file.syntax", remedy="correct the file") from None
    return _from_document(document, name)


def _from_document(document: dict[str, Any], name: str) -> Config:
    fields: dict[str, Any] = {"source": name}
    tables: dict[str, dict[str, tuple[str, type]]] = {
        "": {"state_dir": ("state_dir", Path), "run_dir": ("run_dir", Path), "log_dir": ("log_dir", Path)},
        "runtime": {"low_level": ("low_level", str)},
        "sgx_sim": {"epc_size": ("epc_size", int)},
        "signing": {
            "on_node": ("on_node_signing", tuple),
            "key": ("signing_key", Path),
            "default_manifest": ("default_manifest", Path),
        },
    }

    def take(table: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            label = f"{table}.{key}" if table else key
            if table == "" and key in tables and isinstance(value, dict):
                take(key, value)
                continue
            if key not in tables[table]:
                raise UsageError(
                    f"{name}: unknown key {label}",
                    id="config.key.unknown",
                    expected=", ".join(sorted(tables[table])),
                    remedy="remove it or correct its name",
                )
            target, kind = tables[table][key]
            fields[target] = _convert(name, label, value, kind)

    take("", document)
    return Config(**{key: value for key, value in fields.items() if value is not None})


def _convert(name: str, label: str, value: Any, kind: type) -> Any:
    def wrong(expected: str) -> UsageError:
        return UsageError(
            f"{name}: {label} has the wrong type", id="config.key.type", found=repr(value), expected=expected
        )

    if kind is int:
        try:
            return parse_size(value)
        except ValueError as error:
            raise wrong(str(error)) from None
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise wrong("a list of strings")
        return tuple(value)
    if not isinstance(value, str):
        raise wrong("a string")
    if kind is Path:
        if value == "":
            return None
        if not os.path.isabs(value):
            raise wrong("an absolute path")
        return Path(value)
    return value

"""``features``: the low-level runtime's document where it has one, else what crun 1.8 does, and what rune adds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import load as load_config
from ..runtimes.base import NAMES as RUNTIMES
from ..tee.base import NAMES as PLATFORMS
from .dispatch import low_level_output, print_json
from .help import SPEC

if TYPE_CHECKING:
    from .main import Call

#: For a crun that has no ``features`` command (before 1.9).
_CRUN: dict[str, Any] = {
    "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
    "linux": {
        "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
        "cgroup": {"v1": True, "v2": True, "systemd": True},
        "seccomp": {"enabled": True},
        "apparmor": {"enabled": True},
        "selinux": {"enabled": True},
    },
}


def run(call: Call) -> None:
    """Print the features document of the runtime-spec (features.md)."""
    import os

    null, saved = os.open("/dev/null", os.O_WRONLY), os.dup(2)
    os.dup2(null, 2)  # a runtime without the command says so there
    code, output = low_level_output(call, load_config(), ["features"])
    os.dup2(saved, 2)
    try:
        document = json.loads(output) if code == 0 else dict(_CRUN)
    except ValueError:
        document = dict(_CRUN)
    document["ociVersionMin"] = "1.0.0"
    document["ociVersionMax"] = SPEC
    document["annotations"] = {
        **(document.get("annotations") or {}),
        "org.inclavare.rune.version": __version__,
        "org.inclavare.rune.enclave.types": ",".join(("intelSgx", *PLATFORMS)),
        "org.inclavare.rune.enclave.runtimes": ",".join(RUNTIMES),
    }
    print_json(document)

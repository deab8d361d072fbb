"""Talk to a running container's runelet."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import InclavareError, PlatformError, UsageError
from .job import CONTROL, read_meta

_TIMEOUT_SECONDS = 60.0


def containers(config: Config) -> list[tuple[Path, dict[str, Any]]]:
    """Directories and metadata of the node's enclave containers, running or ended, sorted by id.

    Raises:
        PermissionError: whoever asks may not know which containers there are.
    """
    base = config.run_dir / "enclaves"
    try:
        roots = list(base.iterdir())
    except FileNotFoundError:
        return []
    # iterdir, not glob: glob takes a directory that it may not read for an empty one.
    found = [(path, read_meta(path)) for root in roots for path in root.iterdir() if path.is_dir()]
    return sorted(found, key=lambda item: item[0].name)


def find(config: Config, container: str) -> Path:
    """The directory of a running enclave container.

    Args:
        config: the node's configuration.
        container: its id, or a unique beginning of it.

    Raises:
        UsageError: none, or more than one, has this id.
    """
    names = [path for path, _ in containers(config)]
    exact = [path for path in names if path.name == container]
    matches = exact or [path for path in names if container and path.name.startswith(container)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        running = ", ".join(path.name[:12] for path in names[:8]) or "none"
        raise UsageError(
            f"there is no enclave container {container}",
            id="container.name.unknown",
            expected=f"one of the running ones: {running}",
            remedy="give the id that docker ps, ctr or rune list shows",
        )
    raise UsageError(
        f"{container} stands for several enclave containers",
        id="container.name.ambiguous",
        found=", ".join(str(path) for path in matches),
        remedy="give more of the id",
    )


def call(directory: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Send one request (see :mod:`inclavare.runelet.control`) and return the reply.

    Args:
        directory: from :func:`find`.
        request: JSON-ready.

    Raises:
        InclavareError: what the runelet answered, or that it does not run.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_SECONDS)
        try:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{fd}/{CONTROL}")
            finally:
                os.close(fd)
            connection.sendall(json.dumps(request).encode() + b"\n")
            data = bytearray()
            while chunk := connection.recv(65536):
                data += chunk
        except OSError as error:
            raise PlatformError(
                f"the enclave of container {directory.name} does not answer: {error.strerror or error}",
                id="runelet.socket.unreachable",
                remedy="check that the container runs, and that you are root",
            ) from None
    try:
        reply = json.loads(data)
    except ValueError:
        raise PlatformError(
            f"the enclave of container {directory.name} ended while it answered", id="runelet.socket.closed"
        ) from None
    if "error" in reply:
        raise InclavareError.from_dict(reply["error"])
    found: dict[str, Any] = reply
    return found

"""``checkpoint`` and ``restore``: forwarded for ordinary containers, refused for enclaves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from ..config import load as load_config
from ..errors import PolicyError
from .dispatch import directory_of, forward

if TYPE_CHECKING:
    from .main import Call


def run(call: Call) -> NoReturn:
    """Forward or refuse."""
    config = load_config()
    if os.path.lexists(directory_of(call, config)):
        raise PolicyError(
            f"an enclave container cannot be {call.command}ed: its memory and keys must not leave the enclave",
            id="rune.checkpoint.enclave",
            remedy="let the application seal its state and start it again",
        )
    forward(call, config)

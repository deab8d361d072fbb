"""What both halves share: serving until a signal comes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ...verdict.keyprovider import Server


def until_signal(make: Callable[[], Server]) -> None:
    """Serve until SIGTERM or SIGINT."""
    # Blocked before the first thread begins, so that it is this one that gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with make() as server:
        click.echo(f"listening on {server.address}")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})

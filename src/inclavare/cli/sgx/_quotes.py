"""What the commands for quotes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ...errors import PlatformError

_F = TypeVar("_F", bound=Callable[..., Any])

tee_option = click.option(
    "--tee",
    type=click.Choice(["sgx", "sgx-sim"]),
    default="sgx",
    show_default=True,
    help="The platform: hardware (AESM), or the simulated one.",
)


def _no_epid(_: click.Context, option: click.Parameter, value: str | None) -> None:
    if value not in (None, "ecdsa"):
        raise PlatformError(
            "EPID quotes are no longer of use",
            id="cli.sgx.epid",
            found=f"{option.opts[0]} {value}" if option.name == "quote_type" else option.opts[0],
            expected="--quote-type ecdsa",
            remedy="use ECDSA quotes (DCAP): Intel has switched off the service that verified EPID quotes (IAS)",
        )


def quote_type_option(function: _F) -> _F:
    """``--quote-type`` as sgx-tools has it; it and the options that belong to EPID say why EPID is refused."""
    for name in ("--spid", "--subscription-key"):
        function = click.option(name, hidden=True, callback=_no_epid, expose_value=False)(function)
    return click.option(
        "--quote-type",
        type=click.Choice(["ecdsa", "epidUnlinkable", "epidLinkable"], case_sensitive=False),
        default="ecdsa",
        show_default=True,
        callback=_no_epid,
        expose_value=False,
        help="As in sgx-tools; only ecdsa can still be verified by anybody.",
    )(function)


def platform(tee: str) -> Any:
    """The platform of ``--tee``.

    Raises:
        PlatformError: it cannot be used here; never another one instead.
    """
    from ...config import load
    from ...tee.base import usable_platform

    return usable_platform(tee, load())

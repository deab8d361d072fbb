"""``inclavare sgx selftest``: tries SGX step by step and prints a report."""

from __future__ import annotations

import click

from .._output import json_option, print_fields, print_json


@click.command("selftest")
@click.option("--tee", type=click.Choice(["sgx", "sgx-sim"]), default="sgx", show_default=True)
@json_option
def command(*, tee: str, as_json: bool) -> None:
    """Try SGX step by step: processor, kernel, an enclave's life, sealing, quotes.

    The report is fit for an issue: it has no secrets, no host name and no quote. Ends with 0 if nothing failed, else
    with 5. A step that this machine cannot do is skipped, and says why.
    """
    from dataclasses import asdict

    from ...config import load
    from ...errors import PlatformError
    from ...tee.sgx import create
    from ._steps import FAIL, PASS, Hardware, Step, Subject, describe, perform

    config = load()
    subject = Hardware(create(config)) if tee == "sgx" else Subject(config)
    about = {"tee": tee, **describe()}
    if not as_json:
        print_fields(about.items())
        click.echo()
    steps: list[Step] = []
    for step in perform(subject):
        steps.append(step)
        if not as_json:
            click.echo(f"  {step.status}  {step.name:<24} {step.milliseconds:>9.2f} ms  {step.detail}")
    failed = [step.name for step in steps if step.status == FAIL]
    passed = sum(step.status == PASS for step in steps)
    verdict = f"{passed} passed, {len(failed)} failed, {len(steps) - passed - len(failed)} skipped."
    if tee == "sgx" and any(step.name == "platform" and step.status == FAIL for step in steps):
        verdict += f" SGX hardware cannot be used on this machine: {subject.platform.probe().reason}."
    elif tee != "sgx":
        verdict += " This was the software platform, which proves nothing about hardware."
    if as_json:
        print_json({**about, "passed": not failed, "verdict": verdict, "steps": [asdict(step) for step in steps]})
    else:
        click.echo(f"\n{verdict}")
    if failed:
        click.get_current_context().exit(PlatformError.exit_code)

"""``inclavare secret``: keep secrets under a policy, and release them to enclaves that it accepts.

This is the relying party's side on one machine: a directory of its own user (mode 0700), a secret and the policy that
guards it in each file (mode 0600). A value comes from standard input or a file, never from the command line, and leaves
only encrypted to the key of an enclave whose evidence the policy accepts.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ._appraisals import challenge, load_policy, root_option
from ._output import json_option, note, print_json, print_table

#: Largest secret, bytes.
MAX_SECRET = 1 << 20

vault_option = click.option(
    "--vault",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where secrets are kept. [default: ~/.local/share/inclavare/vault]",
)


@click.group("secret")
def command() -> None:
    """Keep secrets under a policy, and release them to enclaves that it accepts."""


@command.command("put")
@click.argument("name")
@click.option("-p", "--policy", "policy_path", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              required=True, help="Which enclaves may have it.")  # fmt: skip
@root_option
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File with the value. [default: standard input]")  # fmt: skip
@vault_option
def put(*, name: str, policy_path: Path, root_path: Path | None, source: Path | None, vault: Path | None) -> None:
    """Keep a secret, under the policy that says which enclaves may have it. Replaces one of the same name."""
    from ..enclave.paths import write_atomically

    policy = load_policy(policy_path, root_path)
    if policy.any_enclave or not (policy.mrenclave or policy.mrsigner):
        raise UsageError(
            "the policy does not say which enclaves may have the secret",
            id="secret.policy.open",
            found='any_enclave = "allow"' if policy.any_enclave else "neither mrenclave nor mrsigner",
            expected="mrenclave or mrsigner",
            remedy="name the enclave (inclavare inspect IMAGE) or its signer in the policy",
        )
    value = source.read_bytes() if source is not None else _standard_input()
    if not 0 < len(value) <= MAX_SECRET:
        raise UsageError(
            "the secret is empty or too large",
            id="secret.value.size",
            found=f"{len(value)} bytes",
            expected=f"1 to {MAX_SECRET} bytes",
        )
    anchor = policy.trust_anchor
    record = {
        "value": base64.b64encode(value).decode(),
        "policy": policy_path.read_text(),
        "policy_directory": str(policy_path.parent.absolute()),
        "trust_anchor": None if anchor is None else base64.b64encode(anchor).decode(),
    }
    directory = _vault(vault)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(directory / f"{_checked(name)}.json", json.dumps(record).encode(), 0o600)


@command.command("get")
@click.argument("name")
@click.option("--container", required=True, help="The enclave container that asks for it: its id, or its beginning.")
@vault_option
@json_option
def get(*, name: str, container: str, vault: Path | None, as_json: bool) -> None:
    """Release a secret into an enclave container, if the secret's policy accepts its evidence.

    The container is challenged with a fresh nonce; its quote vouches for a key that it has drawn for this answer, and
    the secret is encrypted to that key. In the container it then is /dev/attestation/secrets/NAME. Exit codes as
    `verify`; the value is never printed.
    """
    from ..attestation import verify
    from ..attestation.channel import encrypt
    from ..runelet import client

    policy, value = _load(_vault(vault), name)
    directory, nonce, evidence = challenge(container)
    appraisal = verify(evidence, policy, nonce=nonce)
    appraisal.require()
    key = (evidence.runtime_data or {})["tee-pubkey"]
    client.call(directory, {"op": "release", "name": name, "tee_pubkey": key, "jwe": encrypt(key, value)})
    if as_json:
        print_json({"released": name, "container": directory.name, **appraisal.to_dict()})
    else:
        click.echo(f"released {name} to {directory.name[:12]}, MRENCLAVE {appraisal.claims.mrenclave}")


@command.command("list")
@vault_option
@json_option
def list_(*, vault: Path | None, as_json: bool) -> None:
    """Names of the kept secrets and the enclaves that may have them; never values."""
    directory = _vault(vault)
    rows = []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else []:
        policy, value = _load(directory, path.stem)
        rows.append(
            {"name": path.stem, "bytes": len(value), "mrenclave": policy.mrenclave, "mrsigner": policy.mrsigner}
        )
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("NAME", "BYTES", "MRENCLAVE", "MRSIGNER"),
            [[row["name"], row["bytes"], _short(row["mrenclave"]), _short(row["mrsigner"])] for row in rows],
        )


@command.command("delete")
@click.argument("name")
@vault_option
def delete(*, name: str, vault: Path | None) -> None:
    """Forget a secret. Enclaves that have it keep it."""
    path = _vault(vault) / f"{_checked(name)}.json"
    if not path.exists():
        raise _unknown(name)
    path.unlink()
    note(f"{name} is forgotten here; an enclave that has it keeps it until it ends")


def _short(values: Any) -> str:
    return ", ".join(f"{value[:16]}…" for value in values) or "-"


def _vault(path: Path | None) -> Path:
    if path is not None:
        return path
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local/share") / "inclavare" / "vault"


def _checked(name: str) -> str:
    from ..shield.attestfs import check_secret_name

    try:
        check_secret_name(name)
    except ValueError as error:
        raise UsageError(str(error), id="secret.name.malformed") from None
    return name


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        value: str = click.prompt("value", hide_input=True)
        return value.encode()
    return sys.stdin.buffer.read(MAX_SECRET + 1)


def _unknown(name: str) -> UsageError:
    return UsageError(
        f"there is no secret {name}", id="secret.name.unknown", remedy=f"inclavare secret put {name} --policy FILE"
    )


def _load(directory: Path, name: str) -> tuple[Any, bytes]:
    from ..attestation.policy import Policy

    path = directory / f"{_checked(name)}.json"
    try:
        record = json.loads(path.read_bytes())
        value = base64.b64decode(record["value"], validate=True)
        policy = Policy.parse(record["policy"], f"policy of {name}", directory=Path(record["policy_directory"]))
        if record["trust_anchor"] is not None:
            # As it was when the secret was put: a file that changes later must not widen who gets it.
            policy = policy.with_trust_anchor(base64.b64decode(record["trust_anchor"]))
    except FileNotFoundError:
        raise _unknown(name) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"the vault's file of {name} is damaged",
            id="secret.file.damaged",
            found=path,
            remedy="put the secret again",
        ) from None
    return policy, value

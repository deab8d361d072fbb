"""``inclavare verdictd init``: make what a service needs: configuration, certificate, master key, database, tenant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .._output import json_option, note, print_fields, print_json
from ._service import config_option, path_of

if TYPE_CHECKING:
    from ...verdict.config import VerdictConfig
    from ...verdict.store import Store


@click.command("init")
@config_option
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="For a configuration made now.")
@click.option("--listen", help="Address and port, for a configuration made now.")
@click.option("--tenant", default="default", show_default=True, help="The first tenant.")
@json_option
def command(
    *, config_path: Path | None, state_dir: Path | None, listen: str | None, tenant: str, as_json: bool
) -> None:
    """Make what is not there yet; what is there stays. Run again, it changes nothing.

    The certificate is self-made, unless the configuration names one: give clients the file, or compare its fingerprint.
    """
    from ... import serving
    from ...verdict.config import VerdictConfig
    from ...verdict.server import open_store
    from ...verdict.store import migrate
    from ...verdict.store.names import tenant as checked

    checked(tenant)
    path = path_of(config_path)
    if not path.exists():
        _write_config(path, state_dir, listen)
    elif state_dir is not None or listen is not None:
        raise click.UsageError(f"{path} is there already: --state-dir and --listen are for a new one.")
    config = VerdictConfig.load(path)
    config.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not config.tls.certificate:
        host, _ = config.address
        names = (*config.tls.names, *(() if host in ("0.0.0.0", "::") else (host,)))  # noqa: S104
        serving.own_certificate(config.directory, names, common_name="verdictd")
    make_master_key(config)
    schema = migrate(config.store_url())
    with open_store(config) as store:
        made = _make_tenant(store, config, tenant)
        token = _first_token(store, config)
    shown = {
        "config": str(path),
        "certificate": str(config.certificate),
        "fingerprint": serving.fingerprint(config.certificate),
        "schema": schema,
        "tenant": tenant,
        "new_tenant": made,
    }
    if token:
        shown["token"] = token
    if as_json:
        print_json(shown)
        return
    print_fields(shown.items(), title="verdictd is ready: inclavare verdictd serve")
    if token:
        note("this token is shown once; with it: inclavare verdict login URL --fingerprint …")


def _write_config(path: Path, state_dir: Path | None, listen: str | None) -> None:
    import json

    from ...verdict.config import VerdictConfig

    default = VerdictConfig()
    text = "".join(
        f"{name} = {json.dumps(str(value))}\n"
        for name, value in (
            ("listen", listen or default.listen),
            ("state_dir", state_dir.absolute() if state_dir else default.state_dir),
        )
    )
    VerdictConfig.parse(text, str(path))
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_text("# Every key: pydoc inclavare.verdict.config\n" + text)


def make_master_key(config: VerdictConfig) -> None:
    """The configured master key, if there is none yet."""
    from ...errors import UsageError
    from ...verdict.store import FileKey, SealedKey

    file = config.master_key_file
    if file.exists() or config.master_key.kind == "vault-transit":
        return
    if config.master_key.kind == "passphrase":
        raise UsageError(
            f"{file} is not there",
            id="verdict.init.passphrase",
            expected="a file with the passphrase, mode 0600",
            remedy=f"write it: it is asked for whenever the service starts; for example (umask 077; cat >{file})",
        )
    if config.master_key.kind == "sealed":
        SealedKey.create(file, policy=config.master_key.seal_policy)
    else:
        FileKey.create(file)


def _make_tenant(store: Store, config: VerdictConfig, tenant: str) -> bool:
    from ...verdict.store import Conflict, Quotas

    section = config.tenants
    quotas = Quotas(section.secrets, section.bytes, section.policies, section.requests)
    try:
        store.tenants.create(tenant, quotas=quotas)
    except Conflict:
        return False
    return True


def _first_token(store: Store, config: VerdictConfig) -> str | None:
    """A token for whoever sets the service up, of one day, if no token for every tenant was ever made here."""
    from ...verdict.auth import issue
    from ...verdict.store import SYSTEM

    lifetime = min(86400, int(config.auth.token_life))
    if store.tokens.list(SYSTEM) or store.audit.entries(SYSTEM, action="token.create", limit=1):
        return None
    store.audit.append(
        SYSTEM, "host", "token.create", "allowed", {"name": "init", "role": "admin", "lifetime": lifetime}
    )
    return issue(store, SYSTEM, "init", "admin", lifetime)[1]

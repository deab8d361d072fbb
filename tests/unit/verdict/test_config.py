"""The configuration file."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from inclavare.errors import UsageError
from inclavare.verdict import config as module
from inclavare.verdict.config import VerdictConfig


def test_defaults() -> None:
    config = VerdictConfig.parse("")
    assert config.address == ("127.0.0.1", 8443)
    assert config.base_url == "https://127.0.0.1:8443"
    assert config.tls.minimum == "1.3"
    assert config.store_url() == "sqlite:////var/lib/inclavare/verdictd/store.db"
    assert config.master_key_file == Path("/var/lib/inclavare/verdictd/master.key")
    assert config.tokens.lifetime == 300
    assert config.limits.evidence == 1 << 20


def test_documented_defaults_are_the_defaults() -> None:
    """The example in the docstring is valid, has every key, and changes nothing where it shows defaults."""
    lines = (module.__doc__ or "").partition("::\n")[2].splitlines()
    text = "\n".join(line[4:] for line in lines if line.startswith("    "))
    # Plugins are read by themselves, and have keys of their own.
    text = re.sub(r"\[\[plugins\]\].*?\n\[", "[", "\n".join(text.split("\n\n")), flags=re.DOTALL)
    # The example of an administrator's certificate needs an authority.
    documented = VerdictConfig.parse(text.replace('client_ca = ""', 'client_ca = "/ca.pem"'))
    documented = msgspec.structs.replace(documented, tls=msgspec.structs.replace(documented.tls, client_ca=""))
    default = VerdictConfig.parse("")
    for name in documented.__struct_fields__:
        if name in ("auth", "plugins"):
            continue
        assert getattr(documented, name) == getattr(default, name), name
        section = getattr(default, name)
        for key in getattr(section, "__struct_fields__", ()):
            assert re.search(rf"^{key} = |[{{ ]{key} = ", text, re.MULTILINE), f"{name}.{key}"
    assert documented.auth.token_life == default.auth.token_life
    assert documented.auth.oidc[0].role == "auditor"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("listn = 1", 1, "unknown key listn"),
        ("[tls]\n\nfoo = 1", 3, "unknown key tls.foo"),
        ("[master_key]\nvault = {urk = 'x'}", 2, "unknown key master_key.vault.urk"),
        ('listen = "localhost"', 1, "listen is wrong"),
        ('listen = ":443"', 1, "listen is wrong"),
        ('listen = "h:70000"', 1, "listen is wrong"),
        ('public_url = "http://x"', 1, "public_url is wrong"),
        ('public_url = "https://x/path"', 1, "public_url is wrong"),
        ("workers = 0", 1, "workers is wrong"),
        ("workers = true", 1, "workers is wrong"),
        ('state_dir = "relative"', 1, "state_dir is wrong"),
        ('[limits]\nbody = "64Q"', 2, "limits.body is wrong"),
        ('[tokens]\n# why\nlifetime = "0s"', 3, "tokens.lifetime is wrong"),
        ("[tokens]\nlifetime = 300", 2, "tokens.lifetime is wrong"),
        ('[tls]\ncertificate = "/c.pem"', 1, "tls is wrong"),
        ('[tls]\nminimum = "1.1"', 2, "tls.minimum is wrong"),
        ('[store]\nurl = "postgresql://me:secret@h/x"', 2, "store.url is wrong"),
        ('[store]\nurl = "sqlite:////a"\nurl_file = "/b"', 2, "store.url is wrong"),
        ('[master_key]\nkind = "vault-transit"', 1, "master_key.vault is wrong"),
        ('[collateral]\nsources = ["http://pccs"]', 2, "collateral.sources is wrong"),
        ('[telemetry]\notlp_endpoint = "http://far.example/v1/traces"', 2, "telemetry.otlp_endpoint is wrong"),
        ("[telemetry]\nsample = 2.0", 2, "telemetry.sample is wrong"),
        ('[[auth.certificates]]\nsubject="CN=a"\ntenant="t"\nrole="admin"', 1, "auth.certificates is wrong"),
        ('[secret_provisioning]\nlisten = "127.0.0.1:4433"', 1, "secret_provisioning.secret is wrong"),
        ("[[auth.oidc]]\nissuer = 'a'\n", 1, "auth.oidc[1].audience is wrong"),
    ],
)
def test_refusals_name_the_line(text: str, where: int, what: str) -> None:
    with pytest.raises(UsageError) as refused:
        VerdictConfig.parse(text, "v.toml")
    assert f"v.toml:{where}: {what}" in refused.value.message
    assert refused.value.id in ("verdict.config.key", "verdict.config.value")
    assert "secret" not in str(refused.value.found)


def test_second_item_of_an_array() -> None:
    rule = '[[auth.oidc]]\nissuer="i"\naudience="a"\nclaim="c"\nvalue="v"\ntenant="t"\nrole="{}"\n'
    with pytest.raises(UsageError, match=re.escape("v.toml:14: auth.oidc[2].role")):
        VerdictConfig.parse(rule.format("admin") + rule.format("boss"), "v.toml")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        VerdictConfig.load(tmp_path / "absent.toml")
    assert refused.value.id == "verdict.config.file"
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(UsageError) as refused:
        VerdictConfig.load(tmp_path / "broken.toml")
    assert refused.value.id == "verdict.config.syntax"


def test_database_url_with_a_password_is_in_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("postgresql://me:hunter2@/x\n")
    file.chmod(0o644)
    config = VerdictConfig.parse(f'[store]\nurl_file = "{file}"')
    with pytest.raises(UsageError) as refused:
        config.store_url()
    assert refused.value.id == "verdict.config.secret"
    file.chmod(0o600)
    assert config.store_url() == "postgresql://me:hunter2@/x"
    assert "hunter2" not in repr(config)

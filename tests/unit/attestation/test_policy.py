"""Policy files: everything has a safe default, and what is not understood is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from attested import Attested

from inclavare.attestation import Policy
from inclavare.errors import UsageError

FULL = """
mrenclave = ["{measurement}"]
mrsigner = ["{signer}"]
any_enclave = "allow"
isv_prod_id = 7
min_isv_svn = 2
debug = "allow"
simulated = "allow"
tcb = ["UpToDate", "SWHardeningNeeded"]
max_age = "12h"
"""


def test_defaults_deny() -> None:
    policy = Policy.parse("")
    assert policy == Policy()
    assert not (policy.allow_debug or policy.allow_simulated or policy.any_enclave)
    assert policy.tcb == ("UpToDate",) and policy.trust_anchor is None


def test_every_key() -> None:
    policy = Policy.parse(FULL.format(measurement="AB" * 32, signer="cd" * 32))
    assert policy == Policy(
        mrenclave=("ab" * 32,),
        mrsigner=("cd" * 32,),
        any_enclave=True,
        isv_prod_id=7,
        min_isv_svn=2,
        allow_debug=True,
        allow_simulated=True,
        tcb=("UpToDate", "SWHardeningNeeded"),
        max_age=43200,
    )


@pytest.mark.parametrize(
    ("text", "id", "mentions"),
    [
        ("mrenclav = []", "policy.key.unknown", "mrenclav"),
        ("[mrenclave]\na = 1", "policy.key.value", "mrenclave"),
        ('mrenclave = "' + "ab" * 32 + '"', "policy.key.value", "mrenclave"),
        ('mrenclave = ["abc"]', "policy.key.value", "mrenclave"),
        ("debug = true", "policy.key.value", "debug"),
        ('simulated = "yes"', "policy.key.value", "simulated"),
        ("isv_prod_id = 65536", "policy.key.value", "isv_prod_id"),
        ("min_isv_svn = -1", "policy.key.value", "min_isv_svn"),
        ("min_isv_svn = true", "policy.key.value", "min_isv_svn"),
        ("tcb = []", "policy.key.value", "tcb"),
        ('tcb = ["Revoked"]', "policy.key.value", "tcb"),
        ('max_age = "1 week"', "policy.key.value", "max_age"),
        ("max_age = -1", "policy.key.value", "max_age"),
        ("trust_anchor = 1", "policy.key.value", "trust_anchor"),
        ('trust_anchor = "/nowhere/root.pem"', "policy.trust_anchor.unreadable", "/nowhere/root.pem"),
        ('trust_anchor = "-----BEGIN CERTIFICATE-----"', "policy.trust_anchor.malformed", "trust anchor"),
        ("= 1", "policy.file.syntax", "line 1"),
    ],
)
def test_refused_by_name(text: str, id: str, mentions: str) -> None:
    with pytest.raises(UsageError) as caught:
        Policy.parse(text, "my-policy.toml")
    assert caught.value.id == id
    assert mentions in caught.value.message
    assert caught.value.exit_code == 2


def test_file_with_anchor_beside_it(tmp_path: Path, attested: Attested) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    root = attested.platform.root_ca()
    pem = x509.load_der_x509_certificate(root).public_bytes(Encoding.PEM)
    (tmp_path / "root.pem").write_bytes(pem)
    (tmp_path / "root.der").write_bytes(root)
    for name in ("root.pem", "root.der"):
        (tmp_path / "policy.toml").write_text(f'trust_anchor = "{name}"')
        assert Policy.load(tmp_path / "policy.toml").trust_anchor == root
    (tmp_path / "policy.toml").write_text(f'trust_anchor = """{pem.decode()}"""')
    assert Policy.load(tmp_path / "policy.toml").trust_anchor == root
    (tmp_path / "root.pem").write_bytes(pem + pem)
    (tmp_path / "policy.toml").write_text('trust_anchor = "root.pem"')
    with pytest.raises(UsageError):
        Policy.load(tmp_path / "policy.toml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Policy.load(tmp_path / "none.toml")
    assert caught.value.id == "policy.file.unreadable"

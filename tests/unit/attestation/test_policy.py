"""Policy files: everything has a safe default, and what is not understood is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from attested import Attested
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.attestation import Policy
from inclavare.attestation.claims import SnpTcb
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


TABLES = """
image = "registry.example/app"
reference_values = ["{bundle}", "other/image"]

[tdx]
mr_td = ["{long}"]
rtmr_1 = ["{long}", "{longer}"]
xfam = ["e702060000000000"]
migratable = "allow"

[snp]
measurement = ["{long}"]
host_data = ["{short}"]
min_tcb = {{bootloader = 4, tee = 0, snp = 24, microcode = 219, fmc = 1}}
min_guest_svn = 2
vmpl = [0, 1]
migrate_ma = "allow"
smt = "deny"
"""


def test_every_key_of_the_tables() -> None:
    text = TABLES.format(bundle="12" * 32, long="AA" * 48, longer="bb" * 48, short="cc" * 32)
    policy = Policy.parse(text)
    assert policy.named_references == ("registry.example/app", "12" * 32, "other/image")
    assert policy.accepted("tdx") == {
        "mr_td": ("aa" * 48,),
        "rtmr_1": ("aa" * 48, "bb" * 48),
        "xfam": ("e702060000000000",),
    }
    assert policy.tdx.allow_migratable
    assert policy.accepted("snp") == {"measurement": ("aa" * 48,), "host_data": ("cc" * 32,)}
    assert policy.snp.min_tcb == SnpTcb(4, 0, 24, 219, 1)
    assert (policy.snp.min_guest_svn, policy.snp.vmpl) == (2, (0, 1))
    assert policy.snp.allow_migrate_ma and not policy.snp.allow_smt
    assert policy.identities("tdx") == ("mr_td",) and policy.identities("snp") == ("measurement",)
    assert policy.identities("sgx") == ()


@pytest.mark.parametrize(
    ("text", "id", "mentions"),
    [
        ("image = 1", "policy.key.value", "image"),
        ('image = ""', "policy.key.value", "image"),
        ("reference_values = []", "policy.key.value", "reference_values"),
        ('reference_values = "x"', "policy.key.value", "reference_values"),
        ('tdx = "x"', "policy.key.value", "tdx"),
        ("[tdx]\nmrtd = []", "policy.key.unknown", "tdx.mrtd"),
        ("[tdx]\nmr_td = []", "policy.key.value", "tdx.mr_td"),
        (f'[tdx]\nmr_td = ["{"aa" * 32}"]', "policy.key.value", "tdx.mr_td"),
        (f'[tdx]\nrtmr_0 = "{"aa" * 48}"', "policy.key.value", "tdx.rtmr_0"),
        ("[tdx]\nmigratable = true", "policy.key.value", "tdx.migratable"),
        ("[snp]\nmeasurement = [1]", "policy.key.value", "snp.measurement"),
        ("[snp]\nmin_tcb = 4", "policy.key.value", "snp.min_tcb"),
        ("[snp]\nmin_tcb = {bootloader = 4}", "policy.key.value", "snp.min_tcb"),
        (
            "[snp]\nmin_tcb = {bootloader = 4, tee = 0, snp = 24, microcode = 256}",
            "policy.key.value",
            "snp.min_tcb",
        ),
        (
            "[snp]\nmin_tcb = {bootloader = 4, tee = 0, snp = 24, microcode = 1, uefi = 1}",
            "policy.key.value",
            "snp.min_tcb",
        ),
        ("[snp]\nvmpl = []", "policy.key.value", "snp.vmpl"),
        ("[snp]\nvmpl = [4]", "policy.key.value", "snp.vmpl"),
        ("[snp]\nmin_guest_svn = -1", "policy.key.value", "snp.min_guest_svn"),
        ("[snp]\nsmt = 1", "policy.key.value", "snp.smt"),
        ("[sev]\na = 1", "policy.key.unknown", "sev"),
    ],
)
def test_tables_are_refused_by_name(text: str, id: str, mentions: str) -> None:
    with pytest.raises(UsageError) as caught:
        Policy.parse(text, "my-policy.toml")
    assert caught.value.id == id and mentions in caught.value.message and "my-policy.toml" in caught.value.message
    assert caught.value.expected


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.sampled_from([FULL, TABLES]).flatmap(lambda text: st.permutations(text.split("\n")).map("\n".join))
)
def test_any_text_is_a_policy_or_refused(text: str) -> None:
    try:
        policy = Policy.parse(text)
    except UsageError as error:
        assert error.id.startswith("policy.")
    else:
        assert isinstance(policy, Policy)

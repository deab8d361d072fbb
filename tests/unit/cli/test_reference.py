"""``inclavare reference`` and ``build --reference-bundle`` as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inclavare.attestation.references import ReferenceBundle
from inclavare.attestation.signers import TrustedSigners
from inclavare.cli import main

MRENCLAVE, MRSIGNER = "ab" * 32, "cd" * 32


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return tmp_path / "config" / "inclavare"


def call(*arguments: str | Path, **more: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **more)


def good(*arguments: str | Path, **more: Any) -> Result:
    result = call(*arguments, **more)
    assert result.exit_code == 0, result.output
    return result


def refusal(*arguments: str | Path, code: int) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)["error"]
    return found


def create(path: Path, *more: str | Path) -> dict[str, Any]:
    good(
        *("reference", "create", "--name", "app:1", "--tee", "sgx", "--claim", f"mrenclave={MRENCLAVE}"),
        *("-o", path, *more),
    )
    found: dict[str, Any] = json.loads(good("reference", "show", path, "--json").stdout)
    return found


@pytest.fixture
def public(own_configuration: Path) -> Path:
    return own_configuration / "reference-key.pub.pem"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", root / "bin" / "true")
    return root


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "enclave.toml"
    path.write_text('[process]\nargs = ["/bin/true"]\n[enclave]\ntee = ["sgx", "sgx-sim"]\nisv_svn = 4\n')
    return path


class TestBuild:
    def test_signed_beside_the_image(self, tmp_path: Path, rootfs: Path, manifest: Path, public: Path) -> None:
        out, bundle = tmp_path / "out", tmp_path / "bundle.json"
        result = good("build", "-m", manifest, rootfs, out, "--reference-bundle", bundle, "--json")
        built = json.loads(result.stdout)
        assert "made a key for reference values" in result.stderr
        found = ReferenceBundle.parse(bundle.read_bytes(), TrustedSigners.from_pem(public.read_bytes()))
        assert found.to_dict()["references"] == [
            {
                "tee": ["sgx", "sgx-sim"],
                "claims": {
                    "mrenclave": built["mrenclave"],
                    "mrsigner": built["mrsigner"],
                    "isv_prod_id": 0,
                    "isv_svn": 4,
                },
            }
        ]
        assert built["reference_bundle"]["id"] == found.id
        assert found.build["treeRoot"] == built["tree_root"]
        assert found.build["manifestDigest"] == built["manifest_digest"]
        assert found.subjects[0].name == "out" and found.covers(f"inclavareTree:{built['tree_root']}")
        assert found.not_after - found.not_before == 365 * 86400
        assert public.with_name("reference-key.pem").stat().st_mode & 0o777 == 0o600

    def test_the_same_from_the_image_itself(self, tmp_path: Path, rootfs: Path, manifest: Path) -> None:
        out, first, second = tmp_path / "out", tmp_path / "1.json", tmp_path / "2.json"
        environment = {"SOURCE_DATE_EPOCH": "1800000000"}
        good("build", "-m", manifest, rootfs, out, "--reference-bundle", first, env=environment)
        good("reference", "create", out, "-o", second, env=environment)
        shown = [json.loads(good("reference", "show", path, "--json").stdout) for path in (first, second)]
        assert shown[0]["id"] == shown[1]["id"], "a build that can be repeated gives the same bundle"

    def test_names(self, tmp_path: Path, rootfs: Path, manifest: Path) -> None:
        out, bundle = tmp_path / "out", tmp_path / "bundle.json"
        names = ("--reference-bundle", bundle, "--reference-name", "registry.example/app:1")
        result = good("build", "-m", manifest, rootfs, out, *names)
        found = ReferenceBundle.read(json.loads(json.dumps(_payload(bundle))).encode())
        assert found.covers("registry.example/app") and found.id in result.stdout

    @pytest.mark.skipif(not shutil.which("skopeo") or not shutil.which("umoci"), reason="needs skopeo and umoci")
    def test_digest_of_an_image_in_a_layout(self, tmp_path: Path, rootfs: Path, manifest: Path) -> None:
        bundle = tmp_path / "bundle.json"
        good("build", "-m", manifest, rootfs, f"oci:{tmp_path / 'layout'}:v1", "--reference-bundle", bundle)
        index = json.loads((tmp_path / "layout" / "index.json").read_bytes())
        found = ReferenceBundle.read(_payload(bundle).encode())
        assert found.covers(index["manifests"][0]["digest"]) and found.subjects[0].name == "layout:v1"

    def test_options_that_need_the_bundle(self, tmp_path: Path, rootfs: Path) -> None:
        result = call("build", rootfs, tmp_path / "out", "--reference-name", "x")
        assert result.exit_code == 2 and "--reference-bundle" in result.output
        assert not (tmp_path / "out").exists()

    def test_a_bad_key_stops_before_anything_is_built(self, tmp_path: Path, rootfs: Path, manifest: Path) -> None:
        bad = tmp_path / "key.pem"
        bad.touch(mode=0o600)
        bundle = ("--reference-bundle", tmp_path / "b", "--reference-key", bad)
        error = refusal("build", "-m", manifest, rootfs, tmp_path / "out", *bundle, code=2)
        assert error["id"] == "reference.key" and not (tmp_path / "out").exists()


def _payload(path: Path) -> str:
    import base64

    return base64.b64decode(json.loads(path.read_bytes())["payload"]).decode()


class TestCreate:
    def test_of_claims(self, tmp_path: Path) -> None:
        found = create(
            *(tmp_path / "b.json", "--claim", "isv_svn=3", "--digest", f"sha256:{'12' * 32}"),
            *("--value", "minimum=[1, 2]", "--not-before", "2026-01-01T00:00:00Z", "--valid-for", "90d"),
        )
        assert found["references"] == [{"tee": ["sgx"], "claims": {"mrenclave": MRENCLAVE, "isv_svn": 3}}]
        assert found["subjects"] == [{"name": "app:1", "digest": {"sha256": "12" * 32}}]
        assert (found["not_before"], found["not_after"]) == ("2026-01-01T00:00:00Z", "2026-04-01T00:00:00Z")
        assert found["values"] == {"minimum": [1, 2]} and found["verified"] is False

    @pytest.mark.parametrize(
        ("document", "tee", "expected"),
        [
            (
                {"mrenclave": MRENCLAVE, "mrsigner": MRSIGNER, "isv_svn": 2, "paths": 3},
                "sgx",
                {"mrenclave": MRENCLAVE, "mrsigner": MRSIGNER, "isv_svn": 2},
            ),
            (
                {"accepted": True, "claims": {"mrenclave": MRENCLAVE, "config_id": "00" * 64, "debug": False}},
                "sgx-sim",
                {"mrenclave": MRENCLAVE},
            ),
            (
                {"claims": {"tee": "tdx", "tdx": {"mr_td": "01" * 48, "rtmr_3": "00" * 48, "septve_disable": True}}},
                "tdx",
                {"mr_td": "01" * 48},
            ),
        ],
    )
    def test_of_what_commands_print(
        self, tmp_path: Path, document: dict[str, Any], tee: str, expected: dict[str, Any]
    ) -> None:
        printed, bundle = tmp_path / "printed.json", tmp_path / "b.json"
        printed.write_text(json.dumps(document))
        good("reference", "create", "--name", "app", "--tee", tee, "--claims", printed, "-o", bundle)
        found = ReferenceBundle.read(_payload(bundle).encode())
        assert found.references[0].claims == expected and found.references[0].tees == (tee,)

    def test_to_standard_output(self) -> None:
        claim = f"mrenclave={MRENCLAVE}"
        result = good("reference", "create", "--name", "app", "--tee", "sgx", "--claim", claim, "--unsigned")
        assert ReferenceBundle.read(result.stdout.encode()).subjects[0].name == "app"

    @pytest.mark.parametrize(
        ("more", "code", "id"),
        [
            (["--claim", "mr_td=00"], 2, None),
            (["--claim", "mrenclave=00"], 7, "reference.malformed"),
            (["--claim", "nonsense"], 2, "reference.option"),
            (["--claim", "unknown=1"], 7, "reference.malformed"),
            (["--value", "a={"], 2, "reference.json"),
            (["--valid-for", "soon"], 2, "reference.validity"),
            (["--valid-for", "0d"], 2, "reference.validity"),
            (["--digest", "sha256"], 2, "reference.option"),
            (["--digest", "sha256:XY"], 7, "reference.malformed"),
        ],
    )
    def test_refused(self, tmp_path: Path, more: list[str], code: int, id: str | None) -> None:
        arguments = ["reference", "create", "--name", "app", "--tee", "sgx", "-o", str(tmp_path / "b"), *more]
        if "--claim" not in more:
            arguments += ["--claim", f"mrenclave={MRENCLAVE}"]
        if id is None:
            assert call(*arguments).exit_code in (2, 7)
        else:
            assert refusal(*arguments, code=code)["id"] == id
        assert not (tmp_path / "b").exists()

    def test_no_such_tee(self, tmp_path: Path) -> None:
        arguments = ("reference", "create", "--name", "app", "--tee", "sev", "--claim", f"mrenclave={MRENCLAVE}")
        assert refusal(*arguments, "-o", tmp_path / "b", code=2)["id"] == "reference.tee"

    @pytest.mark.parametrize(
        "arguments", [[], ["--name", "x"], ["--tee", "sgx", "--claim", "a=1"], [".", "--tee", "sgx"]]
    )
    def test_incomplete(self, arguments: list[str]) -> None:
        assert call("reference", "create", *arguments).exit_code == 2

    def test_no_enclave_image(self, rootfs: Path) -> None:
        assert call("reference", "create", rootfs, "--unsigned").exit_code == 2


class TestSign:
    def test_another_key_more(self, tmp_path: Path, public: Path) -> None:
        from inclavare.attestation.signers import KeySigner

        bundle, twice, key = tmp_path / "b.json", tmp_path / "2.json", tmp_path / "second.pem"
        create(bundle)
        second, _ = KeySigner.load_or_make(key)
        good("reference", "sign", bundle, "--key", key, "-o", twice)
        (tmp_path / "second.pub").write_bytes(second.public_pem())
        for trusted in (public, tmp_path / "second.pub"):
            good("reference", "verify", twice, "--trust", trusted)

    @pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
    @pytest.mark.parametrize("algorithm", ["EC", "ED25519"])
    def test_by_a_key_elsewhere(self, tmp_path: Path, algorithm: str) -> None:
        """OpenSSL stands for the machine that has the key: nothing but a message and a signature crosses."""
        statement, message, signature = tmp_path / "s.json", tmp_path / "tbs", tmp_path / "sig"
        key, pub = tmp_path / "key.pem", tmp_path / "pub.pem"
        options = ["-pkeyopt", "ec_paramgen_curve:P-256"] if algorithm == "EC" else []
        subprocess.run(["openssl", "genpkey", "-algorithm", algorithm, *options, "-out", key], check=True)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", pub], check=True)
        create_unsigned = ("--unsigned", "-o", statement)
        claims = ("--name", "app", "--tee", "sgx", "--claim", f"mrenclave={MRENCLAVE}")
        good("reference", "create", *claims, *create_unsigned)
        good("reference", "sign", statement, "--to-be-signed", "-o", message)
        how = ["dgst", "-sha256", "-sign", key, "-out", signature, message]
        if algorithm != "EC":
            how = ["pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", message, "-out", signature]
        subprocess.run(["openssl", *map(str, how)], check=True)
        signed = tmp_path / "signed.json"
        good("reference", "sign", statement, "--signature", signature, "--public-key", pub, "-o", signed)
        good("reference", "verify", signed, "--trust", pub)
        signature.write_bytes(signature.read_bytes()[:-1] + b"\0")
        wrong = call("reference", "sign", statement, "--signature", signature, "--public-key", pub)
        assert wrong.exit_code == 7 and "reference.signature" in wrong.output

    def test_options(self, tmp_path: Path) -> None:
        create(tmp_path / "b.json")
        assert call("reference", "sign", tmp_path / "b.json", "--signature", tmp_path / "b.json").exit_code == 2
        key = tmp_path / "config" / "inclavare" / "reference-key.pem"
        assert call("reference", "sign", tmp_path / "b.json", "--to-be-signed", "--key", key).exit_code == 2


class TestVerify:
    def test_verified(self, tmp_path: Path, public: Path) -> None:
        found = create(tmp_path / "b.json")
        result = good("reference", "verify", tmp_path / "b.json", "--trust", public)
        assert result.stdout.startswith("verified") and found["id"] in result.stdout
        shown = json.loads(good("reference", "verify", tmp_path / "b.json", "--trust", public, "--json").stdout)
        assert shown["id"] == found["id"] and len(shown["signers"]) == 1

    @pytest.mark.parametrize(
        ("at", "id"), [("2020-01-01T00:00:00Z", "reference.not_yet_valid"), ("4000000000", "reference.expired")]
    )
    def test_out_of_date(self, tmp_path: Path, public: Path, at: str, id: str) -> None:
        create(tmp_path / "b.json")
        arguments = ("reference", "verify", tmp_path / "b.json", "--trust", public, "--at", at)
        assert refusal(*arguments, code=7)["id"] == id

    def test_revoked(self, tmp_path: Path, public: Path) -> None:
        found = create(tmp_path / "b.json")
        good("reference", "revoke", found["id"], "--reason", "key leaked", "-o", tmp_path / "r.json")
        arguments = ("reference", "verify", tmp_path / "b.json", "--trust", public, "--revocation", tmp_path / "r.json")
        error = refusal(*arguments, code=7)
        assert error["id"] == "reference.revoked" and "key leaked" in error["found"]

    def test_a_revocation_by_somebody_else_is_no_revocation(self, tmp_path: Path, public: Path) -> None:
        from inclavare.attestation.signers import KeySigner

        found = create(tmp_path / "b.json")
        KeySigner.load_or_make(tmp_path / "other.pem")
        by_other = ("--reason", "mischief", "--key", tmp_path / "other.pem", "-o", tmp_path / "r.json")
        good("reference", "revoke", found["id"], *by_other)
        arguments = ("reference", "verify", tmp_path / "b.json", "--trust", public, "--revocation", tmp_path / "r.json")
        assert refusal(*arguments, code=7)["id"] == "reference.signer"

    def test_revoke_takes_ids(self) -> None:
        result = call("reference", "revoke", "app:1", "--reason", "x")
        assert result.exit_code == 2 and "reference.id" in result.output

    def test_nobody_is_trusted(self, tmp_path: Path) -> None:
        create(tmp_path / "b.json")
        assert call("reference", "verify", tmp_path / "b.json").exit_code == 2
        partly = call("reference", "verify", tmp_path / "b.json", "--sigstore-identity", "x")
        assert partly.exit_code == 2 and "belong together" in partly.output

    def test_damaged(self, tmp_path: Path, public: Path) -> None:
        create(tmp_path / "b.json")
        (tmp_path / "b.json").write_bytes((tmp_path / "b.json").read_bytes()[:-9])
        assert refusal("reference", "verify", tmp_path / "b.json", "--trust", public, code=7)["id"] == (
            "reference.malformed"
        )

    def test_show_says_that_nothing_was_verified(self, tmp_path: Path) -> None:
        create(tmp_path / "b.json")
        assert "no signature was verified" in good("reference", "show", tmp_path / "b.json").stderr

"""EAR tokens: what they say about an appraisal, who may have signed them, and that nothing else passes."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import made_claims
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwk as joserfc_jwk
from joserfc import jws, jwt

from inclavare.attestation import Policy, appraise
from inclavare.attestation.appraisal import Context
from inclavare.attestation.ear import (
    EVIDENCE,
    MAX_LIFETIME,
    MAX_TOKEN,
    PROFILE,
    EarIssuer,
    EarKey,
    EarVerifier,
    tee_public_key,
    thumbprint,
)
from inclavare.attestation.trust import CLAIMS, Tier, TrustVector, meaning, tier
from inclavare.errors import EvidenceError, UsageError

NOW = 1_800_000_000
KEY, NEXT, FOREIGN = EarKey.generate(), EarKey.generate(), EarKey.generate()
ISSUER = EarIssuer([KEY, NEXT])
VERIFIER = EarVerifier(ISSUER.jwks())
TEE_KEY = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": "AA", "y": "BB"}
GOOD = appraise(made_claims.sgx(), Policy(mrenclave=("aa" * 32,)))
BAD = appraise(made_claims.sgx(debug=True), Policy(mrenclave=("01" * 32,)))


def issue(**more: Any) -> str:
    arguments: dict[str, Any] = {"tee_pubkey": TEE_KEY, "policy_ids": ["default"], "now": NOW} | more
    return ISSUER.issue(arguments.pop("appraisal", GOOD), **arguments)


def forged(header: dict[str, Any], claims: dict[str, Any], key: EarKey = KEY) -> str:
    """Signed by another implementation, which asks no questions."""
    return jws.serialize_compact(
        {"alg": "ES256", **header}, json.dumps(claims).encode(), joserfc_jwk.ECKey.import_key(key.to_pem())
    )


def claims_of(token: str) -> dict[str, Any]:
    segment = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    return found


def cause(token: str, verifier: EarVerifier = VERIFIER, now: int = NOW) -> str:
    with pytest.raises(EvidenceError) as caught:
        verifier.verify(token, now=now)
    assert caught.value.exit_code == 4
    return caught.value.id.removeprefix("ear.token.")


class TestContent:
    def test_as_trustee_writes_it(self) -> None:
        claims = VERIFIER.verify(issue(context=Context({"nonce": "bm9uY2U=", "tee-pubkey": TEE_KEY})), now=NOW)
        assert claims["eat_profile"] == PROFILE == "tag:github.com,2024:confidential-containers/Trustee"
        assert claims["iss"] == "CoCo-Attestation-Service"
        assert (claims["iat"], claims["nbf"], claims["exp"]) == (NOW, NOW, NOW + 300)
        assert set(claims["ear.verifier-id"]) == {"build", "developer"}
        cpu = claims["submods"]["cpu0"]
        assert cpu["ear.status"] == "affirming" and cpu["ear.appraisal-policy-id"] == "default"
        assert cpu["ear.trustworthiness-vector"] == GOOD.trust.to_dict() and len(cpu["ear.trustworthiness-vector"]) == 8
        evidence = cpu[EVIDENCE]
        assert evidence["sgx"]["body"]["mr_enclave"] == "aa" * 32
        assert evidence["runtime_data_claims"] == {"nonce": "bm9uY2U=", "tee-pubkey": TEE_KEY}
        assert evidence["report_data"] == "dd" * 64 and evidence["init_data"] == "00" * 64
        assert tee_public_key(claims) == TEE_KEY

    def test_header(self) -> None:
        segment = issue().split(".")[0]
        header = json.loads(base64.urlsafe_b64decode(segment + "=="))
        assert header["alg"] == "ES256" and header["typ"] == "JWT" and header["kid"] == KEY.kid
        assert header["jwk"]["alg"] == "ES256", "Trustee takes the algorithm from the key"
        assert "x5c" not in header["jwk"]
        certified = KEY.self_signed()
        segment = EarIssuer([certified]).issue(GOOD, tee_pubkey=None, policy_ids=["p"]).split(".")[0]
        header = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
        assert [base64.b64decode(one) for one in header["jwk"]["x5c"]] == list(certified.chain)

    def test_refused_evidence_says_so(self) -> None:
        cpu = VERIFIER.verify(issue(appraisal=BAD), now=NOW)["submods"]["cpu0"]
        assert cpu["ear.status"] == "contraindicated"
        assert cpu["ear.veraison.policy-claims"]["accepted"] is False
        assert cpu["ear.veraison.policy-claims"]["failures"] == ["policy.debug", "policy.mrenclave"]

    def test_extensions_of_a_policy(self) -> None:
        from dataclasses import replace

        extension = {"name": "ear.trustee.identifiers", "key": -18, "value": {"validated": {}}}
        cpu = VERIFIER.verify(issue(appraisal=replace(GOOD, extensions=(extension,))), now=NOW)["submods"]["cpu0"]
        assert cpu["ear.trustee.identifiers"] == {"validated": {}}

    @pytest.mark.parametrize("make", [made_claims.sgx, made_claims.tdx, made_claims.snp])
    def test_every_tee(self, make: Any) -> None:
        result = appraise(make(), Policy(any_enclave=True, tcb=("UpToDate", "NotRated")))
        assert VERIFIER.verify(issue(appraisal=result), now=NOW)["submods"]["cpu0"]["ear.status"] == "warning"

    def test_without_a_key(self) -> None:
        assert tee_public_key(VERIFIER.verify(issue(tee_pubkey=None), now=NOW)) is None
        assert tee_public_key({}) is None and tee_public_key({"submods": 1}) is None

    def test_not_for_another_key(self) -> None:
        with pytest.raises(UsageError) as caught:
            issue(context=Context({"tee-pubkey": {**TEE_KEY, "x": "CC"}}))
        assert caught.value.id == "ear.tee_pubkey"

    @pytest.mark.parametrize(
        ("more", "id"),
        [
            ({"lifetime": 0}, "ear.lifetime"),
            ({"lifetime": MAX_LIFETIME + 1}, "ear.lifetime"),
            ({"policy_ids": []}, "ear.policy"),
        ],
    )
    def test_what_is_not_issued(self, more: dict[str, Any], id: str) -> None:
        with pytest.raises(UsageError) as caught:
            issue(**more)
        assert caught.value.id == id

    def test_each_token_is_one_of_its_own(self) -> None:
        assert claims_of(issue())["jti"] != claims_of(issue())["jti"]


class TestOthers:
    def test_joserfc_accepts_it(self) -> None:
        keys = joserfc_jwk.KeySet.import_key_set(ISSUER.jwks())  # type: ignore[arg-type]
        token = jwt.decode(issue(), keys, algorithms=["ES256"])
        assert token.claims["submods"]["cpu0"]["ear.status"] == "affirming"

    def test_what_joserfc_signs_is_accepted(self) -> None:
        assert VERIFIER.verify(forged({"kid": KEY.kid}, claims_of(issue())), now=NOW)["iss"]

    def test_thumbprint_of_rfc_7638(self) -> None:
        public = KEY.jwk
        assert thumbprint(public) == joserfc_jwk.ECKey.import_key(public).thumbprint() == KEY.kid

    def test_trustees_example_has_the_same_names(self) -> None:
        """Names in Trustee's documented token (attestation-service/docs/example.token.json)."""
        documented = {
            "header": "att_key_data_0 att_key_type pce_svn qe_svn user_data vendor_id version",
            "body": "attributes.flags attributes.xfrm config_id config_svn cpu_svn isv_ext_prod_id isv_family_id "
            "isv_prod_id isv_svn misc_select mr_enclave mr_signer report_data reserved1 reserved2 reserved3 reserved4",
        }
        evidence = claims_of(issue())["submods"]["cpu0"][EVIDENCE]
        assert {"init_data", "init_data_claims", "report_data", "runtime_data_claims", "sgx"} == set(evidence)
        for part, names in documented.items():
            assert set(evidence["sgx"][part]) == set(names.split())


class TestRotation:
    def test_overlap(self) -> None:
        old, new = EarIssuer([KEY]), EarIssuer([NEXT, KEY])
        before, after = (one.issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW) for one in (old, new))
        verifier = EarVerifier(new.jwks())
        assert [key["kid"] for key in new.jwks()["keys"]] == [NEXT.kid, KEY.kid]
        assert verifier.verify(before, now=NOW) and verifier.verify(after, now=NOW)
        assert VERIFIER.verify(after, now=NOW), "published before it was used"
        assert cause(after, EarVerifier(old.jwks())) == "key"
        assert cause(before, EarVerifier(EarIssuer([NEXT]).jwks())) == "key"

    def test_public_keys_only(self) -> None:
        assert all("d" not in key for key in ISSUER.jwks()["keys"])

    def test_keys_of_other_kinds_are_left_aside(self) -> None:
        others = [{"kty": "RSA", "kid": "a"}, {"kty": "EC", "crv": "P-384"}, {**KEY.jwk, "alg": "ES512"}]
        assert cause(issue(), EarVerifier({"keys": others})) == "key"
        anonymous = {name: KEY.jwk[name] for name in ("kty", "crv", "x", "y")}
        assert EarVerifier({"keys": [*others, anonymous]}).verify(issue(), now=NOW)


class TestRefusals:
    def test_foreign_key(self) -> None:
        token = EarIssuer([FOREIGN]).issue(GOOD, tee_pubkey=TEE_KEY, policy_ids=["default"], now=NOW)
        assert cause(token) == "key"
        assert cause(token, EarVerifier()) == "key"
        assert cause(forged({"kid": KEY.kid}, claims_of(token), FOREIGN)) == "signature"
        assert cause(forged({"kid": KEY.kid, "jwk": FOREIGN.jwk}, claims_of(token), FOREIGN)) == "key"
        assert cause(forged({}, claims_of(token))) == "key"

    @pytest.mark.parametrize("algorithm", ["none", "None", "HS256", "ES384", "RS256", "EdDSA", "", None, 7])
    def test_algorithms(self, algorithm: Any) -> None:
        _, payload, signature = issue().split(".")
        header = base64.urlsafe_b64encode(json.dumps({"alg": algorithm, "kid": KEY.kid}).encode()).rstrip(b"=").decode()
        for ending in (signature, ""):
            assert cause(f"{header}.{payload}.{ending}") == "algorithm"

    def test_a_public_key_as_an_hmac_secret(self) -> None:
        import hashlib
        import hmac

        header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "jwk": KEY.jwk}).encode()).rstrip(b"=").decode()
        message = f"{header}.{issue().split('.')[1]}"
        public = KEY.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        secret = hmac.new(public, message.encode(), hashlib.sha256)
        assert cause(f"{message}.{base64.urlsafe_b64encode(secret.digest()).rstrip(b'=').decode()}") == "algorithm"

    @pytest.mark.parametrize(
        ("now", "good"), [(NOW - 60, True), (NOW - 61, False), (NOW + 359, True), (NOW + 360, False)]
    )
    def test_skew_at_both_ends(self, now: int, good: bool) -> None:
        if good:
            assert VERIFIER.verify(issue(), now=now)
        else:
            assert cause(issue(), now=now) == ("not_yet_valid" if now < NOW else "expired")

    @pytest.mark.parametrize(
        ("change", "id"),
        [
            ({"exp": None}, "malformed"),
            ({"exp": "1900000000"}, "malformed"),
            ({"exp": 1.9e9}, "malformed"),
            ({"exp": True}, "malformed"),
            ({"iat": None}, "malformed"),
            ({"nbf": NOW + 100}, "not_yet_valid"),
            ({"nbf": "soon"}, "malformed"),
            ({"exp": NOW + MAX_LIFETIME + 1}, "lifetime"),
            ({"iat": NOW + 10, "exp": NOW + 5}, "lifetime"),
            ({"eat_profile": "tag:github.com,2023:veraison/ear"}, "profile"),
            ({"eat_profile": None}, "profile"),
            ({"submods": {}}, "malformed"),
            ({"submods": None}, "malformed"),
            ({"submods": {"cpu0": {}}}, "malformed"),
            ({"submods": {"cpu0": {"ear.status": "fine"}}}, "malformed"),
            ({"submods": {"cpu0": {"ear.status": 2}}}, "malformed"),
            ({"submods": {"cpu0": {"ear.status": "affirming", "ear.trustworthiness-vector": {"x": 2}}}}, "malformed"),
            ({"submods": {"cpu0": {"ear.status": "affirming", "ear.trustworthiness-vector": []}}}, "malformed"),
            (
                {"submods": {"cpu0": {"ear.status": "warning", "ear.trustworthiness-vector": {"hardware": 96}}}},
                "status",
            ),
            ({"submods": {"cpu0": {"ear.status": "none", "ear.trustworthiness-vector": {"hardware": 2}}}}, "status"),
        ],
    )
    def test_signed_but_wrong(self, change: dict[str, Any], id: str) -> None:
        claims = {name: value for name, value in {**claims_of(issue()), **change}.items() if value is not None}
        assert cause(forged({"kid": KEY.kid}, claims)) == id

    def test_issuer(self) -> None:
        assert cause(issue(), EarVerifier(ISSUER.jwks(), issuers=["other"])) == "issuer"
        assert EarVerifier(ISSUER.jwks(), issuers=["CoCo-Attestation-Service"]).verify(issue(), now=NOW)

    @pytest.mark.parametrize(
        "header", [{"typ": "JOSE"}, {"crit": ["exp"], "exp": 1}, {"jwk": 7}, {"jwk": {"kty": "EC", "crv": "P-256"}}]
    )
    def test_headers(self, header: dict[str, Any]) -> None:
        segment = base64.urlsafe_b64encode(json.dumps({"alg": "ES256", "kid": KEY.kid, **header}).encode())
        _, payload, signature = issue().split(".")
        assert cause(f"{segment.rstrip(b'=').decode()}.{payload}.{signature}") == "malformed"

    @pytest.mark.parametrize("curve", ["P-384", "secp256k1"])
    def test_keys_of_other_curves_in_headers(self, curve: str) -> None:
        _, payload, signature = issue().split(".")
        header = {"alg": "ES256", "jwk": {**KEY.jwk, "crv": curve}}
        segment = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
        assert cause(f"{segment}.{payload}.{signature}") == "algorithm"

    def test_a_key_that_is_no_point(self) -> None:
        _, payload, signature = issue().split(".")
        header = {"alg": "ES256", "jwk": {**KEY.jwk, "x": KEY.jwk["y"]}}
        segment = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
        assert cause(f"{segment}.{payload}.{signature}") == "malformed"

    @pytest.mark.parametrize(
        "token", ["", ".", "..", "a.b", "a.b.c.d", "e30.e30.", "ä.b.c", "e30=.e30.AA", " e30.e30.AA"]
    )
    def test_no_token(self, token: str) -> None:
        assert cause(token) in ("malformed", "algorithm")

    def test_size(self) -> None:
        assert cause("a" * (MAX_TOKEN + 1)) == "malformed"

    def test_names_twice(self) -> None:
        _, payload, signature = issue().split(".")
        segment = base64.urlsafe_b64encode(b'{"alg":"none","alg":"ES256"}').rstrip(b"=").decode()
        assert cause(f"{segment}.{payload}.{signature}") == "malformed"

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_no_damaged_character_passes(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(FIXED) - 1))
        other = data.draw(st.characters(min_codepoint=0x20, max_codepoint=0x7E).filter(lambda c: c != FIXED[position]))
        with pytest.raises(EvidenceError):
            VERIFIER.verify(FIXED[:position] + other + FIXED[position + 1 :], now=NOW)

    @settings(max_examples=200, deadline=None)
    @given(
        st.text(max_size=300) | st.binary(max_size=200).map(lambda b: base64.urlsafe_b64encode(b).decode() + ".e30.AA")
    )
    def test_any_text(self, token: str) -> None:
        with pytest.raises(EvidenceError):
            VERIFIER.verify(token, now=NOW)

    def test_signatures_are_not_malleable_by_length(self) -> None:
        head, _, signature = FIXED.rpartition(".")
        for ending in (signature + "AA", signature[:-4], signature + "=="):
            assert cause(f"{head}.{ending}") in ("signature", "malformed")


#: ECDSA signatures differ from one to the next.
FIXED = issue()


class TestChains:
    """Tokens of verifiers whose keys are vouched for by certificates, as CoCo's are."""

    ROOT = ec.generate_private_key(ec.SECP256R1())

    @staticmethod
    def certificate(
        name: str,
        key: Any,
        issuer: str,
        issuer_key: Any,
        *,
        ca: bool,
        start: int = NOW - 100,
        end: int = NOW + 1000,
    ) -> bytes:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        return (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.fromtimestamp(start, UTC))
            .not_valid_after(datetime.fromtimestamp(end, UTC))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(issuer_key, SHA256())
            .public_bytes(Encoding.DER)
        )

    def test_root_in_the_chain_or_not(self) -> None:
        root = self.certificate("root", self.ROOT, "root", self.ROOT, ca=True)
        leaf = self.certificate("leaf", KEY.private, "root", self.ROOT, ca=False)
        for chain in ((leaf,), (leaf, root)):
            token = EarIssuer([EarKey(KEY.private, chain)]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW)
            assert EarVerifier(anchors=[root]).verify(token, now=NOW)

    def test_intermediate(self) -> None:
        between = ec.generate_private_key(ec.SECP256R1())
        root = self.certificate("root", self.ROOT, "root", self.ROOT, ca=True)
        middle = self.certificate("middle", between, "root", self.ROOT, ca=True)
        leaf = self.certificate("leaf", KEY.private, "middle", between, ca=False)
        token = EarIssuer([EarKey(KEY.private, (leaf, middle))]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW)
        assert EarVerifier(anchors=[root]).verify(token, now=NOW)
        short = EarIssuer([EarKey(KEY.private, (leaf,))]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW)
        assert cause(short, EarVerifier(anchors=[root])) == "key"

    def test_self_signed_and_trusted_as_it_stands(self) -> None:
        made = KEY.self_signed()
        now = int(datetime.now(UTC).timestamp())
        token = EarIssuer([made]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=now)
        assert EarVerifier(anchors=made.chain).verify(token, now=now)
        assert cause(token, EarVerifier(anchors=FOREIGN.self_signed().chain), now) == "key"

    def test_refused(self) -> None:
        root = self.certificate("root", self.ROOT, "root", self.ROOT, ca=True)
        stranger = ec.generate_private_key(ec.SECP256R1())
        chains = {
            "another root": (self.certificate("leaf", KEY.private, "root", stranger, ca=False),),
            "another key": (self.certificate("leaf", stranger, "root", self.ROOT, ca=False),),
            "expired": (self.certificate("leaf", KEY.private, "root", self.ROOT, ca=False, end=NOW - 1),),
            "not yet": (self.certificate("leaf", KEY.private, "root", self.ROOT, ca=False, start=NOW + 1),),
            "no authority": (
                self.certificate("leaf", KEY.private, "middle", stranger, ca=False),
                self.certificate("middle", stranger, "root", self.ROOT, ca=False),
            ),
            "empty": (),
            "nonsense": (b"certificate",),
            "too long": (self.certificate("leaf", KEY.private, "root", self.ROOT, ca=False),) * 6,
        }
        for what, chain in chains.items():
            token = EarIssuer([EarKey(KEY.private, chain)]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW)
            assert cause(token, EarVerifier(anchors=[root])) == "key", what

    def test_an_expired_anchor(self) -> None:
        root = self.certificate("root", self.ROOT, "root", self.ROOT, ca=True, end=NOW - 1)
        leaf = self.certificate("leaf", KEY.private, "root", self.ROOT, ca=False)
        token = EarIssuer([EarKey(KEY.private, (leaf,))]).issue(GOOD, tee_pubkey=None, policy_ids=["p"], now=NOW)
        assert cause(token, EarVerifier(anchors=[root])) == "key"


class TestKeys:
    def test_round_trip(self) -> None:
        made = KEY.self_signed()
        chain = b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in made.chain)
        again = EarKey.from_pem(made.to_pem(), chain)
        assert again.kid == KEY.kid and again.chain == made.chain
        assert EarKey.from_pem(KEY.to_pem()).chain == ()
        certificate = x509.load_der_x509_certificate(made.chain[0])
        assert certificate.not_valid_before_utc <= datetime.now(UTC) - timedelta(minutes=4)

    @pytest.mark.parametrize("pem", [b"", b"nonsense", "p384", "ed25519"])
    def test_unusable(self, pem: bytes | str) -> None:
        if isinstance(pem, str):
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

            key = ec.generate_private_key(ec.SECP384R1()) if pem == "p384" else Ed25519PrivateKey.generate()
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(UsageError) as caught:
            EarKey.from_pem(pem)
        assert caught.value.id == "ear.key"

    def test_a_chain_of_another_key(self) -> None:
        chain = x509.load_der_x509_certificate(FOREIGN.self_signed().chain[0]).public_bytes(Encoding.PEM)
        with pytest.raises(UsageError) as caught:
            EarKey.from_pem(KEY.to_pem(), chain)
        assert caught.value.id == "ear.key"

    def test_no_key(self) -> None:
        with pytest.raises(UsageError):
            EarIssuer([])


class TestVector:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (-128, Tier.CONTRAINDICATED),
            (-97, Tier.CONTRAINDICATED),
            (-96, Tier.WARNING),
            (-33, Tier.WARNING),
            (-32, Tier.AFFIRMING),
            (-2, Tier.AFFIRMING),
            (-1, Tier.NONE),
            (0, Tier.NONE),
            (1, Tier.NONE),
            (2, Tier.AFFIRMING),
            (31, Tier.AFFIRMING),
            (32, Tier.WARNING),
            (95, Tier.WARNING),
            (96, Tier.CONTRAINDICATED),
            (127, Tier.CONTRAINDICATED),
        ],
    )
    def test_tiers_of_ar4si(self, value: int, expected: Tier) -> None:
        assert tier(value) is expected

    @given(st.dictionaries(st.sampled_from(CLAIMS), st.integers(-128, 127)))
    def test_round_trip(self, values: dict[str, int]) -> None:
        vector = TrustVector.from_dict(values)
        assert TrustVector.from_dict(vector.to_dict()) == vector
        assert vector.tier == max((tier(value) for value in values.values()), default=Tier.NONE)
        assert all(str(value) in meaning(name, value) for name, value in values.items())

    def test_only_worse(self) -> None:
        vector = TrustVector(hardware=96)
        assert vector.worse(hardware=32) == vector
        assert vector.worse(hardware=97).hardware == 97 and vector.worse(executables=33).executables == 33

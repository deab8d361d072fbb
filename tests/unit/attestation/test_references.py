"""Signed reference values: the envelope, who may sign it, what it may say, and what it says about claims."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_claims
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from made_claims import NOW

from inclavare.attestation import Failure, Policy, appraise
from inclavare.attestation.references import (
    MAX_BUNDLE,
    PAYLOAD_TYPE,
    REFERENCE_TYPE,
    ReferenceBundle,
    References,
    ReferenceValue,
    Subject,
    attach,
    envelope_payload,
    pae,
    revocation,
    revoked,
    sign,
    statement,
)
from inclavare.attestation.signers import KeySigner, TrustedSigners, load_public_key
from inclavare.errors import IntegrityError, UsageError

SIGNER = KeySigner(ec.generate_private_key(ec.SECP256R1()))
OTHER = KeySigner(ed25519.Ed25519PrivateKey.generate())
TRUSTED = TrustedSigners([SIGNER.key.public_key()])
SUBJECT = Subject("registry.example/app:1.2", (("sha256", "12" * 32),))
CLAIMS: dict[str, str | int] = {"mrenclave": "aa" * 32, "mrsigner": "bb" * 32, "isv_prod_id": 7, "isv_svn": 3}


def payload(
    claims: dict[str, str | int] = CLAIMS,
    *,
    tees: tuple[str, ...] = ("sgx",),
    start: int = 1000,
    end: int = 3000,
    subject: Subject = SUBJECT,
    values: dict[str, Any] | None = None,
    build: dict[str, Any] | None = None,
) -> bytes:
    return statement([subject], [(tees, claims)], not_before=start, not_after=end, values=values, build=build)


#: Signatures differ in length from one to the next.
WHOLE = sign(payload(), SIGNER)


def bundle(claims: dict[str, str | int] = CLAIMS, **more: Any) -> ReferenceBundle:
    return ReferenceBundle.parse(sign(payload(claims, **more), SIGNER), TRUSTED)


def cause(data: bytes, trusted: TrustedSigners = TRUSTED) -> str:
    with pytest.raises(IntegrityError) as caught:
        ReferenceBundle.parse(data, trusted)
    return caught.value.id


def matched(found: ReferenceValue | tuple[Failure, ...]) -> list[str]:
    assert isinstance(found, tuple)
    assert all(failure.found and failure.expected and failure.remedy for failure in found)
    return [failure.id for failure in found]


class TestEnvelope:
    def test_pre_authentication_encoding_of_the_specification(self) -> None:
        assert pae(b"hello world", "http://example.com/HelloWorld") == (
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        )

    @pytest.mark.parametrize("signer", [SIGNER, OTHER], ids=["p256", "ed25519"])
    def test_round_trip(self, signer: KeySigner) -> None:
        found = ReferenceBundle.parse(
            sign(payload(build={"treeRoot": "ab" * 32}), signer), TrustedSigners.from_pem(signer.public_pem())
        )
        assert found.subjects == (SUBJECT,) and found.signers == (signer.key_id,)
        assert found.references[0].claims == CLAIMS and found.references[0].tees == ("sgx",)
        assert (found.not_before, found.not_after) == (1000, 3000)
        assert found.references[0].tree_root == "ab" * 32
        assert ReferenceBundle.read(envelope_payload(found.envelope)).id == found.id

    @pytest.mark.parametrize("signer", [SIGNER, OTHER], ids=["p256", "ed25519"])
    def test_securesystemslib_reads_it(self, signer: KeySigner) -> None:
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import SSlibKey

        envelope = Envelope.from_dict(json.loads(sign(payload(), signer)))
        public = signer.key.public_key()
        key = SSlibKey.from_crypto(public, keyid=signer.key_id)
        assert list(envelope.verify([key], 1)) == [signer.key_id]
        assert envelope.payload == payload()

    def test_what_securesystemslib_signs_is_read(self) -> None:
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner

        key = ed25519.Ed25519PrivateKey.generate()
        envelope = Envelope(payload(), PAYLOAD_TYPE, {})
        envelope.sign(CryptoSigner(key))
        document = envelope.to_dict()
        for signature in document["signatures"]:
            signature.pop("keyid")
        trusted = TrustedSigners([key.public_key()])
        assert ReferenceBundle.parse(json.dumps(document).encode(), trusted).subjects == (SUBJECT,)

    def test_two_signatures(self) -> None:
        twice = sign(sign(payload(), SIGNER), OTHER)
        both = TrustedSigners([SIGNER.key.public_key(), OTHER.key.public_key()])
        assert ReferenceBundle.parse(twice, both).signers == (SIGNER.key_id, OTHER.key_id)
        assert ReferenceBundle.parse(twice, TRUSTED).signers == (SIGNER.key_id,)
        assert len(json.loads(sign(twice, OTHER))["signatures"]) == 2

    def test_nobody_trusted(self) -> None:
        assert cause(sign(payload(), OTHER)) == "reference.signer"
        assert cause(sign(payload(), SIGNER), TrustedSigners()) == "reference.signer"

    def test_forged(self) -> None:
        assert cause(attach(payload(), SIGNER.key_id, OTHER.sign(pae(payload())))) == "reference.signature"
        document = json.loads(sign(payload(), SIGNER))
        document["payload"] = base64.b64encode(payload(end=3001)).decode()
        assert cause(json.dumps(document).encode()) == "reference.signature"

    def test_a_signature_is_over_the_payload_type(self) -> None:
        document = json.loads(sign(payload(), SIGNER))
        assert cause(json.dumps({**document, "payloadType": "text/plain"}).encode()) == "reference.signature"
        signed = SIGNER.sign(pae(payload(), "text/plain"))
        other = json.loads(attach(payload(), SIGNER.key_id, signed)) | {"payloadType": "text/plain"}
        assert cause(json.dumps(other).encode()) == "reference.malformed"

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"[]",
            b"null",
            b"{}",
            b"\xff",
            b'{"payload": "", "payload": ""}',
            b"[" * 100_000,
            b'{"payload": NaN, "payloadType": "", "signatures": []}',
            b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
            b'{"payload": "%", "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": ""}]}',
            b'{"payload": "e30=", "payloadType": 7, "signatures": [{"sig": ""}]}',
            b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [{}]}',
            b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": 7}',
            b" " * (MAX_BUNDLE + 1),
        ],
    )
    def test_malformed(self, data: bytes) -> None:
        assert cause(data) == "reference.malformed"

    def test_too_many_signatures(self) -> None:
        document = json.loads(sign(payload(), SIGNER))
        document["signatures"] *= 17
        assert cause(json.dumps(document).encode()) == "reference.malformed"

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_no_damaged_byte_passes(self, data: st.DataObject) -> None:
        whole = WHOLE
        position = data.draw(st.integers(0, len(whole) - 1))
        damaged = bytearray(whole)
        damaged[position] ^= data.draw(st.integers(1, 255))
        try:
            found = ReferenceBundle.parse(bytes(damaged), TRUSTED)
        except IntegrityError as error:
            assert error.id in ("reference.malformed", "reference.signature", "reference.signer")
        else:  # white space around the JSON, a key id's absence
            assert found.id == bundle().id

    @settings(max_examples=200, deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
            max_leaves=12,
        ),
        st.sampled_from(["_type", "subject", "predicateType", "predicate"]),
    )
    def test_any_statement_is_read_or_refused(self, value: Any, key: str) -> None:
        document = json.loads(payload())
        document[key] = value
        with pytest.raises(IntegrityError):
            ReferenceBundle.read(json.dumps(document).encode())


class TestStatement:
    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("_type",), "https://in-toto.io/Statement/v0.1"),
            (("predicateType",), "https://slsa.dev/provenance/v1"),
            (("subject",), []),
            (("subject", 0, "name"), ""),
            (("subject", 0, "digest"), {}),
            (("subject", 0, "digest", "sha256"), "XY"),
            (("subject", 0, "more"), 1),
            (("predicate", "more"), 1),
            (("predicate", "notAfter"), "1970-01-01T00:16:40Z"),
            (("predicate", "notBefore"), "1970-01-01"),
            (("predicate", "notBefore"), 1000),
            (("predicate", "references"), []),
            (("predicate", "references", 0, "tee"), []),
            (("predicate", "references", 0, "tee"), ["sev"]),
            (("predicate", "references", 0, "tee"), ["sgx", "tdx"]),
            (("predicate", "references", 0, "claims"), {}),
            (("predicate", "references", 0, "claims"), {"isv_svn": 1}),
            (("predicate", "references", 0, "claims", "mrenclave"), "aa"),
            (("predicate", "references", 0, "claims", "isv_svn"), 65536),
            (("predicate", "references", 0, "claims", "isv_svn"), True),
            (("predicate", "references", 0, "claims", "mr_td"), "aa" * 48),
            (("predicate", "values"), []),
            (("predicate", "build"), {"treeRoot": "ab"}),
        ],
    )
    def test_refused(self, path: tuple[Any, ...], value: Any) -> None:
        document = json.loads(payload())
        place = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(IntegrityError) as caught:
            ReferenceBundle.read(rfc8785.dumps(document))
        assert caught.value.id == "reference.malformed" and caught.value.remedy

    def test_of_every_family(self) -> None:
        for tees, claims in (
            (("tdx", "tdx-sim"), {"mr_td": "A1" * 48, "rtmr_1": "b1" * 48}),
            (("snp",), {"measurement": "c1" * 48, "guest_svn": 2}),
        ):
            found = bundle(claims, tees=tees)
            assert found.references[0].tees == tees
        assert bundle({"mr_td": "A1" * 48}, tees=("tdx",)).references[0].claims["mr_td"] == "a1" * 48

    def test_the_writer_refuses_what_the_reader_would(self) -> None:
        with pytest.raises(IntegrityError):
            payload({"isv_svn": 1})
        with pytest.raises(IntegrityError):
            payload(end=1000)
        with pytest.raises(IntegrityError):
            payload(values={"a": float("nan")})
        with pytest.raises(UsageError):
            payload(end=1 << 60)

    def test_to_dict_is_json(self) -> None:
        document = json.loads(json.dumps(bundle(values={"k": [1]}).to_dict()))
        assert document["not_after"] == "1970-01-01T00:50:00Z" and document["values"] == {"k": [1]}


class TestSubjects:
    @pytest.mark.parametrize(
        ("wanted", "covered"),
        [
            ("registry.example/app:1.2", True),
            ("registry.example/app", True),
            ("registry.example/app:1.3", False),
            ("registry.example/ap", False),
            ("app", False),
            ("sha256:" + "12" * 32, True),
            ("sha256:" + "13" * 32, False),
            ("registry.example/app@sha256:" + "12" * 32, True),
            ("registry.example/app@sha256:" + "13" * 32, False),
            ("registry.example/other@sha256:" + "12" * 32, False),
            ("", False),
        ],
    )
    def test_covers(self, wanted: str, covered: bool) -> None:
        assert SUBJECT.covers(wanted) is covered
        assert bundle().covers(wanted) is covered

    def test_a_port_is_no_tag(self) -> None:
        subject = Subject("registry.example:5000/app", SUBJECT.digests)
        assert subject.covers("registry.example:5000/app") and not subject.covers("registry.example")


class TestMatching:
    @pytest.mark.parametrize("tee", ["sgx", "tdx", "snp"])
    def test_accepted(self, tee: str) -> None:
        claims = {"sgx": made_claims.sgx, "tdx": made_claims.tdx, "snp": made_claims.snp}[tee]()
        values: dict[str, dict[str, str | int]] = {
            "sgx": CLAIMS,
            "tdx": {"mr_td": "a1" * 48, "rtmr_2": "b2" * 48},
            "snp": {"measurement": "c1" * 48, "guest_svn": 1},
        }
        made = bundle(values[tee], tees=(tee,))
        found = References([made]).match(claims, ("registry.example/app",))
        assert isinstance(found, ReferenceValue) and found.bundle == made.id
        assert References([made]).match(claims, (made.id,)) == found

    def test_a_greater_security_version_is_accepted(self) -> None:
        assert isinstance(References([bundle()]).match(made_claims.sgx(isv_svn=9), (SUBJECT.name,)), ReferenceValue)

    @pytest.mark.parametrize(
        ("fields", "ids"),
        [
            ({"mrenclave": "ab" * 32}, ["policy.reference.mrenclave"]),
            ({"mrsigner": "bc" * 32}, ["policy.reference.mrsigner"]),
            ({"isv_prod_id": 8}, ["policy.reference.isv_prod_id"]),
            ({"isv_svn": 2}, ["policy.reference.isv_svn"]),
            ({"mrenclave": "ab" * 32, "isv_svn": 2}, ["policy.reference.mrenclave", "policy.reference.isv_svn"]),
        ],
    )
    def test_every_differing_claim_is_named(self, fields: dict[str, Any], ids: list[str]) -> None:
        made = bundle()
        found = References([made]).match(made_claims.sgx(**fields), (SUBJECT.name,))
        assert matched(found) == ids
        assert isinstance(found, tuple)
        assert all(failure.reference == made.id and made.id[:12] in failure.expected for failure in found)
        assert found[0].found == str(next(iter(fields.values())))

    def test_the_closest_bundle_is_explained_with_all_accepted_values(self) -> None:
        far = bundle({"mrenclave": "01" * 32, "mrsigner": "02" * 32})
        near = bundle({"mrenclave": "03" * 32, "mrsigner": "bb" * 32})
        found = References([far, near]).match(made_claims.sgx(), (SUBJECT.name,))
        assert matched(found) == ["policy.reference.mrenclave"]
        assert isinstance(found, tuple)
        assert found[0].reference == near.id
        assert "01" * 32 in found[0].expected and "03" * 32 in found[0].expected

    def test_many_accepted_values_are_not_all_listed(self) -> None:
        many = [bundle({"mrenclave": f"{number:02x}" * 32}) for number in range(9)]
        found = References(many).match(made_claims.sgx(), (SUBJECT.name,))
        assert isinstance(found, tuple) and found[0].expected.endswith("5 others")

    def test_no_bundle_of_this_image(self) -> None:
        assert matched(References([bundle()]).match(made_claims.sgx(), ("other/image",))) == [
            "policy.reference.unknown"
        ]
        assert matched(References().match(made_claims.sgx(), ("other/image",))) == ["policy.reference.unknown"]

    def test_another_platform(self) -> None:
        found = References([bundle()]).match(made_claims.sgx(tee="sgx-sim", simulated=True), (SUBJECT.name,))
        assert matched(found) == ["policy.reference.tee"]

    @pytest.mark.parametrize(
        ("now", "id"), [(999, "policy.reference.not_yet_valid"), (3001, "policy.reference.expired")]
    )
    def test_out_of_date(self, now: int, id: str) -> None:
        references = References([bundle()])
        claims = made_claims.sgx(verified_at=now)
        assert matched(references.match(claims, (SUBJECT.name,))) == [id]
        assert references.values(None, "sgx", now) == [] and references.active(now) == ()
        with pytest.raises(IntegrityError) as caught:
            references.require_active(references.bundles[0], now)
        assert "policy." + caught.value.id == id

    @pytest.mark.parametrize("now", [1000, 3000])
    def test_the_ends_of_validity_are_inside(self, now: int) -> None:
        claims = made_claims.sgx(verified_at=now)
        assert isinstance(References([bundle()]).match(claims, (SUBJECT.name,)), ReferenceValue)

    def test_revoked(self) -> None:
        made = bundle()
        references = References([made], {made.id: "key leaked"})
        found = references.match(made_claims.sgx(), (SUBJECT.name,))
        assert matched(found) == ["policy.reference.revoked"]
        assert isinstance(found, tuple) and "key leaked" in found[0].found and found[0].reference == made.id

    def test_a_revoked_bundle_is_not_what_a_stranger_is_told_about(self) -> None:
        gone, good = bundle({"mrenclave": "01" * 32, "mrsigner": "bb" * 32}), bundle({"mrenclave": "02" * 32})
        found = References([gone, good], {gone.id: "old"}).match(made_claims.sgx(), (SUBJECT.name,))
        assert matched(found) == ["policy.reference.mrenclave"]
        assert isinstance(found, tuple) and "01" * 32 not in found[0].expected

    def test_another_valid_bundle_of_the_same_values_counts(self) -> None:
        old, new = bundle(end=1500), bundle(end=4000)
        found = References([old, new]).match(made_claims.sgx(), (SUBJECT.name,))
        assert isinstance(found, ReferenceValue) and found.bundle == new.id

    def test_values_of_an_image(self) -> None:
        other = bundle(subject=Subject("other", SUBJECT.digests))
        references = References([bundle(), other])
        assert [value.image for value in references.values("other", "sgx", NOW)] == ["other"]
        assert len(references.values(None, "sgx", NOW)) == 2
        assert references.values(None, "tdx", NOW) == []


class TestRegoData:
    def test_gathered(self) -> None:
        one = bundle({"measurement": "c1" * 48}, tees=("snp",), values={"snp_bootloader": [4], "snp_smt_enabled": True})
        two = bundle({"measurement": "c2" * 48}, tees=("snp",), values={"snp_bootloader": [4, 5]})
        answers, sources = References([one, two]).rego_data("snp", NOW)
        assert answers["measurement"] == answers["snp_launch_measurement"] == ["c1" * 48, "c2" * 48]
        assert answers["snp_bootloader"] == [4, 5] and answers["snp_smt_enabled"] is True
        assert set(sources["measurement"]) == {one.id, two.id} and sources["snp_smt_enabled"] == (one.id,)
        assert References([one]).rego_data("sgx", NOW)[0] == {}

    @pytest.mark.parametrize(("left", "right"), [(1, 2), (True, 1), ([1], 1), ("a", None)])
    def test_what_bundles_disagree_on_is_no_answer(self, left: Any, right: Any) -> None:
        made = [bundle(values={"minimum": left}), bundle(values={"minimum": right}, end=4000)]
        assert "minimum" not in References(made).rego_data("sgx", NOW)[0]

    def test_revoked_and_expired_ones_do_not_answer(self) -> None:
        gone, old = bundle(), bundle({"mrenclave": "01" * 32}, end=1500)
        assert References([gone, old], {gone.id: "bad"}).rego_data("sgx", NOW) == ({}, {})


class TestRevocation:
    def test_signed_and_read(self) -> None:
        made = sign(revocation(["12" * 32, "34" * 32], "leaked", NOW), SIGNER)
        assert revoked(made, TRUSTED) == {"12" * 32: "leaked", "34" * 32: "leaked"}

    def test_refused(self) -> None:
        made = revocation(["12" * 32], "leaked", NOW)
        for data in (sign(made, OTHER), sign(payload(), SIGNER), sign(revocation(["12" * 32], "", NOW), SIGNER)):
            with pytest.raises(IntegrityError):
                revoked(data, TRUSTED)
        assert cause(sign(made, SIGNER)) == "reference.malformed"


class TestAppraisal:
    POLICY = Policy(image="registry.example/app")

    def test_accepted_by_reference(self) -> None:
        made = bundle(build={"treeRoot": "ab" * 32})
        result = appraise(made_claims.sgx(), self.POLICY, references=References([made]))
        assert result.accepted and result.references == (made.id,)
        assert result.trust.executables == 2 and result.trust.file_system == 2
        assert result.to_dict()["references"] == [made.id]

    def test_by_id(self) -> None:
        made = bundle()
        policy = Policy(reference_values=(made.id,))
        assert appraise(made_claims.sgx(), policy, references=References([made])).accepted
        assert not appraise(made_claims.sgx(), policy, references=References([bundle(end=4000)])).accepted

    def test_without_references_nothing_passes(self) -> None:
        for references in (None, References()):
            result = appraise(made_claims.sgx(), self.POLICY, references=references)
            assert [failure.id for failure in result.failures] == ["policy.reference.unknown"]

    def test_a_measurement_of_the_policy_itself_needs_no_bundle(self) -> None:
        policy = replace(self.POLICY, mrenclave=("aa" * 32,))
        assert appraise(made_claims.sgx(), policy).accepted
        assert appraise(made_claims.sgx(mrenclave="01" * 32), policy).failures[0].id == "policy.reference.unknown"

    def test_the_policys_signer_counts_beside_references(self) -> None:
        policy = replace(self.POLICY, mrsigner=("cc" * 32,))
        result = appraise(made_claims.sgx(), policy, references=References([bundle()]))
        assert [failure.id for failure in result.failures] == ["policy.mrsigner"]

    def test_revoked_is_contraindicated(self) -> None:
        made = bundle()
        result = appraise(made_claims.sgx(), self.POLICY, references=References([made], {made.id: "bad"}))
        assert result.trust.executables == 96 and result.failures[0].reference == made.id

    def test_any_enclave_does_not_override_references(self) -> None:
        policy = replace(self.POLICY, any_enclave=True)
        assert not appraise(made_claims.sgx(mrenclave="01" * 32), policy, references=References([bundle()])).accepted


class TestKeys:
    def test_made_once_for_its_owner_only(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "key.pem"
        made, new = KeySigner.load_or_make(path)
        again, second = KeySigner.load_or_make(path)
        assert new and not second and made.key_id == again.key_id
        assert path.stat().st_mode & 0o777 == 0o600

    def test_readable_by_others(self, tmp_path: Path) -> None:
        path = tmp_path / "key.pem"
        KeySigner.load_or_make(path)
        path.chmod(0o640)
        with pytest.raises(UsageError) as caught:
            KeySigner.load(path)
        assert caught.value.id == "reference.key.mode"

    @pytest.mark.parametrize("content", [b"", b"nonsense", None, "p384", "encrypted"])
    def test_unusable(self, tmp_path: Path, content: bytes | str | None) -> None:
        path = tmp_path / "key.pem"
        if isinstance(content, str):
            from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

            curve = ec.SECP384R1() if content == "p384" else ec.SECP256R1()
            encryption = NoEncryption() if content == "p384" else BestAvailableEncryption(b"secret")
            content = ec.generate_private_key(curve).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        if content is not None:
            path.touch(mode=0o600)
            path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            KeySigner.load(path)
        assert caught.value.id == "reference.key"

    def test_public_keys(self) -> None:
        assert load_public_key(SIGNER.public_pem()) == SIGNER.key.public_key()
        wrong = ec.generate_private_key(ec.SECP384R1()).public_key()
        for pem in (b"", b"x", wrong.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)):
            with pytest.raises(UsageError):
                load_public_key(pem)

    @settings(max_examples=50, deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_no_key(self, data: bytes) -> None:
        with pytest.raises(UsageError):
            load_public_key(data)


def test_types_are_ours() -> None:
    assert json.loads(payload())["predicateType"] == REFERENCE_TYPE

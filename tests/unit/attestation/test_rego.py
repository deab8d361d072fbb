"""Policies in Rego: what they decide, what denials say, which ones are refused at once, and what they cannot do."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_claims
import pytest
from attested import Attested
from hypothesis import given, settings
from hypothesis import strategies as st
from test_references import bundle

from inclavare.attestation import Claims, appraise, rego_text, verify
from inclavare.attestation.annotated import annotated_evidence, init_data_claims
from inclavare.attestation.appraisal import Context
from inclavare.attestation.references import References
from inclavare.attestation.rego import (
    ALLOW,
    MAX_INPUT,
    MAX_POLICY,
    TRUST_CLAIMS,
    RegoError,
    RegoPolicy,
    Regopy,
    attestation_policy,
    check,
    resource_policy,
)
from inclavare.attestation.trust import TrustVector
from inclavare.errors import UsageError

POLICY = """package policy

import rego.v1

default executables := 33
default hardware := 97
default configuration := 36

trust_claims := {"executables": executables, "hardware": hardware, "configuration": configuration}

##### SGX
executables := 3 if {
\tinput.sgx
\tinput.sgx.body.mr_enclave in query_reference_value("mrenclave") # "in a comment }"
}

hardware := 2 if {
\tinput.sgx
\tinput.sgx.tcb_status == "UpToDate"
\tinput.sgx.collateral_expiration_status == "0"
}

configuration := 2 if {
\tinput.sgx
\tinput.sgx.debug == false
}

##### SNP
executables := 3 if {
\tinput.snp
\tinput.snp.measurement in query_reference_value("snp_launch_measurement")
}

hardware := 2 if {
\tinput.snp
\tfirmware_new_enough
}

configuration := 2 if {
\tinput.snp
\tinput.snp.policy_debug_allowed == false
\tinput.snp.platform_smt_enabled == query_reference_value("snp_smt_enabled")
}

else := 3 if {
\tinput.snp
\tinput.snp.policy_debug_allowed == false
}

firmware_new_enough if {
\tinput.snp.reported_tcb_snp >= query_reference_value("minimum_snp")
\tinput.snp.reported_tcb_microcode in query_reference_value("snp_microcode")
}

extensions := [{"name": "ear.trustee.identifiers", "key": -18, "value": {"found": images}}]

images := [image | image := input.init_data_claims.agent_policy_claims.images[_]]
"""
RESOURCE = """package policy

default allow = false

plugin = data.plugin

allow if {
\tplugin == "resource"
\tdata["resource-path"][0] == "app"
\tcount(data["resource-path"]) == 3
\tinput.submods.cpu0["ear.status"] == "affirming"
\tnot data.query.forbidden
}
"""
TOKEN = {"submods": {"cpu0": {"ear.status": "affirming"}}}


@pytest.fixture(scope="module")
def engine() -> Iterator[Regopy]:
    made = Regopy(workers=2)
    yield made
    made.close()


@pytest.fixture
def sgx_references() -> References:
    return References([bundle()])


def judge(engine: Regopy, claims: Claims, references: References | None = None, policy: str = POLICY) -> Any:
    return attestation_policy(policy, claims, references, engine=engine)


class TestAttestation:
    def test_accepted(self, engine: Regopy, sgx_references: References) -> None:
        result = judge(engine, made_claims.sgx(), sgx_references)
        assert result.accepted and result.failures == ()
        assert result.trust == TrustVector(executables=3, hardware=2, configuration=2)
        assert result.references == (sgx_references.bundles[0].id,)
        assert result.extensions == ({"name": "ear.trustee.identifiers", "key": -18, "value": {"found": []}},)

    def test_each_claim_that_is_not_affirming_is_explained(self, engine: Regopy, sgx_references: References) -> None:
        claims = made_claims.sgx(mrenclave="01" * 32, tcb_status="OutOfDate")
        result = judge(engine, claims, sgx_references)
        assert not result.accepted
        by_id = {failure.id: failure for failure in result.failures}
        assert set(by_id) == {"policy.rego.executables", "policy.rego.hardware"}
        executables, hardware = by_id["policy.rego.executables"], by_id["policy.rego.hardware"]
        assert executables.found.startswith("33 (not recognized)") and "01" * 32 in executables.found
        assert "reference value mrenclave" in executables.expected and "aa" * 32 in executables.expected
        assert executables.reference == sgx_references.bundles[0].id
        assert "OutOfDate" in hardware.found and "UpToDate" in hardware.expected and hardware.reference is None
        assert "97 (not recognized, but should be)" in hardware.found

    def test_missing_reference_values_are_named(self, engine: Regopy) -> None:
        result = judge(engine, made_claims.sgx())
        assert result.failures[0].remedy == "register reference values for mrenclave"
        assert "of which there is none" in result.failures[0].expected

    def test_rules_that_are_referred_to_are_explained_too(self, engine: Regopy) -> None:
        values = {"minimum_snp": 25, "snp_microcode": [219], "snp_smt_enabled": True}
        references = References([bundle({"measurement": "c1" * 48}, tees=("snp",), values=values)])
        result = judge(engine, made_claims.snp(), references)
        assert [failure.id for failure in result.failures] == ["policy.rego.hardware"]
        failure = result.failures[0]
        assert "reported_tcb_snp" in failure.found and "found 24" in failure.found and "25" in failure.expected
        assert "microcode" not in failure.found

    def test_another_tees_rules_explain_nothing(self, engine: Regopy) -> None:
        result = judge(engine, made_claims.tdx())
        assert {failure.id for failure in result.failures} == {
            "policy.rego.executables",
            "policy.rego.hardware",
            "policy.rego.configuration",
        }
        assert all("input." not in failure.found for failure in result.failures)

    def test_a_lesser_alternative(self, engine: Regopy) -> None:
        values = {"minimum_snp": 24, "snp_microcode": [219], "snp_smt_enabled": False}
        references = References([bundle({"measurement": "c1" * 48}, tees=("snp",), values=values)])
        assert judge(engine, made_claims.snp(), references).trust.configuration == 3

    def test_revoked_reference_values_do_not_answer(self, engine: Regopy) -> None:
        made = bundle()
        assert not judge(engine, made_claims.sgx(), References([made], {made.id: "bad"})).accepted

    def test_another_platforms_reference_values_do_not_answer(self, engine: Regopy, sgx_references: References) -> None:
        policy = POLICY + "\nallow_simulated := true\n"
        result = judge(engine, made_claims.sgx(tee="sgx-sim", simulated=True), sgx_references, policy)
        assert [failure.id for failure in result.failures] == ["policy.rego.executables"]

    @pytest.mark.parametrize("name", ["simulated", "debug"])
    def test_only_by_name(self, engine: Regopy, name: str) -> None:
        careless = 'package policy\ntrust_claims := {"executables": 2, "hardware": 2}\n'
        claims = replace(made_claims.sgx(), **{name: True})
        result = judge(engine, claims, policy=careless)
        assert [failure.id for failure in result.failures] == [f"policy.{name}"]
        assert result.trust.tier.text == "contraindicated"
        for text, accepted in (("true", True), ("false", False), ('"true"', False), ("1", False)):
            assert judge(engine, claims, policy=f"{careless}allow_{name} := {text}\n").accepted is accepted

    @pytest.mark.parametrize(
        ("text", "id"),
        [
            ("trust_claims := {}", "policy.rego.no_claim"),
            ('trust_claims := {"hardware": 0}', "policy.rego.no_claim"),
            ('trust_claims := {"hardware": 1}', "policy.rego.no_claim"),
            ('trust_claims := {"executables": 2} if input.snp', "policy.rego.no_claim"),
            ('trust_claims := {"hardware": 2, "executables": 32}', "policy.rego.executables"),
            ('trust_claims := {"hardware": 200}', "policy.rego.trust_claims"),
            ('trust_claims := {"hardware": "2"}', "policy.rego.trust_claims"),
            ('trust_claims := {"hardware": true}', "policy.rego.trust_claims"),
            ('trust_claims := {"hardware": 2.5}', "policy.rego.trust_claims"),
            ('trust_claims := {"software": 2}', "policy.rego.trust_claims"),
            ("trust_claims := [2]", "policy.rego.trust_claims"),
            ('trust_claims := {"hardware": 2}\nextensions := {}', "policy.rego.extensions"),
            (
                'trust_claims := {"hardware": 2}\nextensions := [{"name": "ear.status", "key": 1, "value": 1}]',
                "policy.rego.extensions",
            ),
            (
                'trust_claims := {"hardware": 2}\nextensions := [{"name": "ear.veraison.x", "key": 1, "value": 1}]',
                "policy.rego.extensions",
            ),
            (
                'trust_claims := {"hardware": 2}\nextensions := [{"name": "a", "key": 1.5, "value": 1}]',
                "policy.rego.extensions",
            ),
            ('trust_claims := {"hardware": 2}\ntrust_claims := {"hardware": 3}', "policy.rego.evaluation"),
            ('trust_claims := {"hardware": nosuch(1)}', "policy.rego.syntax"),
            ("trust_claims := {", "policy.rego.syntax"),
        ],
    )
    def test_what_does_not_affirm_refuses(self, engine: Regopy, text: str, id: str) -> None:
        result = judge(engine, made_claims.sgx(), policy=f"package policy\n{text}\n")
        assert not result.accepted and [failure.id for failure in result.failures] == [id]
        assert result.failures[0].found and result.failures[0].expected and result.failures[0].remedy
        if id in ("policy.rego.trust_claims", "policy.rego.extensions", "policy.rego.evaluation", "policy.rego.syntax"):
            assert set(result.trust.to_dict().values()) == {-1}

    def test_init_data_and_the_key_are_there(self, engine: Regopy) -> None:
        text = 'package policy\ntrust_claims := {"hardware": 2} if input.init_data_claims["aa.toml"].a.b == 1\n'
        text += 'extensions := [{"name": "kty", "key": -1, "value": input.runtime_data_claims["tee-pubkey"].kty}]\n'
        init = 'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"aa.toml" = "[a]\\nb = 1"\n'
        context = Context({"tee-pubkey": {"kty": "EC"}}, init)
        result = attestation_policy(text, made_claims.sgx(), context=context, engine=engine)
        assert result.accepted and result.extensions[0]["value"] == "EC"

    def test_reference_values_as_data(self, engine: Regopy, sgx_references: References) -> None:
        text = 'package policy\ntrust_claims := {"executables": 3} if input.sgx.body.mr_enclave in data.reference.mrenclave\n'
        assert judge(engine, made_claims.sgx(), sgx_references, text).accepted

    def test_real_evidence(self, engine: Regopy, attested: Attested) -> None:
        """The whole way, with a simulated enclave that the policy allows by name."""
        mrenclave = attested.enclave.mrenclave.hex()
        made = bundle({"mrenclave": mrenclave}, tees=("sgx-sim",), start=1, end=1 << 33)
        text = POLICY + "\nallow_simulated := true\n"
        policy = RegoPolicy(text, attested.platform.root_ca(), engine)
        arguments: dict[str, Any] = {"nonce": attested.nonce, "now": attested.now, "references": References([made])}
        result = verify(attested.evidence, policy, **arguments)
        assert result.accepted, result.failures
        replayed = verify(attested.evidence, policy, **{**arguments, "nonce": bytes(32)})
        assert [failure.id for failure in replayed.failures] == ["freshness.nonce"]
        assert replayed.trust.tier.text == "contraindicated"
        strict = replace(policy, text=POLICY)
        assert [failure.id for failure in verify(attested.evidence, strict, **arguments).failures] == [
            "policy.simulated"
        ]

    def test_report_data_counts_beside_the_policy(self, engine: Regopy, sgx_references: References) -> None:
        policy = RegoPolicy(POLICY, engine=engine)
        result = appraise(made_claims.sgx(), policy, expected_report_data=bytes(64), references=sgx_references)
        assert [failure.id for failure in result.failures] == ["binding.report_data"]


class TestResource:
    def test_released(self, engine: Regopy) -> None:
        decision = resource_policy(RESOURCE, TOKEN, "app/key/main", engine=engine)
        assert decision and decision.failures == ()
        assert resource_policy(RESOURCE, TOKEN, ["app", "key", "main"], engine=engine)

    @pytest.mark.parametrize(
        ("token", "path", "more"),
        [
            (TOKEN, "other/key/main", {}),
            (TOKEN, "app/key", {}),
            (TOKEN, "app/key/main", {"plugin": "ca"}),
            (TOKEN, "app/key/main", {"query": {"forbidden": "1"}}),
            ({"submods": {"cpu0": {"ear.status": "warning"}}}, "app/key/main", {}),
            ({}, "app/key/main", {}),
        ],
    )
    def test_denied(self, engine: Regopy, token: dict[str, Any], path: str, more: dict[str, Any]) -> None:
        decision = resource_policy(RESOURCE, token, path, engine=engine, **more)
        assert not decision
        failure = decision.failures[0]
        assert failure.id == "policy.rego.allow" and path in failure.found and failure.remedy

    def test_a_denial_says_which_condition_and_which_status(self, engine: Regopy) -> None:
        token = {"submods": {"cpu0": {"ear.status": "contraindicated"}}}
        failure = resource_policy(RESOURCE, token, "app/key/main", engine=engine).failures[0]
        assert "cpu0 contraindicated" in failure.found
        assert 'input.submods.cpu0["ear.status"] == "affirming": found contraindicated' in failure.found

    @pytest.mark.parametrize("value", ['"true"', "1", "[true]", "{}", "null"])
    def test_only_true_allows(self, engine: Regopy, value: str) -> None:
        assert not resource_policy(f"package policy\nallow := {value}\n", TOKEN, "a/b/c", engine=engine)

    def test_undefined_denies(self, engine: Regopy) -> None:
        decision = resource_policy("package policy\nallow if input.no\n", TOKEN, "a/b/c", engine=engine)
        assert "undefined" in decision.failures[0].found

    def test_a_policy_that_fails_denies(self, engine: Regopy) -> None:
        decision = resource_policy("package policy\nallow := true\nallow := false\n", TOKEN, "a/b/c", engine=engine)
        assert not decision and decision.failures[0].id == "policy.rego.evaluation"

    def test_requests_do_not_see_each_other(self, engine: Regopy) -> None:
        with ThreadPoolExecutor(8) as pool:
            paths = [f"{'app' if number % 3 else 'other'}/key/{number}" for number in range(60)]
            decisions = pool.map(lambda path: bool(resource_policy(RESOURCE, TOKEN, path, engine=engine)), paths)
            assert list(decisions) == [path.startswith("app") for path in paths]

    @pytest.mark.parametrize("text", ["package policy\nallow { input.a }", "package policy\nallow = true { input.a }"])
    def test_older_rego_is_understood(self, engine: Regopy, text: str) -> None:
        assert engine.evaluate(text, {"a": True}, {}, ALLOW) is True


class TestCheck:
    def test_good_ones(self, engine: Regopy) -> None:
        check(POLICY, "attestation", engine=engine)
        check(RESOURCE, "resource", engine=engine)

    @pytest.mark.parametrize(
        ("text", "id", "mentions"),
        [
            ("package policy\n\nallow if {\n  input.x ==\n}\n", "policy.rego.syntax", "line 4, column 11"),
            ("package policy\nallow := nosuch(1)\n", "policy.rego.syntax", "line 2, column 10"),
            ("package policy\nallow if http.send({})\n", "policy.rego.rule", None),
            ("package policy\nallow if allow\n", "policy.rego.syntax", "Recursion"),
            ("package other\nallow := true\n", "policy.rego.package", "package other"),
            ("package policy\nother := true\n", "policy.rego.rule", "allow"),
            ("package policy\n# allow := true\n", "policy.rego.rule", "allow"),
            ("", "policy.rego.syntax", None),
            ("nonsense", "policy.rego.package", "no package"),
            ("package policy\nallow := 1\nallow := 2\n", "policy.rego.evaluation", "two values"),
            ("package policy\nallow := " + "[" * 3000 + "]" * 3000, None, None),
            ("package policy\n" + "#" * MAX_POLICY, "policy.rego.size", None),
        ],
    )
    def test_refused(self, engine: Regopy, text: str, id: str | None, mentions: str | None) -> None:
        if "http.send" in text:  # The engine has no such function, and says so only where it would be called.
            assert engine.evaluate(text, {}, {}, ALLOW) is None
            return
        with pytest.raises(RegoError) as caught:
            check(text, "resource", engine=engine)
        assert id is None or caught.value.id == id
        assert mentions is None or mentions in caught.value.one_line()

    def test_columns_count_characters(self, engine: Regopy) -> None:
        with pytest.raises(RegoError) as caught:
            check('package policy\nx := "äöü" allow := := 1\n', "resource", engine=engine)
        assert "line 2, column" in caught.value.message

    def test_an_attestation_policy_needs_trust_claims(self, engine: Regopy) -> None:
        with pytest.raises(RegoError) as caught:
            check(RESOURCE, "attestation", engine=engine)
        assert caught.value.id == "policy.rego.rule" and caught.value.expected == "trust_claims"


class TestConfinement:
    def test_time(self) -> None:
        slow = "package policy\nallow := count([1 | numbers.range(1, 30000)[_]; numbers.range(1, 30000)[_]])\n"
        limited = Regopy(workers=1, seconds=0.3)
        started = time.monotonic()
        with pytest.raises(RegoError) as caught:
            limited.evaluate(slow, {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.time" and time.monotonic() - started < 3
        assert limited.evaluate("package policy\nallow := 1", {}, {}, ALLOW) == 1
        limited.close()

    def test_no_worker_is_free(self) -> None:
        slow = "package policy\nallow := count([1 | numbers.range(1, 30000)[_]; numbers.range(1, 30000)[_]])\n"
        limited = Regopy(workers=1, seconds=0.5)
        assert limited.evaluate("package policy\nallow := 1", {}, {}, ALLOW) == 1

        def occupy() -> None:
            with pytest.raises(RegoError):
                limited.evaluate(slow, {}, {}, ALLOW)

        thread = threading.Thread(target=occupy)
        thread.start()
        while not limited._idle.empty():
            time.sleep(0.001)
        limited._seconds = 0.05
        with pytest.raises(RegoError) as caught:
            limited.evaluate("package policy\nallow := 1", {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.time" and "free" in str(caught.value.found)
        thread.join()
        limited.close()

    def test_memory(self) -> None:
        large = "package policy\nallow := count(numbers.range(1, 30000000))\n"
        limited = Regopy(workers=1, memory=80 << 20, seconds=20)
        with pytest.raises(RegoError) as caught:
            limited.evaluate(large, {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.memory"
        limited.close()

    def test_output(self, engine: Regopy) -> None:
        text = 'package policy\nallow := concat("", ["0123456789" | numbers.range(1, 60000)[_]])\n'
        with pytest.raises(RegoError) as caught:
            engine.evaluate(text, {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.output"

    def test_input(self, engine: Regopy) -> None:
        with pytest.raises(RegoError) as caught:
            engine.evaluate(RESOURCE, {"a": "x" * MAX_INPUT}, {}, ALLOW)
        assert caught.value.id == "policy.rego.input"

    def test_a_policy_that_ends_the_engine(self, engine: Regopy) -> None:
        with pytest.raises(RegoError) as caught:
            engine.evaluate("package policy\nallow if { input.a with input as input.b }", {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.crash"
        assert engine.evaluate("package policy\nallow := 1", {}, {}, ALLOW) == 1

    def test_nothing_of_this_process_is_seen(self, engine: Regopy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_FOR_TESTS", "do not tell")
        fresh = Regopy(workers=1)
        told = json.dumps(fresh.evaluate("package policy\nallow := opa.runtime()", {}, {}, ALLOW))
        assert "SECRET_FOR_TESTS" not in told and "PATH" not in told
        worker = fresh._idle.get()
        assert worker is not None
        status = Path(f"/proc/{worker._process.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        if os.geteuid() == 0:
            assert "Uid:\t65534\t65534\t65534\t65534" in status and "CapEff:\t0000000000000000" in status
        assert Path(f"/proc/{worker._process.pid}/environ").read_bytes().count(b"=") <= 1
        limits = Path(f"/proc/{worker._process.pid}/limits").read_text()
        assert "Max open files            4 " in " ".join(limits.splitlines()) + " "
        worker.kill()
        fresh._idle.put(None)

    def test_what_the_engine_prints_is_no_answer(self, engine: Regopy) -> None:
        """It writes compile errors to standard output, on which a policy's author has a say."""
        for _ in range(3):
            with pytest.raises(RegoError) as caught:
                engine.evaluate('package policy\nallow if { input.x == }\n# {"values": {}}', {}, {}, ALLOW)
            assert caught.value.id == "policy.rego.syntax"

    def test_a_forked_process_gets_workers_of_its_own(self) -> None:
        made = Regopy(workers=1)
        assert made.evaluate("package policy\nallow := 1", {}, {}, ALLOW) == 1
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if made.evaluate("package policy\nallow := 2", {}, {}, ALLOW) == 2 else 1
                made.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert made.evaluate("package policy\nallow := 3", {}, {}, ALLOW) == 3
        made.close()

    def test_workers_end_with_their_owner(self) -> None:
        code = (
            "from inclavare.attestation.rego import *\n"
            "e = Regopy(workers=1); e.evaluate('package policy\\nallow := 1', {}, {}, ALLOW)\n"
            "print(e._idle.get()._process.pid, flush=True); import os; os._exit(0)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        pid = int(done.stdout)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/statm").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    def test_without_the_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError) as caught:
            Regopy()
        assert caught.value.id == "policy.rego.engine" and "pip install 'inclavare[verdictd]'" in str(
            caught.value.remedy
        )

    def test_memory_stays_flat(self) -> None:
        made = Regopy(workers=1)
        resident = []
        for round_ in range(4):
            for number in range(200):
                made.evaluate(
                    RESOURCE, TOKEN, {"plugin": "resource", "resource-path": ["app", str(number), "x"]}, ALLOW
                )
            worker = made._idle.get()
            assert worker is not None
            resident.append(worker._resident())
            made._idle.put(worker)
            assert round_ < 2 or resident[round_] - resident[1] < 8 << 20
        made.close()

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=200))
    def test_any_text_is_refused_or_undefined(self, engine: Regopy, text: str) -> None:
        try:
            assert engine.evaluate("package policy\n" + text, {}, {}, ALLOW) is None
        except RegoError as error:
            assert error.id.startswith("policy.rego.")

    @settings(max_examples=100, deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
            max_leaves=9,
        )
    )
    def test_any_input_comes_back_and_equals_the_same_data(self, engine: Regopy, value: Any) -> None:
        text = "package policy\nallow := [input.v, input.v == data.v]"
        assert engine.evaluate(text, {"v": value}, {"v": value}, ALLOW) == [value, True]

    @pytest.mark.parametrize("text", ['a","b', '"]]}', "\\", '"', '{"a": 1}', "\n"])
    def test_strings_write_no_results(self, engine: Regopy, text: str) -> None:
        """The engine prints decoded strings as they are; the result is not read from what it prints."""
        encoded = base64.b64encode(text.encode()).decode()
        for expression in ("input.plain", "base64.decode(input.encoded)"):
            policy = f"package policy\nallow := [{expression}]"
            assert engine.evaluate(policy, {"plain": text, "encoded": encoded}, {}, ALLOW) == [text]

    def test_numbers_do_not_wrap_around(self, engine: Regopy) -> None:
        assert engine.evaluate("package policy\nallow := input.v == 1", {"v": 2**64 + 1}, {}, ALLOW) is False

    def test_text_that_is_none(self, engine: Regopy) -> None:
        with pytest.raises(RegoError) as caught:
            engine.evaluate(RESOURCE, {"v": "\ud83d"}, {}, ALLOW)
        assert caught.value.id == "policy.rego.input"
        with pytest.raises(RegoError) as caught:
            engine.evaluate("package policy\nallow := true\n\0allow := false", {}, {}, ALLOW)
        assert caught.value.id == "policy.rego.syntax" and "line 3, column 1" in caught.value.message


class TestText:
    def test_rules(self) -> None:
        names = [name for name, _ in rego_text.rules(POLICY)]
        assert names.count("executables") == 3 and names.count("configuration") == 3 and "else" not in names
        body = [text for name, text in rego_text.rules(POLICY) if name == "configuration"][-1]
        assert "else := 3" in body

    def test_comments_and_strings_are_not_code(self) -> None:
        text = 'package policy\n# allow := 1\na := "allow := {" # }\nb := `\nallow := 1\n`\n'
        assert not rego_text.defines(text, "allow") and rego_text.defines(text, "b")
        assert rego_text.package("# package x\npackage policy") == "policy"

    def test_keys(self) -> None:
        assert rego_text.reference_keys(POLICY) == (
            "mrenclave",
            "snp_launch_measurement",
            "snp_smt_enabled",
            "minimum_snp",
            "snp_microcode",
        )

    @given(st.text(max_size=300))
    def test_any_text(self, text: str) -> None:
        list(rego_text.rules(text))
        rego_text.package(text)
        rego_text.failing(text, "allow", {}, {})


class TestAnnotated:
    def test_layout(self) -> None:
        found = annotated_evidence(made_claims.snp(), Context({"nonce": "x", "additional-evidence": ""}))
        assert set(found) == {"snp", "report_data", "init_data", "init_data_claims", "runtime_data_claims"}
        assert found["init_data"] == "00" * 32 and "report_data" not in found["snp"]
        short = annotated_evidence(made_claims.snp(), Context({"nonce": "x", "additional-evidence": ""}), verbose=False)
        assert short["runtime_data_claims"] == {"nonce": "x"}

    def test_event_logs_only_where_asked_for(self) -> None:
        claims = made_claims.tdx(domain={"event_log": ({"index": 1},)})
        assert "uefi_event_logs" in annotated_evidence(claims, Context())["tdx"]
        assert "uefi_event_logs" not in annotated_evidence(claims, Context(), verbose=False)["tdx"]

    def test_init_data(self) -> None:
        text = (
            'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"cdh.toml" = "a = 1979-05-27"\n"aa.toml" = "not = = toml"\n'
            "\"policy.rego\" = '''\npackage agent\npolicy_data := {\"images\": [\"x\"]}'''\n"
        )
        assert init_data_claims(text) == {
            "cdh.toml": {"a": "1979-05-27"},
            "aa.toml": "not = = toml",
            "agent_policy_claims": {"images": ["x"]},
        }
        odd = 'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"policy.rego" = "policy_data := {broken"\n'
        assert init_data_claims(odd) == {"policy.rego": "policy_data := {broken"}


def test_the_queries_are_trustees() -> None:
    assert TRUST_CLAIMS == "data.policy.trust_claims"

"""Appraisal and resource policies in Rego, as Confidential Containers' Trustee has them.

Attestation policies (``package policy``): ``input`` is :func:`~inclavare.attestation.annotated.annotated_evidence`;
``query_reference_value(name)`` answers from the registered reference bundles, ``null`` where there is none; the result
is ``trust_claims``, values of a trustworthiness vector, and ``extensions`` for the token. Evidence is accepted if the
vector is affirming. Two rules are ours: simulated or debug evidence passes only where the policy says
``allow_simulated := true`` or ``allow_debug := true``, whatever else it says.

Resource policies (``package policy``): ``input`` is the token's claims; ``data.plugin``, ``data["resource-path"]`` (a
list) and ``data.query`` are what is asked for; the rule is ``allow``.

Engines are behind :class:`RegoEngine`. The one here is rego-cpp in processes of its own
(:mod:`inclavare.attestation.rego_worker`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ..errors import UsageError
from . import rego_text
from .annotated import annotated_evidence
from .appraisal import Appraisal, Context, Failure
from .claims import Claims
from .references import References
from .trust import Tier, TrustVector, meaning, tier

TRUST_CLAIMS = "data.policy.trust_claims"
EXTENSIONS = "data.policy.extensions"
ALLOW = "data.policy.allow"
_ALLOWANCES = {"simulated": "data.policy.allow_simulated", "debug": "data.policy.allow_debug"}

#: Kata's generated policies, the largest in the wild, have some 100 KB; those for attestation a tenth of it.
MAX_POLICY = 256 << 10
#: An event log as JSON has some 200 KB.
MAX_INPUT = 4 << 20
MAX_OUTPUT = 256 << 10
MAX_SECONDS = 2.0
MAX_MEMORY = 512 << 20

_QUERY_REFERENCE_VALUE = """package policy

import rego.v1

query_reference_value(name) := data.reference[name] if name in object.keys(data.reference)

query_reference_value(name) := null if not name in object.keys(data.reference)
"""
_POLICY, _HELPER = "policy.rego", "query_reference_value.rego"


class RegoError(UsageError):
    """A policy cannot be compiled or evaluated."""


class RegoEngine(Protocol):
    """Evaluates Rego. Implementations are safe for several threads."""

    def evaluate(self, policy: str, input: Mapping[str, Any], data: Mapping[str, Any], query: str) -> Any:
        """The value of one query, such as ``data.policy.allow``; ``None`` if it is undefined.

        Raises:
            RegoError: see :meth:`evaluate_all`.
        """

    def evaluate_all(
        self, policy: str, input: Mapping[str, Any], data: Mapping[str, Any], queries: Sequence[str]
    ) -> dict[str, Any]:
        """Values of several queries; undefined ones are absent.

        ``query_reference_value`` answers from ``data["reference"]``.

        Raises:
            RegoError: ``policy.rego.syntax`` (with line and column), ``.evaluation``, ``.time``, ``.memory``,
                ``.size``, ``.input``, ``.output``, ``.crash``.
        """


class Regopy:
    """rego-cpp, each evaluation in a worker process with limits.

    Args:
        workers: processes, each made when it is first needed; by default one per processor.
        seconds: for one evaluation, compiling included.
        memory: resident bytes of a worker.
        output: bytes of results.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        seconds: float = MAX_SECONDS,
        memory: int = MAX_MEMORY,
        output: int = MAX_OUTPUT,
    ) -> None:
        if importlib.util.find_spec("regopy") is None:
            raise UsageError(
                "there is no Rego engine here",
                id="policy.rego.engine",
                expected="regopy",
                remedy="pip install 'inclavare[verdictd]', or use a policy in TOML",
            )
        self._seconds, self._memory, self._output = seconds, memory, output
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers or os.cpu_count() or 1):
            self._idle.put(None)

    def evaluate(self, policy: str, input: Mapping[str, Any], data: Mapping[str, Any], query: str) -> Any:
        """See :class:`RegoEngine`."""
        return self.evaluate_all(policy, input, data, (query,)).get(query)

    def evaluate_all(
        self, policy: str, input: Mapping[str, Any], data: Mapping[str, Any], queries: Sequence[str]
    ) -> dict[str, Any]:
        """See :class:`RegoEngine`."""
        _check_size(policy)
        modules = [[_POLICY, policy]]
        if "query_reference_value" in policy:
            modules.append([_HELPER, _QUERY_REFERENCE_VALUE])
        request = json.dumps(
            {
                "modules": modules,
                "data": data,
                "input": input,
                "queries": list(queries),
                "max_output": self._output,
            }
        ).encode()
        if len(request) > MAX_INPUT:
            raise RegoError(
                "there is too much for a policy to look at",
                id="policy.rego.input",
                found=f"{len(request)} bytes",
                expected=f"at most {MAX_INPUT}",
            )
        reply = self._call(request)
        if "error" in reply:
            raise _error(policy, reply["error"], reply["text"], self._output)
        values: dict[str, Any] = reply["values"]
        return values

    def close(self) -> None:
        """End the workers that are idle; the engine can be used again afterwards."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for worker in idle:
            if worker is not None:
                worker.kill()
            self._idle.put(None)

    def _call(self, request: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._seconds
        try:
            worker = self._idle.get(timeout=self._seconds)
        except queue.Empty:
            raise _limit(
                "time", f"no worker was free for {self._seconds:g} seconds", "fewer policies at once"
            ) from None
        try:
            if worker is None or not worker.usable():
                worker = _Worker()
                deadline = time.monotonic() + self._seconds
            return worker.call(request, deadline, self._memory)
        except BaseException:
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            self._idle.put(worker)


class _Worker:
    """One process of :mod:`inclavare.attestation.rego_worker`."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("rego_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
        )
        self._read_exactly(1, time.monotonic() + _START_SECONDS, None)

    def usable(self) -> bool:
        """Whether it lives, and belongs to this process (not to one that this was forked from)."""
        return self._owner == os.getpid() and self._process.poll() is None

    def call(self, request: bytes, deadline: float, memory: int) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            RegoError: ``policy.rego.time``, ``.memory`` or ``.crash``; the worker is of no use any more.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(request).to_bytes(4, "big") + request)
            self._process.stdin.flush()
        except OSError:
            raise _crash() from None
        size = int.from_bytes(self._read_exactly(4, deadline, memory), "big")
        reply: dict[str, Any] = json.loads(self._read_exactly(size, deadline, memory))
        return reply

    def kill(self) -> None:
        """End it."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read_exactly(self, size: int, deadline: float, memory: int | None) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data = b""
        while len(data) < size:
            if not poll.poll(_WATCH_MILLISECONDS):
                if time.monotonic() > deadline:
                    raise _limit("time", "it is not done in time", "a policy that is done sooner")
                if memory is not None and self._resident() > memory:
                    raise _limit("memory", f"over {memory} bytes", "a policy that needs less")
                continue
            piece = os.read(descriptor, size - len(data))
            if not piece:
                raise _crash()
            data += piece
        return data

    def _resident(self) -> int:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


_WATCH_MILLISECONDS = 10
_START_SECONDS = 30.0


@functools.cache
def default_engine() -> RegoEngine:
    """The engine of this process.

    Raises:
        UsageError: ``policy.rego.engine``: none is installed.
    """
    return Regopy()


Kind = Literal["attestation", "resource"]
_RULES: dict[str, tuple[str, str]] = {"attestation": ("trust_claims", TRUST_CLAIMS), "resource": ("allow", ALLOW)}


def check(policy: str, kind: Kind, *, engine: RegoEngine | None = None) -> None:
    """Refuse a policy that could never decide: for its registration.

    Raises:
        RegoError: ``policy.rego.syntax`` with line and column, ``.package``, ``.rule``, ``.size``, or what evaluating
            it over nothing fails with.
    """
    _check_size(policy)
    rule, query = _RULES[kind]
    name = rego_text.package(policy)
    engine = engine or default_engine()
    engine.evaluate_all(policy, {}, {"reference": {}, "plugin": "resource", "resource-path": [], "query": {}}, (query,))
    if name != "policy":
        raise RegoError(
            "the policy is in another package than the one that is looked at",
            id="policy.rego.package",
            found="no package" if name is None else f"package {name}",
            expected="package policy",
        )
    if not rego_text.defines(policy, rule):
        raise RegoError(
            f"the policy has no rule {rule}",
            id="policy.rego.rule",
            found=", ".join(dict.fromkeys(found for found, _ in rego_text.rules(policy)))[:200] or "no rules",
            expected=rule,
            remedy=f"define {rule}, by which such a policy decides",
        )


@dataclass(frozen=True, slots=True)
class RegoPolicy:
    """An attestation policy; implements :class:`~inclavare.attestation.appraisal.AppraisalPolicy`.

    Attributes:
        text: the policy.
        trust_anchor: root CA of simulated platforms, DER.
        engine: by default this process's.
    """

    text: str
    trust_anchor: bytes | None = None
    engine: RegoEngine | None = None

    def judge(self, claims: Claims, references: References | None, context: Context) -> Appraisal:
        """The result for authentic claims. A policy that cannot be evaluated refuses, and says why."""
        input = annotated_evidence(claims, context)
        answers, sources = (references or References()).rego_data(claims.tee, claims.verified_at)
        asked = {name: query for name, query in _ALLOWANCES.items() if getattr(claims, name)}
        try:
            values = (self.engine or default_engine()).evaluate_all(
                self.text, input, {"reference": answers}, (TRUST_CLAIMS, EXTENSIONS, *asked.values())
            )
            trust = _trust(values.get(TRUST_CLAIMS, {}))
            extensions = _extensions(values.get(EXTENSIONS, []))
        except RegoError as error:
            failure = Failure(error.id, "policy", str(error.found), str(error.expected), error.remedy or error.message)
            return Appraisal(False, claims, (failure,), _MALFUNCTION)
        failures = [
            Failure(
                f"policy.{name}",
                name,
                "true",
                "false",
                f"the policy does not allow it by name: for development, say allow_{name} := true in it",
            )
            for name, query in asked.items()
            if values.get(query) is not True
        ]
        failures += self._not_affirming(trust, input, answers, sources)
        used = {bundle for key in rego_text.reference_keys(self.text) for bundle in sources.get(key, ())}
        good = Appraisal(True, claims, (), trust, tuple(sorted(used)), extensions)
        # The vector is the policy's own; only what it does not allow by name makes it worse.
        refused = good.refuse(failures)
        bare = [failure for failure in failures if failure.id in ("policy.simulated", "policy.debug")]
        return Appraisal(
            refused.accepted, claims, refused.failures, good.refuse(bare).trust, good.references, extensions
        )

    def _not_affirming(
        self,
        trust: TrustVector,
        input: Mapping[str, Any],
        answers: Mapping[str, Any],
        sources: Mapping[str, tuple[str, ...]],
    ) -> list[Failure]:
        failures = []
        for claim, value in trust.to_dict().items():
            if tier(value) <= Tier.AFFIRMING:
                continue
            conditions = rego_text.failing(self.text, claim.replace("-", "_"), input, answers)
            found = "; ".join(f"{one.text}: found {_show(one.found)}" for one in conditions)
            expected = "; ".join(_wanted(one, sources) for one in conditions)
            bundles = {bundle for one in conditions for bundle in sources.get(one.key or "", ())}
            missing = sorted({one.key for one in conditions if one.key is not None and one.key not in answers})
            failures.append(
                Failure(
                    f"policy.rego.{claim}",
                    claim,
                    meaning(claim, value) + (f": {found}" if found else ""),
                    "an affirming value" + (f": {expected}" if expected else ""),
                    f"register reference values for {', '.join(missing)}" if missing else _LOOK,
                    next(iter(bundles)) if len(bundles) == 1 else None,
                )
            )
        if not failures and trust.tier is not Tier.AFFIRMING:
            failures.append(
                Failure(
                    "policy.rego.no_claim",
                    "trust_claims",
                    "no claim is made",
                    "at least one affirming value",
                    f"the policy says nothing about evidence of {', '.join(set(input) & _TEES)}; {_LOOK}",
                )
            )
        return failures


_LOOK = "compare the claims with the policy's conditions; if the difference is meant, change the policy"
_TEES = {"sgx", "tdx", "snp"}
_MALFUNCTION = TrustVector(**dict.fromkeys(TrustVector.__dataclass_fields__, -1))


def attestation_policy(
    text: str,
    claims: Claims,
    references: References | None = None,
    *,
    context: Context | None = None,
    engine: RegoEngine | None = None,
) -> Appraisal:
    """Appraise authentic claims by a policy in Rego: the vector, every claim that is not affirming, extensions."""
    return RegoPolicy(text, engine=engine).judge(claims, references, context or Context())


@dataclass(frozen=True, slots=True)
class ResourceDecision:
    """What a resource policy says; true exactly if it allows."""

    allowed: bool
    failures: tuple[Failure, ...] = ()

    def __bool__(self) -> bool:
        return self.allowed


def resource_policy(
    text: str,
    ear_claims: Mapping[str, Any],
    path: str | Sequence[str],
    *,
    plugin: str = "resource",
    query: Mapping[str, str] | None = None,
    engine: RegoEngine | None = None,
) -> ResourceDecision:
    """Whether a policy releases a resource to the holder of a token. Only ``allow`` being ``true`` releases it.

    Args:
        ear_claims: of a verified token.
        path: ``repo/type/tag``, or its parts.
        plugin: ``resource``, or a plugin's name.
        query: of the request's URI.
    """
    parts = path.split("/") if isinstance(path, str) else list(path)
    data = {"plugin": plugin, "resource-path": parts, "query": dict(query or {})}
    try:
        value = (engine or default_engine()).evaluate(text, ear_claims, data, ALLOW)
    except RegoError as error:
        failure = Failure(error.id, "policy", str(error.found), str(error.expected), error.remedy or error.message)
        return ResourceDecision(False, (failure,))
    if value is True:
        return ResourceDecision(True)
    conditions = rego_text.failing(text, "allow", ear_claims, {})
    found = "; ".join(f"{one.text}: found {_show(one.found)}" for one in conditions)
    statuses = {
        name: submodule.get("ear.status")
        for name, submodule in ear_claims.get("submods", {}).items()
        if isinstance(submodule, Mapping)
    }
    return ResourceDecision(
        False,
        (
            Failure(
                "policy.rego.allow",
                "allow",
                ("false" if value is False else "undefined" if value is None else "not true")
                + f" for {plugin} {'/'.join(parts)}"
                + (f": {found}" if found else "")
                + f" (attestation: {', '.join(f'{name} {status}' for name, status in statuses.items()) or 'none'})",
                "true",
                "ask who administers the resource policy, or attest an enclave that it names",
            ),
        ),
    )


def _trust(value: Any) -> TrustVector:
    try:
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return TrustVector.from_dict(value)
    except ValueError as error:
        raise RegoError(
            "the policy's trust_claims are no trustworthiness vector",
            id="policy.rego.trust_claims",
            found=str(error),
            expected="an object of claims and numbers from -128 to 127",
            remedy="correct the policy",
        ) from None


#: What the token says itself, in an appraisal.
_OWN_NAMES = frozenset({"ear.status", "ear.trustworthiness-vector", "ear.appraisal-policy-id"})


def _extensions(value: Any) -> tuple[dict[str, Any], ...]:
    good = isinstance(value, list) and all(
        isinstance(one, dict)
        and set(one) == {"name", "key", "value"}
        and isinstance(one["name"], str)
        and one["name"] not in _OWN_NAMES
        and not one["name"].startswith("ear.veraison.")
        and isinstance(one["key"], int)
        and not isinstance(one["key"], bool)
        and -(1 << 31) <= one["key"] < 1 << 31
        for one in value
    )
    if not good:
        raise RegoError(
            "the policy's extensions cannot be put into a token",
            id="policy.rego.extensions",
            found=json.dumps(value)[:200],
            expected='a list of {"name": text, "key": a 32-bit number, "value": anything}, not by names of EAR itself',
            remedy="correct the policy",
        )
    return tuple(value)


def _wanted(condition: rego_text.Condition, sources: Mapping[str, tuple[str, ...]]) -> str:
    if condition.key is None:
        return _show(condition.expected)
    if condition.expected is None:
        return f"reference value {condition.key}, of which there is none"
    bundles = ", ".join(bundle[:12] for bundle in sources.get(condition.key, ()))
    return f"reference value {condition.key} {_show(condition.expected)} (bundle {bundles})"


def _show(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 400


def _check_size(policy: str) -> None:
    size = len(policy.encode(errors="replace"))
    if size > MAX_POLICY:
        raise RegoError(
            "the policy is too large", id="policy.rego.size", found=f"{size} bytes", expected=f"at most {MAX_POLICY}"
        )
    if "\0" in policy:
        # The engine would read the policy up to there.
        position = _position(policy, len(policy[: policy.index("\0")].encode(errors="replace")))
        raise RegoError(
            f"the policy cannot be compiled{position}",
            id="policy.rego.syntax",
            found="a NUL character",
            expected="text",
        )


def _limit(event: str, found: str, remedy: str) -> RegoError:
    return RegoError(
        "the policy was not evaluated to the end",
        id=f"policy.rego.{event}",
        found=found,
        expected=f"within the limits of {MAX_SECONDS:g} seconds and {MAX_MEMORY >> 20} MiB"
        if event in ("time", "memory")
        else None,
        remedy=remedy,
    )


def _crash() -> RegoError:
    return RegoError(
        "the Rego engine ended while it worked on the policy",
        id="policy.rego.crash",
        found="the engine's process is gone",
        expected="a result",
        remedy="write the policy without unusual constructs (`with input as input.x` is one that the engine dies of)",
    )


_ERROR = re.compile(r"\(error \d+:(?P<module>[^|]*)\|(?P<at>\d+)\|\d+")
_MESSAGE = re.compile(r"\(errormsg (?P<size>\d+):")
_NAMED = re.compile(r"(?:Function not found: |data\.policy\.)([A-Za-z_][A-Za-z0-9_.]*)")


def _error(policy: str, kind: str, text: str, limit: int) -> RegoError:
    """The engine's error with line and column, counted from 1."""
    if kind == "output":
        return RegoError(
            "the policy's result is too large",
            id="policy.rego.output",
            found=f"{text} bytes and more",
            expected=f"at most {limit}",
        )
    if kind == "unicode":
        return RegoError("there is text that is not Unicode", id="policy.rego.input", found="an unpaired surrogate")
    if kind == "depth":
        return RegoError("the policy is nested too deeply", id="policy.rego.syntax", found="over 900 levels")
    message = _MESSAGE.search(text)
    said = text[message.end() : message.end() + int(message["size"])] if message else text.strip() or "an error"
    conflict = said.endswith("<error>")
    if conflict:
        said = "a rule has two values at once, or a function fails"
    where = ""
    at = _ERROR.search(text)
    if at is not None and at["module"] == _POLICY:
        where = _position(policy, int(at["at"]))
    elif not conflict and (named := _NAMED.search(said)):
        offset = re.search(rf"\b{re.escape(named[1])}\b", rego_text.plain(policy))
        where = _position(policy, len(policy[: offset.start()].encode(errors="replace"))) if offset else ""
    static = kind == "syntax" or said.startswith(("Function not found", "Recursion detected"))
    return RegoError(
        f"the policy cannot be {'compiled' if static else 'evaluated'}{where}",
        id="policy.rego.syntax" if static else "policy.rego.evaluation",
        found=said[:400],
        expected="Rego (OPA 1.0)",
        remedy="correct the policy",
    )


def _position(policy: str, offset: int) -> str:
    before = policy.encode(errors="replace")[:offset].decode(errors="replace")
    line = before.count("\n") + 1
    return f" at line {line}, column {len(before) - before.rfind(chr(10))}"

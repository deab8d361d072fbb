"""The process that evaluates Rego for :mod:`inclavare.attestation.rego`: no environment, no privileges, no files.

rego-cpp runs in its own process because a policy is code of somebody who may not be trusted with this service: the
engine offers ``opa.runtime()`` (the process's environment), and it ends the process on some policies. This file is run
by its path and imports nothing of the package.

Each message is four bytes of length, big-endian, and JSON. Request: ``{"modules": [[name, text], …], "data": …,
"input": …, "queries": ["data.a.b", …], "max_output": bytes}``. Answer: ``{"values": {query: value}}``, undefined ones
absent, or ``{"error": kind, "text": …}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

#: Bytes of policies and data whose compiled forms are kept; these take some sixty times as much.
CACHED = 2 << 20
_PR_SET_NO_NEW_PRIVS = 38
_NOBODY = 65534


class _Refused(Exception):
    """``args``: kind and text."""


class _Evaluator:
    """Compiled policies, by everything that went into them."""

    def __init__(self) -> None:
        import regopy  # type: ignore[import-untyped]
        from regopy import rego_shared

        rego_shared.rego_set_default_log_level(rego_shared.LogLevel.NONE)
        self._interpreter = regopy.Interpreter
        self._shared = rego_shared
        self._bundles: OrderedDict[str, Any] = OrderedDict()
        self._cached = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            bundle = self._bundle(request)
            interpreter = self._interpreter()
            interpreter.set_input(_engine_form(request["input"]))
            return {"values": self._values(interpreter, bundle, request)}
        except _Refused as error:
            return {"error": error.args[0], "text": error.args[1]}
        except self._shared.RegoError as error:
            return {"error": "syntax", "text": str(error)}
        except RecursionError:
            return {"error": "depth", "text": ""}
        except UnicodeEncodeError:
            return {"error": "unicode", "text": ""}

    def _bundle(self, request: dict[str, Any]) -> Any:
        key = json.dumps([request["modules"], request["data"], request["queries"]])
        if key in self._bundles:
            self._bundles.move_to_end(key)
            return self._bundles[key]
        interpreter = self._interpreter()
        for name, text in request["modules"]:
            interpreter.add_module(name, text)
        interpreter.add_data_json(json.dumps(request["data"], ensure_ascii=False))
        bundle = interpreter.build(None, [_entrypoint(query) for query in request["queries"]])
        if not bundle.ok():
            raise _Refused("syntax", "the policy does not compile")
        self._bundles[key] = bundle
        self._cached += len(key)
        while self._cached > CACHED and len(self._bundles) > 1:
            self._cached -= len(self._bundles.popitem(last=False)[0])
        return bundle

    def _values(self, interpreter: Any, bundle: Any, request: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        left = int(request["max_output"])
        for query in request["queries"]:
            output = self._shared.rego_bundle_query_entrypoint(interpreter._impl, bundle._impl, _entrypoint(query))
            try:
                text = self._shared.rego_output_string(output)
                left -= len(text)
                if left < 0:
                    raise _Refused("output", str(len(text)))
                if text == "undefined":
                    continue
                if not self._shared.rego_output_ok(output) or not text.startswith('{"expressions":['):
                    raise _Refused("evaluation", f"{query}: {text[:500]}")
                # Not from the text: the engine prints what base64.decode and others give without escaping it.
                expressions = self._shared.rego_output_expressions_at_index(output, 0)
                values[query] = self._value(self._shared.rego_node_get(expressions, 0))
            finally:
                self._shared.rego_free_output(output)
        return values

    def _value(self, node: Any) -> Any:
        shared = self._shared
        kind = shared.rego_node_type(node).name
        if kind in ("Term", "Scalar"):
            return self._value(shared.rego_node_get(node, 0))
        if kind in ("Object", "Array", "Set"):
            children = [shared.rego_node_get(node, index) for index in range(shared.rego_node_size(node))]
            if kind != "Object":
                return [self._value(child) for child in children]
            return {
                str(self._value(shared.rego_node_get(item, 0))): self._value(shared.rego_node_get(item, 1))
                for item in children
            }
        text = shared.rego_node_value(node)
        if kind == "String":
            # Some functions' results are kept with the quotation marks around them.
            quoted = len(text) > 1 and text[0] == text[-1] == '"'
            with contextlib.suppress(ValueError):
                return json.loads(text if quoted else f'"{text}"')
            return text
        return json.loads(text)


def _engine_form(value: Any) -> Any:
    """A value as the engine keeps it: its strings are JSON's, escapes included. It takes and prints them unchanged, so
    that a quotation mark in a claim would otherwise write parts of the result."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)[1:-1]
    if isinstance(value, dict):
        return {_engine_form(name): _engine_form(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_engine_form(item) for item in value]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return float(value)
    return value


def _entrypoint(query: str) -> str:
    return query.removeprefix("data.").replace(".", "/")


def _confine() -> None:
    """Nothing that is needed from here on is more than memory and two pipes.

    Memory is watched by who waits for the answer: the engine's allocator reserves its address space at once.
    """
    Path("/proc/self/oom_score_adj").write_text("1000")
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 4),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _read(stream: BinaryIO) -> Any:
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(head, "big")))


def _answers_only() -> BinaryIO:
    """Standard output for answers; what the engine prints there itself goes nowhere."""
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return answers


def main() -> None:
    """Answer requests until standard input ends."""
    answers = _answers_only()
    evaluator = _Evaluator()
    # Once before the limits, so that nothing has to be opened afterwards.
    evaluator.answer(
        {"modules": [["w", "package w\nv := 1"]], "data": {}, "input": {}, "queries": ["data.w.v"], "max_output": 99}
    )
    _confine()
    answers.write(b"\0")  # ready
    answers.flush()
    while (request := _read(sys.stdin.buffer)) is not None:
        reply = json.dumps(evaluator.answer(request)).encode()
        answers.write(len(reply).to_bytes(4, "big") + reply)
        answers.flush()


if __name__ == "__main__":
    main()

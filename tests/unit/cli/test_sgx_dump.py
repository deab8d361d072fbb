"""sgx dump as a user calls it: a file or standard input, a table or JSON, the kind recognised or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inclavare.cli import main
from inclavare.cli.sgx import dump


def call(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["sgx", "dump", *map(str, arguments)], input=stdin)


def test_table(vectors: Path) -> None:
    result = call(vectors / "measure" / "fortanix_test_enclave.sig")
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert all(len(line) == 5 for line in lines)
    assert lines[0] == ["0", "16", "header", "06000000e10000000000010000000000", ""]
    assert ["20", "4", "date", "14121620", "2016-12-14"] in lines
    assert sum(int(line[1]) for line in lines) == 1808


def test_json_of_a_quote_on_standard_input(vectors: Path) -> None:
    raw = (vectors / "tdx" / "gotdx_quote_v5_sample.dat").read_bytes()
    result = call("-", "--json", stdin=raw)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["kind"] == "quote"
    assert b"".join(bytes.fromhex(field["value"]) for field in found["fields"]) == raw
    assert {"offset": 48, "size": 2, "field": "body_type", "value": "0300", "meaning": "TD report 1.5"} in found[
        "fields"
    ]


def test_certificate(vectors: Path) -> None:
    result = call(vectors / "collateral" / "intel_sgx_root_ca.der")
    assert "2049-12-31 23:59:59 UTC" in result.stdout
    assert "CN=Intel SGX Root CA" in result.stdout


def test_ambiguous_until_named(tmp_path: Path) -> None:
    path = tmp_path / "attributes"
    path.write_bytes(bytes.fromhex("05000000000000000700000000000000"))
    result = call(path)
    assert result.exit_code == 2
    assert "attributes, exinfo" in result.stderr
    result = call(path, "--json")
    assert json.loads(result.stdout)["error"]["id"] == "sgx.describe.ambiguous"
    result = call(path, "--as", "attributes")
    assert result.exit_code == 0
    assert "INIT MODE64BIT" in result.stdout
    assert call(path, "--as", "nothing").exit_code == 2


def test_damaged_structure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(bytes(303) + b"\0\1")
    assert call(path, "--as", "einittoken").exit_code == 7
    assert "304 bytes" in call(path, "--as", "einittoken").stderr


def test_a_terminal_shows_the_start_of_long_values(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dump._value(bytes(100)) == "00" * 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert dump._value(bytes(100)) == "00" * 24 + "…"
    assert dump._value(bytes(24)) == "00" * 24

"""What the low-level runtime is told for an enclave container: exec, unclear lines, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inclavare.enclave.manifest import Manifest
from inclavare.rune import launcher
from inclavare.rune.main import quote

MANIFEST = """
[process]
args = ["/bin/app"]
env = {PATH = "/bin"}
env_from_host = ["TZ"]
[exec]
commands = ["/bin/id"]
"""
#: Prints its arguments, and the process document where it gets one.
RUNTIME = """#!/bin/sh
printf '%s\\n' "$@"
for word; do case $word in /proc/self/fd/*) echo; cat $word;; esac; done
"""


class Node:
    """One enclave container named ``c1`` and one ordinary container, behind a runtime that says what it was told."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "root"
        (base / "runtime").write_text(RUNTIME)
        (base / "runtime").chmod(0o755)
        config = f'run_dir = "{base}/run"\nlog_dir = "{base}/log"\n[runtime]\nlow_level = "{base}/runtime"\n'
        (base / "config.toml").write_text(config)
        self.directory = base / "run/enclaves" / quote(str(self.root)) / "c1"
        self.directory.mkdir(parents=True)
        self.manifest(MANIFEST)

    def manifest(self, text: str) -> None:
        (self.directory / "manifest.json").write_bytes(Manifest.parse(text, "test").canonical())

    def rune(self, *words: str) -> subprocess.CompletedProcess[str]:
        program = "from inclavare.rune.main import main; main()"
        environment = {
            "PATH": os.environ["PATH"], "INCLAVARE_CONFIG": str(self.base / "config.toml"),
            "PYTHONPATH": str(Path(launcher.__file__).parents[2]),
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", program, "--root", self.root, *words],
            env=environment, cwd=self.base, capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    def told(self, *words: str) -> list[str]:
        done = self.rune(*words)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == ["--root", str(self.root)]
        return lines[2:]

    def refused(self, *words: str) -> str:
        done = self.rune(*words)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.rpartition("[")[2].strip("]\n")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_command_that_the_manifest_names(node: Node) -> None:
    words = ["exec", "--cwd", "/tmp", "-d", "c1", "/bin/id", "-u", "--", "--env", "x"]
    assert node.told(*words) == ["exec", "--cwd", "/tmp", "-d", "c1", "/bin/id", "-u", "--", "--env", "x"]
    assert node.refused("exec", "c1", "/bin/sh") == "admission.exec.refused"
    assert node.refused("exec", "c1") == "admission.exec.refused"


def test_variables_of_the_command_line_are_judged_like_the_configurations(node: Node) -> None:
    for form in (["-e", "LD_PRELOAD=/x"], ["--env=LD_PRELOAD=/x"], ["-eLD_PRELOAD=/x"], ["-e", "TZ=UTC", "-e", "LD_PRELOAD=/x"],
                 ["-e", "LD_PRELOAD=/x", "-e", "TZ=UTC"], ["--env", "PATH=/bin", "--env", "MODE=fast"]):  # fmt: skip
        assert node.refused("exec", *form, "c1", "/bin/id") == "admission.env.refused"
    told = node.told(
        "exec", "-e", "TZ=UTC", "--env=HOME=/evil", "-ePATH=/bin", "--env", "ENCLAVE_TYPE=x", "c1", "/bin/id"
    )
    assert told == ["exec", "--env", "TZ=UTC", "--env", "PATH=/bin", "c1", "/bin/id"]


def test_a_process_document(node: Node) -> None:
    document: dict[str, Any] = {"args": ["/bin/id"], "cwd": "/", "env": ["PATH=/bin", "ENCLAVE_TYPE=x", "TZ=UTC"]}

    def write(**changes: Any) -> None:
        (node.base / "c1").write_text(json.dumps({**document, **changes}))

    write()
    for form in (["--process", "c1"], ["--process=c1"], ["-p", "c1"], ["-pc1"]):  # named like the container
        told = node.told("exec", *form, "c1")
        assert told[:2] == ["exec", "--process"] and told[2].startswith("/proc/self/fd/") and told[3] == "c1"
        assert json.loads(told[-1]) == {**document, "env": ["PATH=/bin", "TZ=UTC"]}
    write(args=["/bin/sh"])
    assert node.refused("exec", "-p", "c1", "c1") == "admission.exec.refused"
    write(env=["LD_PRELOAD=/x"])
    assert node.refused("exec", "-p", "c1", "c1") == "admission.env.refused"
    for wrong in ({"args": "x"}, {"args": [1]}, {"env": [1]}, {"env": "x"}, {"args": None}):
        write(**wrong)
        assert node.refused("exec", "-p", "c1", "c1") == "rune.exec.process"
    for text in ("[]", "{", "[" * 100_000, ""):
        (node.base / "c1").write_text(text)
        assert node.refused("exec", "-p", "c1", "c1") == "rune.exec.process"
    assert node.refused("exec", "-p", "nowhere", "c1") == "rune.exec.process"


def test_a_line_that_is_not_clear_is_refused_where_it_may_be_for_an_enclave(node: Node) -> None:
    for words in (
        ["-tqe", "A=1", "c1", "sh"],
        ["--proc", "p.json", "c1"],
        ["--unknown", "x", "c1", "sh"],
        ["-env", "A", "c1", "sh"],
    ):
        assert node.refused("exec", *words) == "rune.usage"
    # The low-level runtime's own word on a line that is for none.
    assert node.told("exec", "--unknown", "other", "sh") == ["exec", "--unknown", "other", "sh"]
    assert node.told("exec", "other", "sh", "c1") == ["exec", "other", "sh", "c1"]


def test_an_enclave_that_has_ended(node: Node) -> None:
    (node.directory / "manifest.json").unlink()
    assert node.refused("exec", "c1", "/bin/id") == "rune.exec.stopped"


def test_a_manifest_that_is_damaged(node: Node) -> None:
    (node.directory / "manifest.json").write_text("{}")
    assert node.refused("exec", "c1", "/bin/id") == "enclave.manifest.damaged"


@pytest.mark.parametrize("words", [["checkpoint", "c1"], ["restore", "c1"]])
def test_memory_does_not_leave_the_enclave(node: Node, words: list[str]) -> None:
    assert node.refused(*words) == "rune.checkpoint.enclave"


@pytest.mark.parametrize("words", [
    ["frobnicate"], ["--frobnicate", "run", "x"], ["run", "--bundle"], ["run"], ["create", "-b", "/x"],
])  # fmt: skip
def test_usage(node: Node, words: list[str]) -> None:
    assert node.refused(*words) == "rune.usage"


@pytest.mark.parametrize("command", ["state", "run", "delete", "exec"])
@pytest.mark.parametrize("id", ["../x", "..", "a/b", ""])
def test_ids(node: Node, command: str, id: str) -> None:
    assert node.refused(command, id) == "rune.id.malformed"


def test_errors_stand_in_the_callers_log(node: Node) -> None:
    for form, read in (("json", lambda line: json.loads(line)["msg"]), ("text", str)):
        log = node.base / f"log.{form}"
        assert node.rune("--log", str(log), "--log-format", form, "exec", "c1", "sh").returncode == 1
        assert "admission.exec.refused" in read(log.read_text())

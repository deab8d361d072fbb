"""The documents say what the code does: tables are current, names exist, examples parse, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import click
import pytest

from inclavare import config
from inclavare.attestation.policy import Policy
from inclavare.cli import main as command_line
from inclavare.enclave.manifest import Manifest
from inclavare.rune.main import COMMANDS, OTHER_COMMANDS

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(REPO)) for path in DOCUMENTS]
_TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", REPO / "scripts/tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """scripts/tables.py."""
    return _tables()


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_current(tables: ModuleType, name: str) -> None:
    text = (REPO / name).read_text()
    if tables.render(text) != text:
        pytest.fail(f"{name} is stale: run .venv/bin/python scripts/tables.py")


def test_every_table_is_shown_somewhere(tables: ModuleType) -> None:
    shown = {name for path in DOCUMENTS for name in re.findall(r"<!-- table ([a-z-]+) -->", path.read_text())}
    assert shown == set(tables.TABLES)


def test_a_stale_table_is_noticed(tables: ModuleType) -> None:
    text = "<!-- table injected -->\nold\n<!-- end -->\n"
    assert "old" not in tables.render(text)


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_exist(name: str) -> None:
    missing = []
    for file, function in _TEST.findall((REPO / name).read_text()):
        path = REPO / "tests" / file
        if not path.exists() or not re.search(
            rf"^(?:    )?(?:async )?def {function}\(", path.read_text(), re.MULTILINE
        ):
            missing.append(f"{file}::{function}")
    assert missing == []


def test_the_threat_model_names_a_test_for_each_adversary() -> None:
    text = (REPO / "docs/threat-model.md").read_text()
    rows = re.findall(r"^\| The adversary \| Test \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(rows) >= 7
    for row in "".join(rows).splitlines():
        assert _TEST.search(row), row


def _anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path = REPO / name
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        to = path.parent / file if file else path
        if not to.exists() or (anchor and anchor not in _anchors(to.read_text())):
            broken.append(target)
    assert broken == []


def _command_lines(text: str) -> list[list[str]]:
    """Command lines of inclavare and rune in code blocks and code spans; comments and tables made from code left out."""
    text = re.sub(r"<!-- table .*?<!-- end -->", "", text, flags=re.DOTALL)
    blocks = re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    blocks += [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", text)
    lines = []
    for line in blocks + spans:
        for part in re.split(r" && |; | \| |\$\(", line.partition(" #")[0]):
            words = part.replace(".venv/bin/", "").split()
            if len(words) > 1 and words[0] in ("inclavare", "rune") and re.fullmatch(r"[-a-z]+", words[1]):
                try:
                    lines.append(shlex.split(part.replace(".venv/bin/", "")))
                except ValueError:
                    lines.append(words)
    return lines


def _wrong(words: list[str]) -> str:
    """What is wrong with a command line, or an empty string."""
    if words[0] == "rune":
        known = set(COMMANDS) | OTHER_COMMANDS
        word = next((w for i, w in enumerate(words[1:], 1) if w[0] != "-" and words[i - 1] != "--root"), "")
        return "" if not word or word in known else f"rune {word}"
    command: click.Command = command_line
    context = click.Context(command, info_name="inclavare")
    rest = words[1:]
    while isinstance(command, click.Group):
        while rest and rest[0].startswith("-"):
            rest = rest[1:]
        if not rest or not rest[0].islower():
            return ""
        found = command.get_command(context, rest[0])
        if found is None:
            return " ".join(words)
        command, rest = found, rest[1:]
    options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if re.fullmatch(r"--?[a-z][-a-z]*", option) and option not in options | {"--help"}:
            return f"{' '.join(words)}: {option}"
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name: str) -> None:
    assert [wrong for words in _command_lines((REPO / name).read_text()) if (wrong := _wrong(words))] == []


def test_wrong_commands_are_noticed() -> None:
    lines = _command_lines("    inclavare frobnicate x\n    inclavare verify a --no-such b\n`rune frobnicate`\n")
    assert [bool(_wrong(words)) for words in lines] == [True, True, True]
    assert not any(_wrong(w) for w in _command_lines("    inclavare secret put t --policy p\n    rune --root R list\n"))


@pytest.mark.parametrize("name", NAMES)
def test_examples_parse(name: str) -> None:
    for kind, block in re.findall(r"```toml (\S+)\n(.*?)```", (REPO / name).read_text(), re.DOTALL):
        if kind == "enclave.toml":
            Manifest.parse(block, name)
        elif kind == "policy":
            Policy.parse(block, name)
        else:
            assert kind == "config"
            shown = config._from_document(tomllib.loads(block), "defaults")
            assert shown == config.Config(signing_key=config.Config().node_signing_key)


def test_ids_of_messages_exist() -> None:
    source = "".join(path.read_text() for path in (REPO / "src/inclavare").rglob("*.py"))
    known = set(re.findall(r'id=f?"([^"]+)"', source)) | set(re.findall(r'"([a-z_]+\.[a-z_.]+)"', source))
    patterns = [re.sub(r"\\\{.*?\\\}", "[a-z_]+", re.escape(item)) for item in known]
    patterns += [f"policy\\.{key}" for key in re.findall(r'refuse\(\s*"(\w+)"', source)]
    rows = re.findall(r"^\| `([a-z_]+(?:\.[a-z_]+)+)` \|", (REPO / "docs/user-guide.md").read_text(), re.MULTILINE)
    assert len(rows) >= 15
    assert [row for row in rows if not any(re.fullmatch(pattern, row) for pattern in patterns)] == []


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        for words in re.findall(r"^ {4}make ([a-z ]+?)(?: {2,}|$)|`make ([a-z]+)", path.read_text(), re.MULTILINE):
            assert set("".join(words).split()) <= targets, (path, words)

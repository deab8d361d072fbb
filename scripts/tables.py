#!/usr/bin/env python3
"""Write what the code knows into the documents: the tables between ``<!-- table NAME -->`` and ``<!-- end -->``.

``.venv/bin/python scripts/tables.py`` rewrites docs/*.md; ``--check`` only says whether they are current.
tests/unit/test_docs.py fails where one is not.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from inclavare import config, errors
from inclavare.attestation import policy, verifiers
from inclavare.cli import _engines
from inclavare.cli import main as command_line
from inclavare.enclave import manifest, reference
from inclavare.rune import main as rune
from inclavare.runelet import admission
from inclavare.runtimes import base as runtimes
from inclavare.shield import attestfs
from inclavare.tee import base as tee
from inclavare.verdict import config as verdictd

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE = Path(errors.__file__).parent
_REGION = re.compile(r"(<!-- table ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(headers)
    lines = ["| " + " | ".join(cells) + " |" for cells in ([*map(_cell, row)] for row in rows)]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) + "\n"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("``", "`")


def code(values: Iterable[object]) -> str:
    """Values as code, separated by commas."""
    return ", ".join(f"`{value}`" for value in values) or "–"


def described(what: Mapping[str, str], known: Iterable[str]) -> list[tuple[str, str]]:
    """Each thing that the code knows with its description; refuses a missing and a stale one."""
    names = list(known)
    if set(names) != set(what):
        sys.exit(f"scripts/tables.py: describe {sorted(set(names) ^ set(what))}")
    return [(name, what[name]) for name in names]


def attributes(kind: type) -> dict[str, str]:
    """The ``Attributes:`` of a class's docstring."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


# --- what a container asks for ----------------------------------------------------------------------------------------

_VARIABLES = {
    "ENCLAVE_TYPE": "asks for an enclave on that TEE platform",
    "ENCLAVE_DEBUG": "`1`, `true` or `yes`: a debug enclave, for an image that is measured at first use; refused for "
    "an image that was signed as a production enclave",
    "ENCLAVE_RUNTIME_PATH": "a PAL enclave runtime: refused, this version has none",
    "RUNE_CARRIER": "a LibOS carrier (`occlum`, `graphene`): refused, this version has none",
    "ENCLAVE_RUNTIME_ARGS": "no effect: arguments of a PAL enclave runtime",
    "ENCLAVE_RUNTIME_LOGLEVEL": "no effect: log level of a PAL enclave runtime",
    "ENCLAVE_RA_TYPE": "no effect: quotes are ECDSA quotes",
}
_PLATFORMS = {
    "sgx": "Intel SGX hardware. Its evidence is verified; its driver is there but **has not run on hardware yet**, and "
    "the `native` enclave runtime refuses it, where it would protect nothing",
    "sgx-sim": "software, a **simulation**: real formats, no protection against the host's root",
}
_RUNTIMES = {
    "native": "the application runs on the host's kernel, in what the runelet shields; its memory is not enclave memory"
}


def variables() -> str:
    """ENCLAVE_* variables and annotations."""
    rows = described(_VARIABLES, admission.ENCLAVE_VARIABLES)
    return table(
        ("Variable", "Annotation", "Effect"),
        ((f"`{name}`", f"`{name.lower().replace('_', '.')}`", text) for name, text in rows),
    )


def platforms() -> str:
    """TEE platforms."""
    spellings = {name: [name, *(alias for alias, of in tee.ALIASES.items() if of == name)] for name in tee.NAMES}
    return table(
        ("TEE platform", "Values of `ENCLAVE_TYPE`", "Verifier", "What it is"),
        (
            (f"`{name}`", code(spellings[name]), "yes" if name in verifiers._MODULES else "no", text)
            for name, text in described(_PLATFORMS, tee.NAMES)
        ),
    )


def enclave_runtimes() -> str:
    """Enclave runtimes."""
    rows = described(_RUNTIMES, runtimes.NAMES)
    return table(("Enclave runtime", "What it is"), ((f"`{name}`", text) for name, text in rows))


# --- rune -------------------------------------------------------------------------------------------------------------

_ALTERED = {
    "create": "the manifest is applied, the enclave is loaded, then forwarded with the derived configuration",
    "run": "like `create`, and the container is started",
    "state": "forwarded; the bundle as the caller named it, annotations `org.inclavare.*` added",
    "exec": "checked against the manifest's `[exec]`, then forwarded",
    "delete": "forwarded, then whatever of the enclave is still there is removed",
    "checkpoint": "refused: memory and keys must not leave the enclave",
    "restore": "refused",
}
_OTHER = {
    "list": "forwarded; bundles of enclave containers as their callers named them",
    "spec": "forwarded",
    "features": "the low-level runtime's document where it has one, with rune's annotations",
    "help": "rune's own",
}


def rune_commands() -> str:
    """The OCI runtime's commands."""
    altered = dict(described(_ALTERED, sorted(rune.ALTERED, key=list(rune.COMMANDS).index)))
    rows = []
    for name, options in rune.COMMANDS.items():
        own = "runc's format, made by rune for crun's containers" if name == "events" else "forwarded"
        rows.append((f"`{name}`", own, altered.get(name, own), code(sorted(options))))
    rows += [(f"`{name}`", text, text, "–") for name, text in described(_OTHER, sorted(rune.OTHER_COMMANDS))]
    return table(("Command", "Ordinary container", "Enclave container", "Options that take a value"), rows)


def rune_options() -> str:
    """The OCI runtime's global options."""
    return table(
        ("Kind", "Options"),
        (
            ("with a value", code(sorted(rune.VALUE_OPTIONS))),
            ("without", code(sorted(rune.FLAG_OPTIONS | {"--help", "--version"}))),
        ),
    )


# --- what the host may add --------------------------------------------------------------------------------------------


def mounts() -> str:
    """Mounts that need no entry in the manifest."""
    rows = [(f"`{path}`", ", ".join(sorted(kinds))) for path, kinds in admission._STANDARD.items()]
    rows += [(f"`{path}`", "bind, **untrusted contents**") for path in sorted(admission._ENGINE_FILES)]
    return table(("Destination", "Types"), rows)


def injected() -> str:
    """Variables that engines add and that are dropped."""
    return code(admission.INJECTED) + "\n"


def attestation_files() -> str:
    """/dev/attestation."""
    rows = []
    for number, (name, mode) in attestfs._FILES.items():
        size = f"{attestfs._SIZES[number]} bytes" if number in attestfs._SIZES else "the platform's"
        rows.append((f"`{name.decode()}`", f"{mode:04o}", size, "no" if name == b"collateral" else "yes"))
    for name, key in attestfs._SEALING.values():
        rows.append((f"`keys/{name.decode()}` (seal key, policy {key})", "0400", f"{attestfs.KEY_SIZE} bytes", "yes"))
    rows.append(("`keys/default`", "0600", f"0 or {attestfs.KEY_SIZE} bytes", "yes"))
    rows.append(("`secrets/NAME`", "0400", "the secret's", "no"))
    for name in attestfs._TRANSACTIONS.values():
        rows.append((f"`{name.decode()}` (a request is written, its answer read)", "0600", "0", "no"))
    return table(("File below `/dev/attestation`", "Mode", "Size", "In Gramine"), rows)


def engines() -> str:
    """Container engines."""
    return table(
        ("Engine", "File that `inclavare install` writes", "Then", "Use"),
        ((e.name, f"`{e.config}`", e.reload, f"`{e.use}`") for e in _engines.ENGINES.values()),
    )


# --- files that people write ------------------------------------------------------------------------------------------

_VALUES = {
    "enclave.size": "multiple of 4096, 1M to 1T",
    "enclave.threads": "1 to 4096",
    "enclave.debug": "true, false",
    "enclave.isv_prod_id": "0 to 65535",
    "enclave.isv_svn": "0 to 65535",
    "enclave.tee": "list of TEE platforms",
    "enclave.runtime": "name",
    "process.args": "list of strings",
    "process.env": "table of strings",
    "process.env_from_host": "list of names; `*` and `?` match as in a shell",
    "process.args_from_host": "true, false",
    "process.cwd": "path",
    "process.user": "user",
    "process.hooks": "list of lists",
    "files.trusted": "list of paths",
    "files.allowed": "list of paths below /",
    "files.tmpfs": "list of paths below /",
    "files.encrypted": "tables with `path` and `key`",
    "attestation.verdictd": "string",
    "attestation.trust_anchor": "string",
    "attestation.policy": "string",
    "exec.commands": "list of strings and lists",
    "secrets.uri": "`kbs:///repository/type/tag`",
    "secrets.path": "path below /",
    "secrets.env": "name",
    "secrets.required": "true, false",
}
_SECTION_TYPES: dict[str, Any] = {
    "enclave": manifest.EnclaveSection,
    "process": manifest.ProcessSection,
    "files": manifest.FilesSection,
    "attestation": manifest.AttestationSection,
    "exec": manifest.ExecSection,
    "secrets": manifest.Secret,
}
_PRESET = {
    "files.trusted": "verified paths; a path outside them does not exist",
    "files.allowed": "paths on which the host may mount; what is there is not verified",
    "files.tmpfs": "paths on which the host may mount a tmpfs",
    "files.encrypted": "directories kept encrypted; see below",
}


def manifest_keys() -> str:
    """The keys of enclave.toml."""
    readers = {**manifest._SECTIONS, "secrets": manifest._SECRET}
    values = dict(described(_VALUES, (f"{section}.{key}" for section, keys in readers.items() for key in keys)))
    rows = []
    for section, keys in readers.items():
        kind = _SECTION_TYPES[section]
        for key in keys:
            name = f"{section}.{key}"
            default = kind._field_defaults.get(key, "needed")
            text = _PRESET.get(name) or attributes(kind)[key]
            title = f"`[[secrets]]` `{key}`" if section == "secrets" else f"`[{section}]` `{key}`"
            rows.append((title, values[name], _default(key, default), text.rstrip(".")))
    return table(("Key", "Value", "Default", "Meaning"), rows)


def _default(key: str, value: Any) -> str:
    if value == "needed":
        return "needed"
    if key == "size":
        return f'`"{value >> 20}M"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    if isinstance(value, Mapping):
        return "`{}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def policy_keys() -> str:
    """The keys of an appraisal policy, from its module's own example."""
    block = literal(policy.__doc__ or "")
    found = re.findall(r"^(\w+) = (.*?) +# (.*)$", block, re.MULTILINE)
    if [name for name, _, _ in found] and {name for name, _, _ in found} != set(policy._KEYS):
        sys.exit("scripts/tables.py: the docstring of attestation/policy.py does not name every key")
    tees = literal((policy.__doc__ or "").partition("::\n")[2])
    head = table(("Key", "Example", "Meaning"), ((f"`{name}`", f"`{value}`", text) for name, value, text in found))
    return f"{head}\nTrust domains and SEV-SNP guests have tables of their own:\n\n```toml\n{tees}```\n"


def tcb_statuses() -> str:
    """TCB statuses that a policy may name."""
    return code(policy.TCB_STATUSES) + "\n"


def configuration() -> str:
    """The node's configuration file, from its module's own example."""
    return f"```toml config\n{literal(config.__doc__ or '')}```\n"


def verdictd_configuration() -> str:
    """verdictd.toml, from its module's own example."""
    return f"```toml\n{literal(verdictd.__doc__ or '')}```\n"


def literal(text: str) -> str:
    """The literal block of a docstring (after ``::``)."""
    block = inspect.cleandoc(text).partition("::\n")[2]
    lines = []
    for line in block.strip("\n").splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


# --- what comes out ---------------------------------------------------------------------------------------------------

_EVENTS = {
    "enclave.started": "EINIT succeeded and everything is mounted: TEE platform, MRENCLAVE, debug, EPC pages",
    "enclave.ended": "the enclave is destroyed; `reason` is `container ended`, `helper died`, `guard died`, "
    "`start refused` or `fault`",
    "shield.tree.violation": "a file of the host differs from what was measured: `path`, `reason`; once for each path",
    "shield.encrypted.died": "a gocryptfs process ended; the container is killed",
    "shield.server.fault": "an unexpected error of a FUSE server, with its trace: a defect, report it",
    "runelet.process.died": "the runelet ended before its container; the container is killed",
    "runelet.process.stuck": "the runelet did not end within 5 seconds and was killed",
    "runelet.fault": "an unexpected error during the start, with its trace: a defect, report it",
    "guard.create.abandoned": "the creation failed or was interrupted; everything is taken back",
    "guard.meta.unwritable": "the container's `meta.json` could not be written (full disk)",
    "guard.fault": "an unexpected error of the guard: a defect, report it",
    "secret.released": "verdictd released a secret of the manifest: `uri`",
    "secret.renewed": "a secret changed at verdictd, and its file with it: `uri`",
    "secret.refused": "a secret of the manifest was refused or could not be had: `uri`, `reason`, `found`",
    "secret.refresh.fault": "an unexpected error while secrets were fetched again: a defect, report it",
    "guest_api.started": "the in-guest REST interface of Confidential Containers answers in the container's network",
    "guest_api.off": "it does not, and why",
    "guest_api.refused": "somebody outside of the container asked it",
    "guest_api.fault": "an unexpected error of it: a defect, report it",
    "rune.run.interrupted": "a foreground `run` was killed; its container is killed",
}


def events() -> str:
    """Every event that the code logs."""
    levels: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    given = [word.value for word in node.keywords if word.arg == "level"]
                    constant = given and isinstance(given[0], ast.Constant)
                    levels[str(first.value)] = str(ast.literal_eval(given[0])) if constant else "info"
                    if given and not constant:
                        levels[str(first.value)] = "warning or error"
    rows = described(_EVENTS, [name for name in _EVENTS if name in levels] + sorted(levels.keys() - _EVENTS.keys()))
    return table(("Event", "Level", "Meaning"), ((f"`{name}`", levels[name], text) for name, text in rows))


def exit_codes() -> str:
    """Exit codes of the inclavare command."""
    kinds = sorted(errors.InclavareError.__subclasses__(), key=lambda kind: kind.exit_code)
    rows = [("0", "–", "done; of `verify` and `attest`: authentic and accepted")]
    rows.append(("1", "`InclavareError`", "another error, or a defect"))
    rows += [(str(kind.exit_code), f"`{kind.__name__}`", (kind.__doc__ or "").strip().rstrip(".")) for kind in kinds]
    return table(("Code", "Class", "Meaning"), rows)


def references() -> str:
    """How images are named on the command line."""
    return code([*(f"{name}:" for name in reference.TRANSPORTS), "DIRECTORY"]) + "\n"


# --- the command line -------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command of ``inclavare``, as click knows it."""
    context = click.Context(command_line, info_name="inclavare")
    return "\n".join(_commands(command_line, context))


def _commands(group: click.Group, context: click.Context) -> list[str]:
    out: list[str] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            out += _commands(command, inner)
        else:
            out.append(_command(command, inner))
    return out


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"### {context.command_path}\n", f"    {usage}\n", _help(command.help or "")]
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1] and "--help" not in parameter.opts:
            rows.append((f"`{record[0]}`", record[1]))
    if rows:
        parts.append(table(("Option", ""), rows))
    return "\n".join(parts)


def _help(text: str) -> str:
    """Click's help text as Markdown: a paragraph after ``\\b`` keeps its lines."""
    out = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        first, *rest = paragraph.split("\n")
        if first.strip() == "\b":
            out.append("\n".join(f"    {line}" for line in rest))
        else:
            out.append(" ".join(paragraph.split()))
    return "\n\n".join(out) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "variables": variables,
    "platforms": platforms,
    "enclave-runtimes": enclave_runtimes,
    "rune-commands": rune_commands,
    "rune-options": rune_options,
    "mounts": mounts,
    "injected": injected,
    "attestation-files": attestation_files,
    "engines": engines,
    "manifest-keys": manifest_keys,
    "policy-keys": policy_keys,
    "tcb-statuses": tcb_statuses,
    "configuration": configuration,
    "verdictd-configuration": verdictd_configuration,
    "events": events,
    "exit-codes": exit_codes,
    "references": references,
    "commands": commands,
}


def render(text: str) -> str:
    """A document with its tables made anew."""
    return _REGION.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Write the documents, or check them."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text()
        after = render(before)
        if before != after:
            stale.append(path.name)
            if not check:
                path.write_text(after)
    print(f"{'stale' if check else 'wrote'}: {', '.join(stale) or 'none'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

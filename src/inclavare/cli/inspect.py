"""``inclavare inspect``: show manifest, identity, SIGSTRUCT and files of an enclave image."""

from __future__ import annotations

import json
from typing import Any

import click

from ._enclaves import (
    built_by_other_code,
    image_of,
    read_stored,
    require_stored,
    sigstruct_fields,
    tls_option,
    tree_statistics,
)
from ._output import Steps, json_option, note, print_fields, print_json, print_table, printable, size


@click.command("inspect")
@click.argument("source")
@click.option("--files", is_flag=True, help="List the measured file tree.")
@tls_option
@json_option
def command(source: str, files: bool, tls_verify: bool, as_json: bool) -> None:
    """Show what the enclave image SOURCE carries in /.inclavare, without unpacking its other files."""
    from hashlib import sha256

    from ..enclave.programs import work_directory
    from ..enclave.reference import Reference
    from ..sgx.measure import measure

    with Steps() as steps, work_directory() as work:
        found = require_stored(read_stored(Reference.parse(source), work, steps, tls_verify=tls_verify), source)
    tree = found.tree
    tree.verify_root(tree.root)
    if files:
        _list_files(tree, as_json=as_json)
        return
    manifest = found.manifest
    mrenclave = measure(image_of(manifest, tree.root))
    identity: dict[str, Any] = {
        "mrenclave": mrenclave.hex(),
        "tree_root": tree.root.hex(),
        "manifest_digest": sha256(found.manifest_json).hexdigest(),
    }
    signed = sigstruct_fields(found.sigstruct) if found.sigstruct is not None else None
    if signed is not None:
        signed["over_this_enclave"] = signed["enclave_hash"] == mrenclave.hex()
    document = {
        "source": source,
        "identity": identity,
        "manifest": manifest.to_dict(),
        "sigstruct": signed,
        "tree": tree_statistics(tree),
        "build": _informative(found.build),
    }
    other = built_by_other_code(found)
    if other is not None:
        note(f"MRENCLAVE is this inclavare's, not the builder's: {other}")
    if as_json:
        print_json(document)
        return
    print_fields([(name.replace("_", " "), value) for name, value in identity.items()], title="Identity")
    click.echo()
    print_fields(_flat(document["manifest"]), title="Manifest")
    click.echo()
    if signed is None:
        click.echo("Not signed (inclavare sign)")
    else:
        print_fields([(name.replace("_", " "), value) for name, value in signed.items()], title="SIGSTRUCT")
    click.echo()
    numbers = dict(document["tree"])
    numbers["bytes"] = size(numbers["bytes"])
    print_fields(numbers.items(), title="File tree")


def _informative(build: bytes) -> Any:
    try:
        return json.loads(build) if build else None
    except ValueError:
        return None


def _flat(document: Any) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for section, values in document.items():
        if isinstance(values, dict):
            rows += [(f"{section}.{key}", json.dumps(value, ensure_ascii=False)) for key, value in values.items()]
        else:
            rows.append((section, json.dumps(values, ensure_ascii=False)))
    return rows


def _list_files(tree: Any, *, as_json: bool) -> None:
    import stat
    from datetime import UTC, datetime

    from ..enclave.tree import FILE_TYPES

    if as_json:
        print_json(
            [
                {
                    "path": path.decode("utf-8", "backslashreplace"),
                    "kind": node.kind,
                    "mode": f"{node.mode:04o}",
                    "uid": node.uid,
                    "gid": node.gid,
                    "size": node.size,
                    "mtime_ns": node.mtime_ns,
                    **({"target": node.target.decode("utf-8", "backslashreplace")} if node.kind == "l" else {}),
                    **({"rdev": list(node.rdev)} if node.kind in "cb" else {}),
                    "digest": node.digest.hex(),
                }
                for path, node in tree.walk()
            ]
        )
        return

    def when(nanoseconds: int) -> str:
        try:
            return datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M")
        except (ValueError, OverflowError, OSError):
            return "?"

    print_table(
        ("mode", "owner", "size", "modified (UTC)", "path", "digest"),
        (
            (
                stat.filemode(FILE_TYPES[node.kind] | node.mode),
                f"{node.uid}:{node.gid}",
                f"{node.rdev[0]},{node.rdev[1]}" if node.kind in "cb" else node.size,
                when(node.mtime_ns),
                printable(path) + (f" -> {printable(node.target)}" if node.kind == "l" else ""),
                node.digest.hex()[:16],
            )
            for path, node in tree.walk()
        ),
    )

"""``inclavare sgx cmp``: what differs between two enclaves: attributes, pages, signature, manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .._output import Steps, json_option, note, print_json, print_table
from ._enclave_files import libpal_option, open_enclave

#: What a table has room for; --json shows all.
_SHOWN = 40
_WIDTH = 64


@click.command("cmp")
@click.argument("left")
@click.argument("right")
@libpal_option
@json_option
def command(*, left: str, right: str, libpal: Path | None, as_json: bool) -> None:
    """Compare two enclaves: .sgxs streams, SDK enclaves, Gramine manifests, or two enclave images of containers.

    Shows the fields of SECS and SIGSTRUCT and the pages that differ; of enclave images the keys of the manifest and the
    files. Exit code 0: none differ, 1: some do.
    """
    with Steps() as steps:
        files = [Path(name) for name in (left, right)]
        compare = _files if all(path.is_file() for path in files) else _images
        result = compare(left, right, libpal, steps)
    same = not any(result.values())
    if as_json:
        print_json({"same": same, **result})
    else:
        _show(result)
    click.get_current_context().exit(0 if same else 1)


def _files(left: str, right: str, libpal: Path | None, steps: Steps) -> dict[str, list[dict[str, Any]]]:
    from ...sgx import compare

    enclaves = [open_enclave(Path(name), None, libpal) for name in (left, right)]
    steps.stage("comparing pages")
    one, other = (enclave.image() for enclave in enclaves)
    result = {
        "secs": [asdict(field) for field in compare.secs_fields(one, other)],
        "pages": [asdict(pages) for pages in compare.pages(one, other)],
    }
    signed = [enclave.sigstruct for enclave in enclaves]
    if signed[0] is not None and signed[1] is not None:
        result["sigstruct"] = [asdict(field) for field in compare.sigstruct_fields(signed[0], signed[1])]
    elif signed != [None, None]:
        missing = enclaves[signed.index(None)].path
        note(f"{missing} has no SIGSTRUCT; signatures are not compared")
    if enclaves[0].kind == enclaves[1].kind == "gramine":
        import tomllib

        documents = [tomllib.loads(enclave.path.read_text()) for enclave in enclaves]
        result["manifest"] = _keys(*documents)
    return result


def _images(left: str, right: str, _: Path | None, steps: Steps) -> dict[str, list[dict[str, Any]]]:
    from ...enclave.image import native_image, runtime_digest
    from ...enclave.programs import work_directory
    from ...enclave.reference import Reference
    from ...sgx import compare
    from ...sgx.structs import Sigstruct
    from .._enclaves import differences, read_stored, require_stored

    found = []
    with work_directory() as work:
        for number, name in enumerate((left, right)):
            place = work / str(number)
            place.mkdir()
            found.append(require_stored(read_stored(Reference.parse(name), place, steps, tls_verify=True), name))
    one, other = found
    steps.stage("comparing")
    for stored in found:
        stored.tree.verify_root(stored.tree.root)
    images = [native_image(stored.manifest, stored.tree.root, runtime_digest()) for stored in found]
    result = {
        "secs": [asdict(field) for field in compare.secs_fields(*images)],
        "manifest": _keys(*(json.loads(stored.manifest.canonical()) for stored in found)),
        "files": [{"name": line} for line in differences(one.tree, other.tree, limit=1 << 20)]
        if one.tree.root != other.tree.root
        else [],
        "built by": _keys(*(_built(stored.build) for stored in found)),
    }
    if one.sigstruct is not None and other.sigstruct is not None:
        signed = [Sigstruct.from_bytes(raw) for raw in (one.sigstruct, other.sigstruct)]
        result["sigstruct"] = [asdict(field) for field in compare.sigstruct_fields(*signed)]
    elif one.sigstruct != other.sigstruct:
        note(f"{left if one.sigstruct is None else right} is not signed; signatures are not compared")
    return result


def _built(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _keys(left: Any, right: Any) -> list[dict[str, Any]]:
    """Keys of two documents whose values differ, dotted."""
    flat = [dict(_flat(document)) for document in (left, right)]
    return [
        {"name": key, "left": flat[0].get(key), "right": flat[1].get(key)}
        for key in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(key) != flat[1].get(key)
    ]


def _flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(document, list) and any(isinstance(item, dict) for item in document):
        for number, value in enumerate(document):
            yield from _flat(value, f"{prefix}[{number}]")
    else:
        yield prefix, document


def _show(result: dict[str, list[dict[str, Any]]]) -> None:
    if not any(result.values()):
        click.echo("the same")
        return
    for part, rows in result.items():
        if not rows:
            continue
        if part == "pages":
            shown = [(_range(row), row["what"], _hex(row["left"]), _hex(row["right"])) for row in rows[:_SHOWN]]
            print_table(("PAGES", "DIFFERENCE", "LEFT", "RIGHT"), shown, title="pages")
        elif part == "files":
            click.secho("files", bold=True)
            for row in rows[:_SHOWN]:
                click.echo(f"  {row['name']}")
        else:
            values = [(str(row["name"]), _value(row["left"]), _value(row["right"])) for row in rows[:_SHOWN]]
            print_table((part.upper(), "LEFT", "RIGHT"), values, title=part)
        if len(rows) > _SHOWN:
            note(f"{len(rows) - _SHOWN} more; --json shows all")


def _range(row: dict[str, Any]) -> str:
    end = row["offset"] + row["count"] * 4096
    return f"{row['offset']:#x}–{end:#x} ({row['count']})"


def _hex(value: int) -> str:
    return f"{value:#x}" if value else ""


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"

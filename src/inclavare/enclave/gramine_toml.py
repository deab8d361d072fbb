"""TOML as Gramine's signing tool writes it (with ``tomli_w``).

MRENCLAVE covers a ``.manifest.sgx`` byte for byte, so two signers agree only if they also write it alike: values before
tables, four spaces of indentation in arrays, tables in one line only where all of an array fit into 100 columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_COLUMNS = 100
_INDENT = "    "
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPED = re.compile(r'[\x00-\x08\x0a-\x1f\x7f"\\]')
_SHORT = {"\b": "\\b", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def dumps(document: Mapping[str, Any]) -> str:
    """A document of the types that ``tomllib`` returns."""
    blocks = list(_blocks(document, "", in_array=False))
    return "\n".join(block for block in blocks if block)


def _blocks(table: Mapping[str, Any], name: str, *, in_array: bool) -> Iterator[str]:
    """A table's own lines, and then each table in it."""
    values, tables = [], []
    for key, value in table.items():
        if isinstance(value, Mapping):
            tables.append((key, value, False))
        elif _needs_tables(value):
            tables += [(key, item, True) for item in value]
        else:
            values.append(f"{_key(key)} = {_value(value, 0)}\n")
    header = f"[[{name}]]\n" if in_array else f"[{name}]\n" if name and (values or not tables) else ""
    yield header + "".join(values)
    for key, value, repeated in tables:
        yield from _blocks(value, f"{name}.{_key(key)}" if name else _key(key), in_array=repeated)


def _needs_tables(value: Any) -> bool:
    """Whether it is an array of tables of which not each fits into a line."""
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        return False
    lines = [f"{_INDENT}{_inline(item)}," for item in value]
    return any(len(line) > _COLUMNS or "\n" in line for line in lines)


def _value(value: Any, depth: int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return _inline(value)
    if isinstance(value, list):
        if not value:
            return "[]"
        items = "".join(f"{_INDENT * (depth + 1)}{_value(item, depth + 1)},\n" for item in value)
        return f"[\n{items}{_INDENT * depth}]"
    return str(value)


def _inline(table: Mapping[str, Any]) -> str:
    if not table:
        return "{}"
    return "{ " + ", ".join(f"{_key(key)} = {_value(value, 0)}" for key, value in table.items()) + " }"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return '"' + _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text) + '"'

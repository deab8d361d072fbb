"""What the text of a policy in Rego tells without evaluating it: its rules, and which of their conditions fail.

Rego says that a rule is undefined, not why. Conditions like ``input.a.b in query_reference_value("k")`` and
``input.a.b == 1`` can be looked at one by one; about others nothing is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|`[^`]*`|#[^\n]*', re.DOTALL)
_HEAD = re.compile(r"^(?:default\s+)?([A-Za-z_][A-Za-z0-9_]*)", re.MULTILINE)
_PATH = re.compile(r'input(?:\.[A-Za-z_][A-Za-z0-9_]*|\["[^"\]]+"\])+')
_STEP = re.compile(r'\.([A-Za-z_][A-Za-z0-9_]*)|\["([^"\]]+)"\]')
_CONDITION = re.compile(
    rf"^(?P<path>{_PATH.pattern})\s*(?P<operator>==|!=|>=|<=|>|<|in)\s*"
    r'(?:query_reference_value\(\s*"(?P<key>[^"]+)"\s*\)|(?P<value>"[^"]*"|-?[0-9]+|true|false))$'
)
_KEY = re.compile(r'query_reference_value\(\s*"([^"]+)"\s*\)')
_KEYWORDS = frozenset({"package", "import", "else"})
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda left, right: left == right and type(left) is type(right),
    "!=": lambda left, right: left != right,
    ">=": lambda left, right: left >= right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
    "in": lambda left, right: isinstance(right, list) and any(left == item for item in right),
}


def plain(text: str) -> str:
    """The text without comments; lines and columns stay what they are."""
    return _TOKEN.sub(lambda found: " " * len(found[0]) if found[0][0] == "#" else found[0], text)


def package(text: str) -> str | None:
    """The name of the package."""
    found = re.search(r"^\s*package\s+([A-Za-z0-9_.]+)", plain(text), re.MULTILINE)
    return found[1] if found else None


def rules(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the rules; ``else`` belongs to the rule before it."""
    code = plain(text)
    # Brackets and rule names inside strings are none.
    bare = _TOKEN.sub(lambda found: "s" * len(found[0]), code)
    depth, starts = 0, []
    for position, char in enumerate(bare):
        if depth == 0 and (position == 0 or bare[position - 1] == "\n"):
            head = _HEAD.match(bare, position)
            if head and head[1] not in _KEYWORDS:
                starts.append((head[1], position))
        depth += (char in "{[(") - (char in "}])")
    ends = [start for _, start in starts[1:]] + [len(code)]
    for (name, start), end in zip(starts, ends, strict=False):
        yield name, code[start:end]


def defines(text: str, rule: str) -> bool:
    """Whether there is such a rule."""
    return any(name == rule for name, _ in rules(text))


@lru_cache(maxsize=64)
def reference_keys(text: str) -> tuple[str, ...]:
    """Names of the reference values that a text asks for."""
    return tuple(dict.fromkeys(_KEY.findall(plain(text))))


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition of a rule that does not hold.

    Attributes:
        text: as it stands.
        found: the value in the input; ``None`` if it is absent.
        key: name of the reference value that it is compared with, if any.
        expected: what it is compared with; ``None`` if there is none.
    """

    text: str
    found: Any
    key: str | None
    expected: Any


def failing(text: str, rule: str, input: Mapping[str, Any], references: Mapping[str, Any]) -> list[Condition]:
    """Conditions of a rule, and of rules that it refers to, that do not hold for an input.

    Only alternatives count that are about what the input has: one that begins with ``input.snp`` says nothing about a
    trust domain.
    """
    known = list(rules(text))
    names = {name for name, _ in known}
    found: dict[str, Condition] = {}
    todo, seen = [rule], {rule}
    while todo:
        current = todo.pop()
        for name, body in known:
            if name != current or body.startswith("default"):
                continue
            lines = [line.strip() for line in re.split(r"[\n;]", body)]
            guards = [line for line in lines if _PATH.fullmatch(line)]
            if any(_lookup(input, guard) is None for guard in guards):
                continue
            for line in lines:
                condition = _failing(line, input, references)
                if condition is not None:
                    found.setdefault(condition.text, condition)
                called = line.removeprefix("not ").strip()
                if called in names and called not in seen:
                    seen.add(called)
                    todo.append(called)
    return list(found.values())


def _failing(line: str, input: Mapping[str, Any], references: Mapping[str, Any]) -> Condition | None:
    match = _CONDITION.match(line)
    if match is None:
        return None
    value = _lookup(input, match["path"])
    expected = json.loads(match["value"]) if match["key"] is None else references.get(match["key"])
    try:
        holds = value is not None and expected is not None and _OPERATORS[match["operator"]](value, expected)
    except TypeError:
        holds = False
    return None if holds else Condition(line, value, match["key"], expected)


def _lookup(input: Mapping[str, Any], path: str) -> Any:
    value: Any = input
    for dotted, quoted in _STEP.findall(path):
        name = dotted or quoted
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value

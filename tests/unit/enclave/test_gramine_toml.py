"""TOML as tomli_w writes it: known output, and what is read back is what was written."""

from __future__ import annotations

import datetime
import tomllib

from hypothesis import given
from hypothesis import strategies as st

from inclavare.enclave import gramine_toml

DOCUMENT = {
    "title": 'quote " and \\ and \n and \x01 and é',
    "numbers": [1, 2.5, True, [], [1, [2]]],
    "day": datetime.date(2026, 1, 2),
    "only tables": {"a": {"b": {}}},
    "short": [{"uri": "file:x"}, {"uri": "file:y", "n": {}}],
    "long": [{"uri": "file:" + "x" * 90}, {"uri": "y", "more": {"k": 1}}],
    "nested": [{"list": [1]}],
}
#: tomli_w 1.0.0 and 1.2.0 write this.
WRITTEN = """\
title = "quote \\" and \\\\ and \\n and \\u0001 and é"
numbers = [
    1,
    2.5,
    true,
    [],
    [
        1,
        [
            2,
        ],
    ],
]
day = 2026-01-02
short = [
    { uri = "file:x" },
    { uri = "file:y", n = {} },
]

["only tables".a.b]

[[long]]
uri = "file:LONG"

[[long]]
uri = "y"

[long.more]
k = 1

[[nested]]
list = [
    1,
]
""".replace("LONG", "x" * 90)


def test_known_output() -> None:
    assert gramine_toml.dumps(DOCUMENT) == WRITTEN
    assert gramine_toml.dumps({}) == ""


values = st.recursive(
    st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values, max_size=4))
def test_what_is_written_is_read_back(document: dict[str, object]) -> None:
    assert tomllib.loads(gramine_toml.dumps(document)) == document

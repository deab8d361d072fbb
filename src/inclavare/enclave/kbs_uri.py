"""``kbs://`` URIs: what manifests and applications call a key broker's resources."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from ..errors import UsageError

_URI = re.compile(r"kbs(?:\+(?P<plugin>[a-z0-9_-]+))?://[^/\s]*/(?P<path>[^?#\s]+)(?:\?(?P<query>[^#\s]*))?")


class Resource(NamedTuple):
    """What a ``kbs://`` URI names; its host is ignored, as in Confidential Containers.

    Attributes:
        plugin: ``resource``, or the name after ``kbs+``.
        path: its parts, decoded.
        query: as written.
    """

    plugin: str
    path: tuple[str, ...]
    query: str = ""

    @classmethod
    def parse(cls, uri: str) -> Resource:
        """Read ``kbs[+plugin]://[host]/a/b/c[?query]``.

        Raises:
            UsageError: ``kbs.uri``.
        """
        found = _URI.fullmatch(uri)
        parts = tuple(unquote(part) for part in found["path"].split("/")) if found else ()
        if found is None or any(part in ("", ".", "..") or "/" in part or not part.isprintable() for part in parts):
            raise UsageError(
                "not a resource of a key broker", id="kbs.uri", found=uri, expected="kbs:///repository/type/tag"
            )
        return cls(found["plugin"] or "resource", parts, found["query"] or "")

    @property
    def request_path(self) -> str:
        """Behind ``/kbs/v0/``."""
        path = "/".join(quote(part, safe="") for part in (self.plugin, *self.path))
        return f"{path}?{self.query}" if self.query else path

    @property
    def name(self) -> str:
        """A file name, ``repository%2Ftype%2Ftag``; the ``%`` tells it from the names of what was released by hand."""
        text = "/".join(self.path) + (f"?{self.query}" if self.query else "")
        return quote(text if self.plugin == "resource" else f"kbs+{self.plugin}:/{text}", safe="")

"""One row of an annotated dump."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A field.

    Attributes:
        offset: in bytes, from the start of the structure, quote or (DER) certificate.
        value: its bytes as they stand there.
        field: name, with the names of the structures around it.
        meaning: in words; empty if there is nothing to say.
    """

    offset: int
    value: bytes
    field: str
    meaning: str = ""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "offset": self.offset,
            "size": len(self.value),
            "field": self.field,
            "value": self.value.hex(),
            "meaning": self.meaning,
        }

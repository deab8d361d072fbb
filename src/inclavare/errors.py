"""One base class for every refusal: what was found, what was expected, and what to do about it.

Each error carries a structured id ``component.sub.event`` that stands unchanged in logs, in ``--json`` output
and in the audit trail, so that a message may be reworded without breaking those who watch for it.
"""

from __future__ import annotations

from typing import Any, ClassVar


class InclavareError(Exception):
    """A refusal that a person can act on.

    Args:
        message: one sentence, without a trailing full stop.
        id: structured id, ``component.sub.event``.
        found: what was seen, if that is not a secret.
        expected: what would have been accepted.
        remedy: what the reader can do.
    """

    #: Process exit code of every command that ends with this error.
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        id: str = "inclavare.error",
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.id = id
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON-ready values, for ``--json`` output and control sockets."""
        return {
            "id": self.id,
            "message": self.message,
            "found": None if self.found is None else str(self.found),
            "expected": None if self.expected is None else str(self.expected),
            "remedy": self.remedy,
            "exit_code": self.exit_code,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> InclavareError:
        """Rebuild an error that crossed a socket; unknown exit codes become the base class."""
        by_code = {sub.exit_code: sub for sub in InclavareError.__subclasses__() if sub.__module__ == __name__}
        kind = by_code.get(int(fields.get("exit_code", 1)), InclavareError)
        return kind(
            str(fields.get("message", "unknown error")),
            id=str(fields.get("id", "inclavare.error")),
            found=fields.get("found"),
            expected=fields.get("expected"),
            remedy=fields.get("remedy"),
        )

    def one_line(self) -> str:
        """Everything in a single line, for runtimes' log files and container engines' error messages."""
        parts = [self.message]
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        text = ": ".join(parts[:1]) + ("" if len(parts) == 1 else " (" + ", ".join(parts[1:]) + ")")
        if self.remedy:
            text += f". {self.remedy[:1].upper()}{self.remedy[1:]}"
        return f"{text} [{self.id}]"


class UsageError(InclavareError):
    """The command line, a configuration file or a manifest is wrong."""

    exit_code = 2


class AppraisalError(InclavareError):
    """Evidence is authentic, but a policy refuses it."""

    exit_code = 3


class EvidenceError(InclavareError):
    """Evidence is damaged, forged, expired or from a root that is not trusted."""

    exit_code = 4


class PlatformError(InclavareError):
    """The machine lacks what was asked for (a TEE, a driver, a program)."""

    exit_code = 5


class ResourceError(InclavareError):
    """EPC, disk or another limited resource is used up."""

    exit_code = 6


class IntegrityError(InclavareError):
    """A file, tree, SIGSTRUCT or page differs from what was measured or signed."""

    exit_code = 7


class PolicyError(InclavareError):
    """The host asked for something that the measured manifest does not allow."""

    exit_code = 8

"""Groups of commands: one file per command, imported only when it is called.

A command ``do-this`` is the module ``do_this`` of the group's package, whose docstring begins with
````inclavare [group] do-this``: what it does`` and whose attribute ``command`` is the click command. A package is a
group of its own. The list in ``--help`` comes from these docstrings.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click


class Commands(click.Group):
    """Finds commands by their files.

    Args:
        package: the package whose modules are the commands.
    """

    def __init__(self, *args: Any, package: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._package = package
        self._directory = Path(str(import_module(package).__file__)).parent

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every module and package that does not begin with an underscore."""
        found = [path.stem for path in self._directory.glob("[!_]*.py")]
        found += [path.parent.name for path in self._directory.glob("[!_]*/__init__.py")]
        return sorted(name.replace("_", "-") for name in found)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f".{cmd_name.replace('-', '_')}", self._package).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        rows = [(name, self.summary(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def summary(self, name: str) -> str:
        """What a command does, from the first line of its file."""
        path = self._directory / f"{name.replace('-', '_')}.py"
        if not path.exists():
            path = path.with_suffix("") / "__init__.py"
        with path.open(encoding="utf-8") as handle:
            text = handle.readline().strip().strip('"').partition(": ")[2].rstrip(".")
        return text[:1].upper() + text[1:]

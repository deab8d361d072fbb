"""``inclavare completion``: print the completion script of a shell."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  inclavare completion bash > /etc/bash_completion.d/inclavare
    zsh:   inclavare completion zsh > "${fpath[1]}/_inclavare"
    fish:  inclavare completion fish > ~/.config/fish/completions/inclavare.fish
    """
    from click.shell_completion import get_completion_class

    from . import main

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(main, {}, "inclavare", "_INCLAVARE_COMPLETE")
    # Not source(): that would insist on a bash on this machine.
    click.echo(made.source_template % made.source_vars())

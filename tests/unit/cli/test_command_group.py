"""The command's frame: lazy commands, errors, exit codes, completion."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from inclavare.cli import _Main, _output, main
from inclavare.errors import InclavareError, IntegrityError, PlatformError

NAMES = main.list_commands(click.Context(main))  # type: ignore[attr-defined]


def test_every_file_is_a_command() -> None:
    assert {"build", "measure", "sign", "inspect", "completion"} <= set(NAMES)
    for name in NAMES:
        command = main.get_command(click.Context(main), name)  # type: ignore[attr-defined]
        assert command is not None and command.name == name
        assert command.help
        assert main.summary(name), f"{name}: the file's first line must say what it does"


def test_help_lists_commands_without_importing_them() -> None:
    code = (
        "import sys; sys.argv = ['inclavare', '--help']\n"
        "from inclavare.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.startswith(('inclavare.', 'cryptography', 'rich', 'dcap'))), file=sys.stderr)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 2
    assert done.stderr.strip() == "['inclavare.cli', 'inclavare.cli._group']"
    for name in NAMES:
        assert f"  {name} " in done.stdout


def test_wrong_usage_is_json_too() -> None:
    done = CliRunner().invoke(main, ["verify", "--json"], prog_name="inclavare")
    error = json.loads(done.output)["error"]
    assert (done.exit_code, error["id"], error["remedy"]) == (2, "cli.usage", "see inclavare verify --help")
    assert "EVIDENCE" in error["message"]
    done = CliRunner().invoke(main, ["sgx", "no-such", "--json"], prog_name="inclavare")
    assert (done.exit_code, json.loads(done.output)["error"]["remedy"]) == (2, "see inclavare sgx --help")


def _with(error: Exception) -> click.Group:
    @click.group(cls=_Main, package="inclavare.cli")
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @click.command("fail")
    @_output.json_option
    def fail(as_json: bool) -> None:
        raise error

    group.get_command = lambda ctx, name: fail if name == "fail" else None  # type: ignore[method-assign]
    return group


ERROR = IntegrityError("it differs", id="a.b.c", found="x", expected="y", remedy="do z")


def test_errors_say_what_to_do() -> None:
    result = CliRunner().invoke(_with(ERROR), ["fail"])
    assert result.exit_code == 7
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "inclavare: it differs",
        "  found:    x",
        "  expected: y",
        "  remedy:   do z",
        "  id:       a.b.c",
    ]


def test_errors_as_json() -> None:
    result = CliRunner().invoke(_with(PlatformError("no", id="p")), ["fail", "--json"])
    assert result.exit_code == 5
    assert json.loads(result.stdout)["error"] == PlatformError("no", id="p").to_dict()
    assert result.stderr == ""


def test_debug_shows_where() -> None:
    result = CliRunner().invoke(_with(ERROR), ["--debug", "fail"])
    assert result.exception is ERROR


def test_defects_are_not_hidden() -> None:
    result = CliRunner().invoke(_with(ZeroDivisionError("oops")), ["fail"])
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: oops" in result.stderr
    assert "--debug" in result.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["build"], ["build", "--nonsense"], ["--nonsense"]])
def test_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_INCLAVARE_COMPLETE" in result.stdout


def test_completion_completes() -> None:
    code = "import sys; sys.argv = ['inclavare']; from inclavare.cli import main; main(prog_name='inclavare')"
    environment = {"_INCLAVARE_COMPLETE": "bash_complete", "COMP_WORDS": "inclavare me", "COMP_CWORD": "1"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["plain,measure"]


def test_bash_accepts_the_script(tmp_path: Path) -> None:
    script = tmp_path / "inclavare"
    script.write_text(CliRunner().invoke(main, ["completion", "bash"]).stdout)
    subprocess.run(["bash", "-n", script], check=True)


def test_names_of_an_image_cannot_steer_a_terminal() -> None:
    assert _output.printable(b"a\x1b[31m\n\xffb") == "a\\x1b[31m\\n\\xffb"
    assert _output.printable("grün".encode()) == "grün"


def test_sizes() -> None:
    assert [_output.size(value) for value in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with _output.Steps() as steps:
        steps.stage("one")
        steps.total(10)
        steps.advance(10)
        steps.stage("two")
    assert capsys.readouterr().err == "one …\ntwo …\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    """Run under a pseudo-terminal: bar and its end on standard error, nothing on standard output."""
    import os
    import pty

    code = (
        "from inclavare.cli._output import Steps\nimport time\n"
        "with Steps() as s:\n s.stage('hashing [b]x'); s.total(4); s.advance(2); time.sleep(0.3); s.advance(2)"
    )
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=slave,
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    shown = os.read(master, 1 << 16).decode(errors="replace")
    os.close(master)
    assert "hashing [b]x" in shown
    assert done.stdout == b""


def test_every_error_class_has_its_own_exit_code() -> None:
    codes = [sub.exit_code for sub in InclavareError.__subclasses__()]
    assert set(codes) == {2, 3, 4, 5, 6, 7, 8}

"""What many tests of the store need."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from inclavare.errors import InclavareError
from inclavare.verdict.store import Store

ALICE, BOB = "aa" * 32, "bb" * 32


def refused(id: str, call: Callable[..., Any], *arguments: Any, **more: Any) -> InclavareError:
    """The refusal with this id; what it says to the user is complete."""
    with pytest.raises(InclavareError) as caught:
        call(*arguments, **more)
    assert caught.value.id == id, caught.value.one_line()
    return caught.value


def tamper(store: Store, statement: str, **values: Any) -> int:
    """Change rows as somebody with the database's password would, triggers switched off."""
    with store.database.engine.connect() as connection:
        if store.database.sqlite:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            triggers = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").all()
            for name, _ in triggers:
                connection.exec_driver_sql(f"DROP TRIGGER {name}")
        else:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        run = connection.execute(sa.text(statement), values) if values else connection.exec_driver_sql(statement)
        changed = run.rowcount
        if store.database.sqlite:
            for _, sql in triggers:
                connection.exec_driver_sql(sql)
        connection.commit()
    return changed


PRELUDE = """
import os, signal, sys
from pathlib import Path
from inclavare.verdict.store import *
from inclavare.verdict.store import backup as backups
url, key_file, *arguments = sys.argv[1:]
def die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
def ready():
    print("ready", flush=True)
    sys.stdin.readline()
store = Store.open(url, FileKey.load(Path(key_file)))
"""


def replica(url: str, key_file: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that opened the store and runs a script; ``die()`` in it is ``kill -9``."""
    source = PRELUDE + textwrap.dedent(script)
    command = [sys.executable, "-c", source, url, str(key_file), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(*replicas: subprocess.Popen[str]) -> None:
    """Let replicas go on that came to ``ready()`` in their script."""
    for process in replicas:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    # They wrote nothing since, which the pipe's reader here could have taken and lost.
    for process in replicas:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def killed(process: subprocess.Popen[str]) -> str:
    """What a replica wrote before it was killed."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return output


def done(process: subprocess.Popen[str]) -> str:
    """What a replica wrote that came to its end."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def in_threads(work: Callable[[int], object], count: int) -> None:
    """Do it so many times at once."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def go(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors

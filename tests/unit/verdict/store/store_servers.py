"""A real PostgreSQL for tests: a server of their own in a temporary directory, on a Unix socket."""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest


@dataclass
class PostgreSQL:
    """A running server."""

    directory: Path
    binaries: Path
    user: str
    prefix: list[str]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, name: str) -> str:
        return f"postgresql://{self.user}@/{name}?host={self.directory}"

    def create(self, *, template: str = "template0", encoding: str = "UTF8") -> str:
        """A new database; its name."""
        name = f"verdict_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} ENCODING '{encoding}'")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        with psycopg.connect(host=str(self.directory), user=self.user, dbname=database, autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def control(self, *arguments: str) -> None:
        command = [*self.prefix, str(self.binaries / "pg_ctl"), "-w", "-D", str(self.directory / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)

    def start(self, *options: str) -> None:
        settings = ["listen_addresses=", f"unix_socket_directories={self.directory}", "max_connections=200", *options]
        self.control("-l", str(self.directory / "log"), "-o", " ".join(f"-c {item}" for item in settings), "start")

    def stop(self, mode: str = "immediate") -> None:
        self.control("-m", mode, "stop")


@contextmanager
def postgresql(*options: str) -> Iterator[PostgreSQL]:
    """A server for as long as the block lasts; skipped with the reason where there is none."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or [shutil.which("initdb") or ""]
    if not found[-1]:
        pytest.skip("PostgreSQL's server is not installed (initdb)")
    prefix: list[str] = []
    directory = Path(tempfile.mkdtemp(prefix="pg", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    user = pwd.getpwuid(os.geteuid()).pw_name
    try:
        if os.geteuid() == 0:
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            os.chown(directory, owner.pw_uid, owner.pw_gid)
            user, prefix = "postgres", ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        server = PostgreSQL(directory, Path(found[-1]).parent, user, prefix)
        command = [found[-1], "-D", str(directory / "data"), "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run([*prefix, *command], check=True, stdout=subprocess.DEVNULL, timeout=120)
        server.start(*options)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)

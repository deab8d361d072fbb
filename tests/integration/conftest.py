"""The engines as fixtures, one instance a module, and rune as installed from this tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Containerd, Docker, Podman, Workspace
from runebox import RuneBox, need

from inclavare.cli import _engines
from inclavare.rune import launcher


@pytest.fixture(scope="session")
def rune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher of this tree's rune, for the interpreter that runs the tests."""
    return launcher.write(tmp_path_factory.mktemp("bin") / "rune")


@pytest.fixture
def box(tmp_path: Path, rune: Path) -> Iterator[RuneBox]:
    """A node of its own; whatever a test leaves running fails it."""
    need("crun", "runc", "gocryptfs", "fusermount3", "busybox")
    made = RuneBox(tmp_path, rune)
    yield made
    for path in made.root.glob("*"):
        made.call("delete", "--force", path.name)
    assert made.settled() == []


def _opened(
    make: Callable[[], Docker | Containerd | Podman], work: Workspace
) -> Iterator[Docker | Containerd | Podman]:
    try:
        engine = make()
    except BaseException:
        work.close()
        raise
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def docker(rune: Path) -> Iterator[Docker]:
    """dockerd, configured as ``inclavare install docker`` does it."""
    need("dockerd", "docker", "containerd", "busybox")
    work = Workspace("docker")
    yield from _opened(lambda: Docker(work, _engines.docker_add("", str(rune))), work)  # type: ignore[misc]


@pytest.fixture(scope="module")
def containerd(rune: Path) -> Iterator[Containerd]:
    """containerd, configured as ``inclavare install containerd`` does it, the shim's wrapper on its PATH."""
    need("containerd", "ctr", "umoci", "skopeo", "busybox")
    work = Workspace("ctr")
    prefix = work.root / "local"
    for change in _engines.install(
        _engines.ENGINES["containerd"], rune, config=work.root / "containerd.toml", prefix=prefix
    ):
        change.write()
    config = (work.root / "containerd.toml").read_text()
    path = f"{prefix}/bin:{work.env['PATH']}"
    yield from _opened(lambda: Containerd(work, config, PATH=path), work)  # type: ignore[misc]


@pytest.fixture(scope="module")
def podman(rune: Path) -> Iterator[Podman]:
    """podman, configured as ``inclavare install podman`` does it."""
    need("podman", "conmon", "busybox")
    work = Workspace("podman")
    # podman hands the runtime an environment of its own: the configuration of these tests goes in by a wrapper.
    wrapper = work.root / "rune"
    wrapper.write_text(f'#!/bin/sh\nINCLAVARE_CONFIG="{work.env["INCLAVARE_CONFIG"]}" exec "{rune}" "$@"\n')
    wrapper.chmod(0o755)
    yield from _opened(lambda: Podman(work, _engines.podman_add("", str(wrapper))), work)  # type: ignore[misc]

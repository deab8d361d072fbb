"""rune in the engines' configuration: everything else in a file stays, and uninstall gives back what was there."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from inclavare.cli import _engines as engines
from inclavare.cli import main
from inclavare.errors import InclavareError, PlatformError, UsageError

RUNE = Path("/opt/inclavare/bin/rune")
CRI2 = "io.containerd.grpc.v1.cri"
CRI3 = "io.containerd.cri.v1.runtime"

DAEMON_JSON = (
    '{\n  "debug": true,\n  "runtimes": {"kata": {"path": "/usr/bin/kata"}},\n  "log-opts": {"max-size": "1m"}\n}\n'
)
CONTAINERD_2 = """\
# the operator's own words
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause:3.9" # pinned
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
[timeouts]
  "io.containerd.timeout.shim.load" = "5s"
"""
CONTAINERD_INLINE = (
    'version = 2\n[plugins]\n"io.containerd.grpc.v1.cri" = {containerd = {runtimes = {kata = {runtime_type = "k"}}}}\n'
)
CONTAINERD_3 = f"""\
version = 3
[plugins.'{CRI3}'.containerd]
  default_runtime_name = 'runc'
"""
CONTAINERS_CONF = (
    '[engine]\nruntime = "crun" # ours\n[engine.runtimes]\ncrun = [\n  "/usr/bin/crun",\n]\n[network]\nx = 1\n'
)


def install(name: str, path: Path, tmp_path: Path, rune: Path = RUNE) -> list[engines.Change]:
    changes = engines.install(engines.ENGINES[name], rune, config=path, prefix=tmp_path / "prefix")
    for change in changes:
        change.write()
    return changes


def uninstall(name: str, path: Path, tmp_path: Path) -> list[engines.Change]:
    changes = engines.uninstall(engines.ENGINES[name], config=path, prefix=tmp_path / "prefix")
    for change in changes:
        change.write()
    return changes


def tree(directory: Path) -> dict[str, Any]:
    """Every file below a directory: content or link target, mode, owner."""
    out: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        out[str(path.relative_to(directory))] = (content, status.st_mode, status.st_uid, status.st_gid)
    return out


SAMPLES = [
    ("docker", DAEMON_JSON),
    ("docker", "{}"),
    ("containerd", CONTAINERD_2),
    ("containerd", CONTAINERD_INLINE),
    ("containerd", CONTAINERD_3),
    ("containerd", "version = 2\n"),
    ("podman", CONTAINERS_CONF),
    ("podman", '[engine]\nruntimes = {crun = ["/usr/bin/crun"]}\n'),
    ("podman", "engine.runtimes.crun = ['/usr/bin/crun']\n"),
]


@pytest.mark.parametrize(("name", "text"), SAMPLES)
def test_install_then_uninstall_gives_back_every_byte(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "etc" / "file"
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o640)
    before = tree(tmp_path / "etc")
    assert install(name, path, tmp_path)
    assert engines.ENGINES[name].current(path.read_text()) == str(RUNE)
    assert path.with_name("file.inclavare-backup").read_text() == text
    assert path.stat().st_mode & 0o7777 == 0o640
    assert install(name, path, tmp_path) == [], "a second install changes nothing"
    assert uninstall(name, path, tmp_path)
    assert tree(tmp_path / "etc") == before
    assert not [p for p in (tmp_path / "prefix").rglob("*") if not p.is_dir()]
    assert uninstall(name, path, tmp_path) == []


@pytest.mark.parametrize("name", ["docker", "containerd", "podman"])
def test_a_missing_file_is_made_and_removed_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / "etc" / "deep" / "file"
    install(name, path, tmp_path)
    assert engines.ENGINES[name].current(path.read_text()) == str(RUNE)
    assert path.stat().st_mode & 0o7777 == 0o644
    uninstall(name, path, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if not p.is_dir()]


@pytest.mark.parametrize(("name", "text"), SAMPLES)
def test_a_file_changed_since_loses_only_our_keys(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    install(name, path, tmp_path)
    if name == "docker":
        document = json.loads(path.read_text())
        document["later"] = "kept"
        path.write_text(json.dumps(document))
    else:
        path.write_text("# later\n" + path.read_text())
    uninstall(name, path, tmp_path)
    left = path.read_text()
    if name == "docker":
        assert json.loads(left) == {**json.loads(text), "later": "kept"}
    else:
        assert left.startswith("# later\n")
        assert tomllib.loads(left) == tomllib.loads(text)
    assert "rune" not in left.replace("runtimes", "")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"], "no stale backup stays"


def test_docker_keeps_other_runtimes_and_indentation() -> None:
    new = engines.docker_add(DAEMON_JSON, "/r")
    assert json.loads(new) == {
        "debug": True,
        "runtimes": {"kata": {"path": "/usr/bin/kata"}, "rune": {"path": "/r"}},
        "log-opts": {"max-size": "1m"},
    }
    assert new.startswith('{\n  "debug"')


def test_containerd_entry_takes_the_cgroup_driver_of_runc_and_keeps_comments() -> None:
    new = engines.containerd_add(CONTAINERD_2, "/r")
    assert tomllib.loads(new)["plugins"][CRI2]["containerd"]["runtimes"]["rune"] == {
        "runtime_type": "io.containerd.runc.v2",
        "options": {"BinaryName": "/r", "SystemdCgroup": True},
    }
    assert new.startswith(CONTAINERD_2), "nothing before our table is touched"


def test_another_rune_replaces_the_first_and_the_backup_stays_the_original(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONTAINERD_2)
    install("containerd", path, tmp_path)
    install("containerd", path, tmp_path, Path("/elsewhere/rune"))
    assert engines.containerd_current(path.read_text()) == "/elsewhere/rune"
    assert path.with_name("config.toml.inclavare-backup").read_text() == CONTAINERD_2
    link = tmp_path / "prefix" / engines.SHIM_DIRECTORY / "runc"
    assert link.readlink() == Path("/elsewhere/rune")
    uninstall("containerd", path, tmp_path)
    assert path.read_text() == CONTAINERD_2


def test_containerd_version_3_with_imports_gets_a_drop_in(tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    main.write_text(f'imports = ["{tmp_path}/conf.d/*.toml"]\n' + CONTAINERD_3)
    text = main.read_text()
    install("containerd", main, tmp_path)
    drop_in = tmp_path / "conf.d" / "50-rune.toml"
    assert main.read_text() == text
    document = tomllib.loads(drop_in.read_text())
    assert document["version"] == 3
    assert document["plugins"][CRI3]["containerd"]["runtimes"]["rune"]["options"] == {"BinaryName": str(RUNE)}
    assert install("containerd", main, tmp_path) == []
    uninstall("containerd", main, tmp_path)
    assert main.read_text() == text
    assert not drop_in.exists()


def test_containerd_version_2_with_imports_is_edited_itself(tmp_path: Path) -> None:
    # containerd 1.x would replace the whole CRI section by an imported one.
    main = tmp_path / "config.toml"
    main.write_text(
        'imports = ["/etc/containerd/conf.d/*.toml"]\n' + CONTAINERD_2.replace("# the operator's own words\n", "")
    )
    install("containerd", main, tmp_path)
    assert engines.containerd_current(main.read_text()) == str(RUNE)


def test_shim_wrapper_puts_rune_in_the_place_of_runc(tmp_path: Path) -> None:
    rune = tmp_path / "rune"
    rune.write_text("#!/bin/sh\necho this is rune\n")
    rune.chmod(0o755)
    install("containerd", tmp_path / "config.toml", tmp_path, rune)
    stock = tmp_path / "bin" / "containerd-shim-runc-v2"
    stock.parent.mkdir()
    stock.write_text('#!/bin/sh\necho "$@"; exec runc\n')
    stock.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "prefix" / "bin" / engines.SHIM_NAME, "-namespace", "a b"],
        env={"PATH": f"{stock.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-namespace a b\nthis is rune\n"


MALFORMED = [
    ("docker", '{"a": 1,}', "line 1"),
    ("docker", "[]", "not a JSON object"),
    ("docker", '{"runtimes": []}', "runtimes"),
    ("containerd", "version = 2\n[plugins\n", "line 2"),
    ("containerd", 'version = 2\nplugins = "x"\n', "plugins"),
    ("containerd", "[plugins.cri]\nx = 1\n", "version 1"),
    ("containerd", "version = 99\n", "version 99"),
    ("podman", "[engine]\nruntimes = 3\n", "engine.runtimes"),
    ("podman", "[engine\n", "line 1"),
]


@pytest.mark.parametrize(("name", "text", "named"), MALFORMED)
def test_a_malformed_file_is_named_and_not_touched(name: str, text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "etc" / "file"
    path.parent.mkdir()
    path.write_text(text)
    for action in (install, uninstall):
        with pytest.raises(UsageError) as caught:
            action(name, path, tmp_path)
        assert str(path) in caught.value.message
        assert named in caught.value.message
        assert caught.value.remedy
    assert path.read_text() == text
    assert [p.name for p in tmp_path.rglob("*")] == ["etc", "file"]


def test_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="UTF-8"):
        install("docker", path, tmp_path)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text(DAEMON_JSON)
    link = tmp_path / "daemon.json"
    link.symlink_to("real.json")
    install("docker", link, tmp_path)
    assert link.is_symlink()
    assert engines.docker_current(real.read_text()) == str(RUNE)
    uninstall("docker", link, tmp_path)
    assert link.is_symlink()
    assert real.read_text() == DAEMON_JSON


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InclavareError) as caught:
        install("docker", tmp_path / "file" / "daemon.json", tmp_path)
    assert "daemon.json" in caught.value.message


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(DAEMON_JSON)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlatformError, match="No space left"):
        install("docker", path, tmp_path)
    assert path.read_text() == DAEMON_JSON
    assert list(tmp_path.iterdir()) == [path]


def test_dry_run_shows_a_diff_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(DAEMON_JSON)
    (change,) = engines.install(engines.ENGINES["docker"], RUNE, config=path, prefix=tmp_path)
    assert f'+      "path": "{RUNE}"' in change.diff()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == DAEMON_JSON


def test_rune_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rune").write_text("")
    for wrong in (tmp_path / "rune", tmp_path / "none", tmp_path):
        with pytest.raises(UsageError) as caught:
            engines.rune_path(wrong)
        assert caught.value.remedy


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(document=st.dictionaries(st.text().filter(lambda k: k != "runtimes"), json_values, max_size=5))
def test_any_docker_configuration_survives(document: dict[str, Any]) -> None:
    text = json.dumps(document, ensure_ascii=False)
    added = engines.docker_add(text, "/r")
    assert json.loads(added) == {**document, "runtimes": {"rune": {"path": "/r"}}}
    assert engines.docker_add(added, "/r") == added
    removed = engines.docker_remove(added)
    assert (json.loads(removed) if removed else {}) == document


toml_keys = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
toml_values = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    lambda inner: st.dictionaries(toml_keys, inner, max_size=3),
    max_leaves=8,
)


@given(
    tables=st.dictionaries(toml_keys, toml_values, max_size=4),
    nested=st.dictionaries(toml_keys, toml_values, max_size=3),
)
def test_any_containerd_configuration_survives(tables: dict[str, Any], nested: dict[str, Any]) -> None:
    import tomlkit

    nested.pop("containerd", None)
    document = {**tables, "version": 2, "plugins": {CRI2: nested}}
    text = tomlkit.dumps(document)
    added = engines.containerd_add(text, "/r")
    read = tomllib.loads(added)
    assert read["plugins"][CRI2].pop("containerd")["runtimes"]["rune"]["options"] == {"BinaryName": "/r"}
    assert read == document
    assert engines.containerd_add(added, "/r") == added


def test_the_commands_install_and_uninstall(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(DAEMON_JSON)
    rune = tmp_path / "rune"
    rune.write_text("#!/bin/sh\n")
    rune.chmod(0o755)

    def call(*words: str) -> str:
        done = CliRunner().invoke(main, [*words, "--config", str(path)])
        assert done.exit_code == 0, done.output
        return done.output

    assert "+++" in call("install", "docker", "--dry-run", "--rune", str(rune))
    assert path.read_text() == DAEMON_JSON
    shown = call("install", "docker", "--rune", str(rune))
    assert f"wrote {path}" in shown
    assert "reload docker" in shown
    assert "already" in call("install", "docker", "--rune", str(rune))
    assert "-" in call("uninstall", "docker", "--dry-run")
    assert engines.docker_current(path.read_text()) == str(rune)
    assert f"removed {path}.inclavare-backup" in call("uninstall", "docker")
    assert path.read_text() == DAEMON_JSON
    assert "not configured" in call("uninstall", "docker")
    path.write_text("{")
    done = CliRunner().invoke(main, ["install", "docker", "--config", str(path), "--rune", str(rune)])
    assert done.exit_code == 2
    assert str(path) in done.output

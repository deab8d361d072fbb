"""The command line as runc and crun take it, and the decision whether an enclave is meant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.rune import low_level, settings
from inclavare.rune.main import Call, concerns_enclave, enclave_directory, is_safe_id, quote, read_config, wants_enclave


def test_what_docker_passes() -> None:
    words = "--root /r --log /l/log.json --log-format json --systemd-cgroup create --bundle /b --pid-file /b/init.pid"
    call = Call([*words.split(), "--console-socket", "/c", "id1"])
    assert (call.root, call.log, call.log_format, call.command, call.container) == (
        "/r",
        "/l/log.json",
        "json",
        "create",
        "id1",
    )
    assert call.values == {"--bundle": "/b", "--pid-file": "/b/init.pid", "--console-socket": "/c"}
    assert call.options == ["--log", "/l/log.json", "--log-format", "json", "--systemd-cgroup"]
    assert call.usage_error == ""


@pytest.mark.parametrize(("words", "root"), [
    ("--root=/x state c", "/x"), ("-root /x state c", "/x"), ("--root relative state c", str(Path("relative").absolute())),
    ("state c", "/run/rune"),
])  # fmt: skip
def test_root_in_every_form(words: str, root: str) -> None:
    assert Call(words.split()).root == root


def test_a_root_is_one_directory_by_whatever_links(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to("state")
    assert Call(["--root", str(tmp_path / "link"), "state", "c"]).root == str(tmp_path / "state")


def test_short_options_and_the_applications_own_words() -> None:
    assert Call(["run", "-b", "/b", "c"]).values == {"-b": "/b"}
    assert Call(["run", "-b/b", "-d", "c"]).values == {"-b": "/b"}
    assert Call(["run", "-d", "c"]).flags == {"-d"}
    call = Call(["exec", "-e", "A=1", "--user", "0", "c", "sh", "-c", "x", "--", "-y"])
    assert call.positional == ["c", "sh", "-c", "x", "--", "-y"]
    assert call.values == {"-e": "A=1", "--user": "0"}
    assert Call(["kill", "c", "-9"]).positional == ["c", "-9"]
    assert Call(["delete", "--", "-c"]).container == "-c"


@pytest.mark.parametrize("words", [["--root"], ["--nonsense", "run"], ["run", "--bundle"], ["--log"]])
def test_what_is_wrong_is_said(words: list[str]) -> None:
    assert Call(words).usage_error


@given(
    st.lists(
        st.text(max_size=8) | st.sampled_from(["--root", "run", "exec", "-b", "--", "kill", "--log=/x"]), max_size=8
    )
)
def test_any_command_line_is_split_without_a_fault(words: list[str]) -> None:
    call = Call(words)
    if call.command and not call.usage_error:
        assert words[len(words) - len(call.rest) :] == call.rest


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=json_values, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_the_bare_scanner_reads_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory, value: Any, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "scanner.json"
    path.write_text(" " + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n", errors="surrogatepass")
    try:
        expected = json.loads(path.read_bytes())
    except ValueError:
        expected = None
    assert read_config(str(path)) == expected


@given(
    st.binary(max_size=40) | st.sampled_from([b"{", b"[1", b"{}x", b"", b"nul", b'"\\', b"[" * 100_000, b"-", b"{,}"])
)
def test_what_json_refuses_the_bare_scanner_refuses(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "scanner.json"
    path.write_bytes(data)
    try:
        expected = json.loads(data.decode())
    except (ValueError, RecursionError):
        expected = None
    found = read_config(str(path))
    assert found == expected or found != found  # NaN


def test_which_configurations_want_an_enclave(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    plain = {"process": {"env": ["A=1"]}, "root": {"path": "rootfs"}}
    assert not wants_enclave(plain, str(tmp_path))
    assert wants_enclave({**plain, "process": {"env": ["ENCLAVE_TYPE=x"]}}, str(tmp_path))
    assert wants_enclave({**plain, "annotations": {"enclave.type": "x"}}, str(tmp_path))
    assert wants_enclave(None, str(tmp_path))
    for incomplete in ({}, {"process": None}, {"root": {}}, {"root": None, "process": {"env": None}}):
        assert not wants_enclave(incomplete, str(tmp_path))
    # Of a wrong shape: a lenient low-level runtime might skip what asks for the enclave.
    for broken in (
        {"process": {"env": [3, "ENCLAVE_TYPE=x"]}},
        {"root": 3},
        {**plain, "annotations": "x"},
        {"root": {"path": "\0"}},
    ):
        assert wants_enclave(broken, str(tmp_path))
    (tmp_path / "rootfs/.inclavare").mkdir()
    (tmp_path / "rootfs/.inclavare/manifest.json").symlink_to("nowhere")
    assert wants_enclave(plain, str(tmp_path))


def test_json_white_space_only(tmp_path: Path) -> None:
    for text in ("\u00a0{}", "{}\x0b", "\ufeff{}", "{}\u2028"):
        (tmp_path / "c.json").write_text(text)
        assert read_config(str(tmp_path / "c.json")) is None
    (tmp_path / "c.json").write_text("\r\n\t {} \r\n\t")
    assert read_config(str(tmp_path / "c.json")) == {}


def test_a_python_without_the_c_scanner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text('{"a": [1.5, "x"]}')
    monkeypatch.setitem(sys.modules, "_json", None)
    assert read_config(str(tmp_path / "c.json")) == {"a": [1.5, "x"]}


def test_of_two_spellings_of_an_option_the_last_counts(tmp_path: Path) -> None:
    enclave, plain = tmp_path / "enclave", tmp_path / "plain"
    for bundle, env in ((enclave, ["ENCLAVE_TYPE=x"]), (plain, [])):
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps({"process": {"env": env}, "root": {"path": "r"}}))
    for words in (
        ["--bundle", plain, "-b", enclave],
        ["-b", plain, f"--bundle={enclave}"],
        ["-b", plain, f"-b{enclave}"],
    ):
        assert concerns_enclave(Call(["run", *map(str, words), "c"]), str(tmp_path))
        assert not concerns_enclave(Call(["run", *map(str, words), "-b", str(plain), "c"]), str(tmp_path))


def test_the_default_name_of_the_configuration_is_taken_from_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"process": {"env": ["ENCLAVE_TYPE=x"]}}')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert concerns_enclave(Call(["run", "-b", "b", "--config", "config.json", "c"]), str(tmp_path))
    assert not concerns_enclave(Call(["run", "-b", "b", "--config", "other.json", "c"]), str(tmp_path))


@pytest.mark.parametrize("words", [
    "exec -te A=1 c sh", "exec --proc p.json c", "exec -env A=1 c sh", "exec --new-option c sh", "delete -xf c",
])  # fmt: skip
def test_an_option_that_is_not_clear_never_passes_an_enclave_by(tmp_path: Path, words: str) -> None:
    run_dir = str(tmp_path)
    assert not concerns_enclave(Call(words.split()), run_dir)
    Path(enclave_directory(run_dir, "/run/rune", "c")).mkdir(parents=True)
    assert concerns_enclave(Call(words.split()), run_dir)


@pytest.mark.parametrize("words", ["exec -td x c", "exec --env=A=1 x c", "exec -eA=1 x c", "exec -e c x c"])
def test_the_applications_words_are_not_taken_for_ids(tmp_path: Path, words: str) -> None:
    Path(enclave_directory(str(tmp_path), "/run/rune", "c")).mkdir(parents=True)
    assert not concerns_enclave(Call(words.split()), str(tmp_path))


def test_flags_with_a_value_and_the_end_of_global_options() -> None:
    assert Call(["--debug=false", "--systemd-cgroup=F", "state", "c"]).options == []
    assert Call(["--debug=true", "state", "c"]).options == ["--debug"]
    call = Call(["--debug", "--", "state", "c"])
    assert (call.command, call.container, call.usage_error) == ("state", "c", "")
    call = Call(["exec", "-e", "A=1", "--env=B=2", "-eC=3", "c"])
    assert call.given == [("-e", "A=1"), ("--env", "B=2"), ("-e", "C=3")]


@given(st.text(min_size=1), st.text(min_size=1))
def test_state_directories_do_not_collide(first: str, second: str) -> None:
    assert "/" not in quote(first)
    assert (quote(first) == quote(second)) == (first == second)


def test_only_what_differs_takes_the_slow_path(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    for words in ("start c", "kill c", "pause c", "ps c", "update c", "state c", "delete c", "spec"):
        assert not concerns_enclave(Call(words.split()), run_dir)
    for words in ("events c", "features", "--version", "list", "state ../c", "frobnicate"):
        assert concerns_enclave(Call(words.split()), run_dir)
    Path(enclave_directory(run_dir, "/run/rune", "c")).mkdir(parents=True)
    for words in ("state c", "delete c", "exec c id", "checkpoint c"):
        assert concerns_enclave(Call(words.split()), run_dir)
    for words in ("start c", "kill c"):
        assert not concerns_enclave(Call(words.split()), run_dir)


def test_ids() -> None:
    assert is_safe_id("a.b-c_1")
    assert not [bad for bad in ("", ".", "..", "a/b", "../a", "a\0b") if is_safe_id(bad)]


# --- the low-level runtime


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("crun", "runc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(low_level, "crun_needs_private_cgroups", lambda: False)
    return tmp_path


def test_selection(programs: Path, tmp_path: Path) -> None:
    assert low_level.select("auto", "/r", None) == str(programs / "crun")
    assert low_level.select("runc", "/r", None) == str(programs / "runc")
    assert low_level.select(str(programs / "runc"), "/r", None) == str(programs / "runc")
    (tmp_path / "root/c").mkdir(parents=True)
    (tmp_path / "root/c/state.json").touch()
    assert low_level.select("auto", str(tmp_path / "root"), "c") == str(programs / "runc")
    with pytest.raises(low_level.NoRuntimeError, match="apt-get install crun"):
        low_level.select("/nowhere/crun", "/r", None)


def test_crun_that_cannot_run_leaves_it_to_runc(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(flags: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(low_level, "crun_needs_private_cgroups", lambda: True)
    monkeypatch.setattr(low_level.kernel, "unshare", refuse)
    assert low_level.select("auto", "/r", None) == str(programs / "runc")
    with pytest.raises(low_level.NoRuntimeError, match="hybrid"):
        low_level.select("crun", "/r", None)


def test_the_shims_link_is_never_taken_for_runc(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_level, "SHIM_DIRECTORY", str(programs))
    found = low_level.find("runc")
    assert found is None or not found.startswith(str(programs))


def test_options_that_crun_does_not_know() -> None:
    options = ["--criu", "/x", "--log", "l", "--criu=/y", "--debug"]
    assert low_level.arguments("/usr/bin/crun", "/r", options, ["state", "c"]) == [
        "/usr/bin/crun", "--root", "/r", "--log", "l", "--debug", "state", "c",
    ]  # fmt: skip
    assert low_level.arguments("/usr/bin/runc", "/r", options, ["x"])[3:-1] == options


# --- settings


def test_settings_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "CACHE", str(tmp_path / "cache"))
    config = tmp_path / "config.toml"
    monkeypatch.setenv("INCLAVARE_CONFIG", str(config))
    config.write_text('run_dir = "/a"\n')
    assert settings.load() == ("/a", "auto")
    [remembered] = (tmp_path / "cache").iterdir()
    remembered.write_text("/remembered\ncrun")
    assert settings.load() == ("/remembered", "crun")
    remembered.write_text("damaged")
    assert settings.load() == ("/a", "auto")
    config.write_text('run_dir = "/b"\n[runtime]\nlow_level = "runc"\n')
    os.utime(config, ns=(1, 1))
    assert settings.load() == ("/b", "runc")
    # In place, of the same size and with its old time again, as rsync leaves it.
    config.write_text('run_dir = "/c"\n[runtime]\nlow_level = "crun"\n')
    os.utime(config, ns=(1, 1))
    assert settings.load() == ("/c", "crun")


def test_few_settings_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "CACHE", str(tmp_path / "cache"))
    for number in range(3 * settings._KEPT):
        config = tmp_path / f"{number}.toml"
        config.write_text(f'run_dir = "/{number}"\n')
        monkeypatch.setenv("INCLAVARE_CONFIG", str(config))
        assert settings.load() == (f"/{number}", "auto")
        assert settings.load() == (f"/{number}", "auto")
        assert len(os.listdir(tmp_path / "cache")) <= settings._KEPT


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/etc/inclavare/config.toml").exists():
        pytest.skip("this machine has a configuration")
    monkeypatch.setenv("INCLAVARE_CONFIG", "")
    assert settings.load() == ("/run/inclavare", "auto")

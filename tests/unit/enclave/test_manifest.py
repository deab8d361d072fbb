"""The manifest: what people may write, how mistakes are reported, and the canonical form."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import rfc8785
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.enclave.manifest import EncryptedVolume, Manifest, Secret
from inclavare.enclave.toml_lines import line_of
from inclavare.errors import IntegrityError, UsageError

FULL = """\
[enclave]
size = "64M"
threads = 8
debug = true
isv_prod_id = 7
isv_svn = 3
tee = ["sgx", "sgx-sim"]
runtime = "native"

[process]
args = ["/usr/bin/python3", "-m", "app"]
env_from_host = ["LANG"]
args_from_host = true
cwd = "/srv"
user = "1000:1001,27"
hooks = [["/sbin/ldconfig", "-X"]]

[process.env]
PATH = "/usr/bin"
GREETING = "grüß dich"

[files]
trusted = ["/"]
allowed = ["/data"]
tmpfs = ["/run"]

[[files.encrypted]]
path = "/var/lib/app"
key = "sealed:mrenclave"

[[files.encrypted]]
path = "/srv/store"
key = "kbs:///default/key/store"

[[secrets]]
uri = "kbs:///default/password/db"
path = "/run/secrets/db"

[[secrets]]
uri = "kbs:///default/token/api"
env = "API_TOKEN"
required = false

[attestation]
verdictd = "https://verdictd.example:8443"
trust_anchor = "/etc/anchor.pem"
policy = "default"

[exec]
commands = ["/bin/ps", ["/bin/sh", "-c", "id"]]
"""


def test_every_key() -> None:
    manifest = Manifest.parse(FULL)
    assert manifest.enclave.size == 64 << 20
    assert manifest.enclave.tee == ("sgx", "sgx-sim")
    assert manifest.process.ids == (1000, 1001, (27,))
    assert manifest.process.env == {"PATH": "/usr/bin", "GREETING": "grüß dich"}
    assert manifest.files.encrypted[1] == EncryptedVolume("/srv/store", "kbs:///default/key/store")
    assert manifest.secrets == (
        Secret("kbs:///default/password/db", path="/run/secrets/db"),
        Secret("kbs:///default/token/api", env="API_TOKEN", required=False),
    )
    assert manifest.exec.commands == ("/bin/ps", ("/bin/sh", "-c", "id"))
    assert Manifest.from_canonical(manifest.canonical()) == manifest


def test_defaults() -> None:
    manifest = Manifest.parse("")
    assert (manifest.enclave.size, manifest.enclave.threads, manifest.enclave.debug) == (256 << 20, 64, False)
    assert manifest.enclave.tee == ("sgx",)
    assert manifest.process.env_from_host == ("HOSTNAME", "TERM", "container")
    assert not manifest.process.args_from_host
    assert manifest.files.trusted == ("/",)
    assert manifest.exec.commands == ()
    assert manifest == Manifest()


def test_what_is_absent_comes_from_the_base_and_variables_are_added() -> None:
    base = Manifest().with_process(args=("/bin/app",), env={"A": "1", "B": "1"}, user="5:6")
    manifest = Manifest.parse('[process]\nenv = {B = "2", C = "3"}\ncwd = "/x"', base=base)
    assert manifest.process.args == ("/bin/app",)
    assert manifest.process.env == {"A": "1", "B": "2", "C": "3"}
    assert (manifest.process.user, manifest.process.cwd) == ("5:6", "/x")


def test_upstream_name_of_the_platform() -> None:
    assert Manifest.parse('[enclave]\ntee = ["intelSgx", "sgx"]').enclave.tee == ("sgx",)


WRONG = [
    # text, line, key, part of the message
    ("[enclave]\nsiez = 1", 2, "enclave.siez", "unknown key"),
    ("\n\nenclav = 1", 3, "enclav", "unknown key"),
    ("[unknown]\na = 1", 1, "unknown", "unknown key"),
    ('[enclave]\n\nsize = "64 parsecs"', 3, "enclave.size", "wrong type"),
    ("[enclave]\nsize = true", 2, "enclave.size", "wrong type"),
    ("[enclave]\nsize = 1000000", 2, "enclave.size", "out of range"),
    ("[enclave]\nthreads = 0", 2, "enclave.threads", "out of range"),
    ("[enclave]\nthreads = true", 2, "enclave.threads", "wrong type"),
    ('[enclave]\ndebug = "yes"', 2, "enclave.debug", "wrong type"),
    ("[enclave]\nisv_svn = 65536", 2, "enclave.isv_svn", "out of range"),
    ("[enclave]\ntee = []", 2, "enclave.tee", "empty list"),
    ('[enclave]\ntee = [\n "sgx",\n "tdx",\n]', 4, "enclave.tee[1]", "unknown TEE"),
    ('[enclave]\nruntime = "../x"', 2, "enclave.runtime", "not a runtime's name"),
    ("enclave = 3", 1, "enclave", "wrong type"),
    ('[process]\nargs = "ls"', 2, "process.args", "wrong type"),
    ('[process]\nargs = ["ls", 3]', 2, "process.args[1]", "wrong type"),
    ('[process]\nargs = ["a\\u0000b"]', 2, "process.args[0]", "NUL"),
    ('[process]\nenv = ["A=1"]', 2, "process.env", "wrong type"),
    ('[process.env]\n"A=B" = "x"', 2, "process.env.A=B", "not a variable"),
    ("[process.env]\nA = 1", 2, "process.env.A", "wrong type"),
    ('[process]\ncwd = "srv"', 2, "process.cwd", "absolute path"),
    ('[process]\nuser = ""', 2, "process.user", "not a user"),
    ('[process]\nuser = "4294967295:0"', 2, "process.user", "out of range"),
    ("[process]\nhooks = [[]]", 2, "process.hooks[0]", "empty command"),
    ('[process]\nhooks = [["relative"]]', 2, "process.hooks[0][0]", "absolute path"),
    ('[files]\nallowed = ["/"]', 2, "files.allowed[0]", "whole file system"),
    ('[files]\nallowed = ["/a/../b"]', 2, "files.allowed[0]", "absolute path"),
    ('[files]\ntmpfs = ["/run/"]', 2, "files.tmpfs[0]", "absolute path"),
    ('[files]\ntrusted = ["/.inclavare"]', 2, "files.trusted[0]", "reserved"),
    ('[[files.encrypted]]\npath = "/a"\nkey = "sealed:me"', 3, "files.encrypted[0].key", "not a key"),
    ('[[files.encrypted]]\npath = "/a"', 1, "files.encrypted[0]", "key is missing"),
    ('[[secrets]]\nuri = "kbs:///a/b/c"', 1, "secrets[0]", "exactly one destination"),
    ('[[secrets]]\nuri = "kbs:///a/b/c"\npath = "/a"\nenv = "A"', 1, "secrets[0]", "exactly one destination"),
    ('[[secrets]]\nuri = "http://a/b/c/d"\npath = "/a"', 2, "secrets[0].uri", "not a resource"),
    (
        '[[secrets]]\nuri = "kbs:///a/b/c"\npath = "/a"\n\n[[secrets]]\nuri = "kbs:///a/b/d"\npath = "/b"\nreqired = true',
        8,
        "secrets[1].reqired",
        "unknown key",
    ),
    ('[exec]\ncommands = ["ls"]', 2, "exec.commands[0]", "absolute path"),
    ("[exec]\ncommands = [[]]", 2, "exec.commands[0]", "empty command"),
]


@pytest.mark.parametrize(("text", "line", "key", "message"), WRONG, ids=[case[2] + ":" + case[3][:9] for case in WRONG])
def test_mistakes_name_file_line_and_key(text: str, line: int, key: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Manifest.parse(text, "my.toml")
    assert caught.value.message.startswith(f"my.toml:{line}: {key}: ")
    assert message in caught.value.message
    assert caught.value.remedy


def test_not_toml() -> None:
    with pytest.raises(UsageError, match=r"my\.toml: .*line 2"):
        Manifest.parse("[enclave]\nsize = \nthreads = 1", "my.toml")


def test_no_command() -> None:
    with pytest.raises(UsageError, match=r"process\.args is empty"):
        Manifest.parse("").require_args()
    Manifest.parse("[process]\nargs_from_host = true").require_args()


def test_a_user_by_name_has_no_canonical_form() -> None:
    with pytest.raises(UsageError, match="not resolved"):
        Manifest.parse('[process]\nuser = "app"').canonical()


# --- the canonical form

_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
_path = st.lists(
    st.text("abc.-_ ä", min_size=1, max_size=6).filter(lambda part: part not in (".", "..")), min_size=1, max_size=3
).map(lambda parts: "/" + "/".join(parts))
_env_names = _text.filter(lambda name: name != "" and "=" not in name)
_argv = st.lists(_text, min_size=1, max_size=3).filter(lambda argv: argv[0] != "").map(tuple)
_manifests = st.builds(
    lambda enclave, process, files, secrets, commands: (
        Manifest()
        .with_enclave(**enclave)
        .with_process(**process)
        ._replace(files=Manifest().files._replace(**files), secrets=tuple(secrets))
        ._replace(exec=Manifest().exec._replace(commands=tuple(commands)))
    ),
    st.fixed_dictionaries(
        {
            "size": st.integers(256, 1 << 20).map(lambda pages: pages * 4096),
            "threads": st.integers(1, 4096),
            "debug": st.booleans(),
            "isv_prod_id": st.integers(0, 65535),
            "tee": st.sampled_from([("sgx",), ("sgx-sim",), ("sgx", "sgx-sim")]),
        }
    ),
    st.fixed_dictionaries(
        {
            "args": st.lists(_text, max_size=4).map(tuple),
            "env": st.dictionaries(_env_names, _text, max_size=4),
            "cwd": _path,
            "user": st.lists(st.integers(0, 0xFFFFFFFE), min_size=2, max_size=4).map(
                lambda ids: f"{ids[0]}:{','.join(map(str, ids[1:]))}"
            ),
            "hooks": st.lists(_argv.map(lambda argv: ("/hook", *argv)), max_size=2).map(tuple),
        }
    ),
    st.fixed_dictionaries(
        {
            "allowed": st.lists(_path, max_size=2).map(tuple),
            "encrypted": st.lists(
                st.builds(EncryptedVolume, _path, st.sampled_from(["sealed:mrenclave", "kbs:///a/b/c"])), max_size=2
            ).map(tuple),
        }
    ),
    st.lists(
        st.one_of(
            st.builds(
                lambda path, required: Secret("kbs:///a/b/c", path=path, required=required), _path, st.booleans()
            ),
            st.builds(lambda name: Secret("kbs:///a/b/c", env=name), _env_names),
        ),
        max_size=2,
    ),
    st.lists(st.one_of(_path, st.just("*"), _argv), max_size=3),
)


@given(_manifests)
@settings(max_examples=200, deadline=None)
def test_canonical_form_is_rfc_8785_and_round_trips(manifest: Manifest) -> None:
    data = manifest.canonical()
    assert data == rfc8785.dumps(json.loads(data))
    again = Manifest.from_canonical(data)
    assert again == manifest
    assert again.canonical() == data


@given(_manifests, st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_is_another_manifest(manifest: Manifest, data: st.DataObject) -> None:
    raw = bytearray(manifest.canonical())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        read = Manifest.from_canonical(bytes(raw))
    except IntegrityError:
        return
    # A changed letter of a value is another, equally canonical manifest, with another digest.
    assert read != manifest
    assert read.canonical() == bytes(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("secrets"),
        lambda document: document["enclave"].pop("debug"),
        lambda document: document.update(schema=2),
        lambda document: document.update(extra=1),
        lambda document: document["process"].update(user="app"),
        lambda document: document["process"].update(args="x"),
        lambda document: document["enclave"].update(size="256M"),
        lambda document: document["enclave"].update(tee=["intelSgx"]),
    ],
)
def test_other_documents_are_refused(change: Any) -> None:
    document = json.loads(Manifest().canonical())
    change(document)
    with pytest.raises(IntegrityError):
        Manifest.from_canonical(rfc8785.dumps(document))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100000, b" " * (2 << 20)])
def test_not_a_manifest(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Manifest.from_canonical(data)


def test_white_space_and_repeated_keys_are_refused() -> None:
    good = Manifest().canonical()
    for bad in (good + b"\n", b" " + good, good.replace(b'"schema":1', b'"schema":1,"schema":1')):
        with pytest.raises(IntegrityError, match="damaged"):
            Manifest.from_canonical(bad)


def test_reading_the_canonical_form_imports_little() -> None:
    """It is on every container's start path."""
    code = (
        "import sys; from inclavare.enclave.manifest import Manifest; Manifest.from_canonical(sys.stdin.buffer.read());"
        "print([name for name in ('tomllib', 'rfc8785', 'cryptography', 'msgspec', 'rich', 'click') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=Manifest().canonical(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


# --- lines

_keys = st.one_of(st.text("abcdef_-", min_size=1, max_size=5), st.text("a b.#[]='\"\\ä", min_size=1, max_size=5))
_values = st.recursive(
    st.one_of(st.integers(-5, 5), st.booleans(), st.text("ab\n#\"'[]{}=,\\ä", max_size=8)),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(_keys, below, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(_keys, _values, max_size=5), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_lines_of_any_document(document: dict[str, Any], before: int) -> None:
    """Each top-level key is found where its name stands."""
    text = "# comment\n" * before + tomlkit.dumps(document)
    assert tomllib.loads(text) == document
    lines = text.split("\n")
    seen = set()
    for key in document:
        number = line_of(text, (key,))
        seen.add(number)
        assert 1 <= number <= len(lines)
        rest = "\n".join(lines[number - 1 :])
        # From the key's line on the text still is TOML, and holds the key.
        assert key in tomllib.loads(rest)
    assert len(seen) == len(document)


def test_lines_inside_arrays_strings_and_dotted_keys() -> None:
    text = (
        'a.b = """\nx = 1\n[c]\n"""\n'
        "l = [ # ]\n  '''\n]''',\n  { k = [1,\n 2], \"q\\\"]\" = 3 },\n]\n"
        "[[t]]\nx = 1\n[[t]]\nx = 2\n[t.u]\ny = 1\r\n[ 'd.e' . f ]\nz = 1979-05-27T07:32:00Z # c\n"
    )
    tomllib.loads(text)
    expected: dict[tuple[str | int, ...], int] = {
        ("a", "b"): 1,
        ("l",): 5,
        ("l", 0): 6,
        ("l", 1, "k"): 8,
        ("l", 1, "k", 1): 9,
        ("l", 1, 'q"]'): 9,
        ("t", 0, "x"): 12,
        ("t", 1): 13,
        ("t", 1, "x"): 14,
        ("t", 1, "u", "y"): 16,
        ("d.e", "f", "z"): 18,
        ("d.e", "f", "missing"): 17,
    }
    assert {path: line_of(text, path) for path in expected} == expected

"""Every rule of admission, with what passes and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.enclave.manifest import Manifest
from inclavare.enclave.tree import build
from inclavare.errors import InclavareError, PolicyError, UsageError
from inclavare.runelet import admission


def manifest(toml: str = "") -> Manifest:
    base = '[process]\nargs = ["/bin/app", "x"]\nenv = {PATH = "/bin", MODE = "safe"}\n'
    return Manifest.parse(base + toml, "test")


def config(**changes: Any) -> dict[str, Any]:
    """A configuration that the manifest above admits; ``process`` is merged, the rest replaced."""
    process = {"args": ["/bin/app", "x"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    process.update(changes.pop("process", {}))
    return {
        "root": {"path": "rootfs"},
        "process": process,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}]},
        **changes,
    }


def refusal(document: dict[str, Any], toml: str = "", **kwargs: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        admission.admit(document, manifest(toml), **kwargs)
    assert caught.value.remedy
    return caught.value.id


def bind(destination: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": "/srv", "options": ["rbind"]}


def test_what_the_manifest_says_passes_and_the_original_is_not_changed() -> None:
    document = config(annotations={"enclave.type": "sgx-sim", "other": "1"})
    before = json.dumps(document)
    admitted = admission.admit(document, manifest())
    assert admitted["process"]["env"] == ["PATH=/bin", "MODE=safe"]
    assert admitted["annotations"] == {"other": "1"}
    assert json.dumps(document) == before


def test_arguments() -> None:
    other = config(process={"args": ["/bin/app", "y"]})
    assert refusal(other) == "admission.args.refused"
    assert refusal(config(process={"args": ["/bin/app"]})) == "admission.args.refused"
    free = manifest().with_process(args_from_host=True)
    assert admission.admit(other, free)["process"]["args"] == ["/bin/app", "y"]


def test_environment() -> None:
    assert refusal(config(process={"env": ["LD_PRELOAD=/x"]})) == "admission.env.refused"
    assert refusal(config(process={"env": ["MODE=fast"]})) == "admission.env.refused"
    assert refusal(config(process={"env": ["MODE=safe", "MODE=fast"]})) == "admission.env.refused"
    taken = manifest().with_process(env_from_host=("TZ", "APP_*"))
    env = ["TZ=UTC", "APP_A=1", "KUBERNETES_PORT=tcp://x", "DB_SERVICE_HOST=h", "HOSTNAME=h", "ENCLAVE_TYPE=sgx-sim"]
    admitted = admission.admit(config(process={"env": env}), taken)
    assert admitted["process"]["env"] == ["PATH=/bin", "MODE=safe", "TZ=UTC", "APP_A=1"]
    # A PATH of the engine's own neither replaces the measured one nor stops the start.
    assert "PATH=/bin" in admission.admit(config(process={"env": ["PATH=/evil"]}), manifest())["process"]["env"]


@pytest.mark.parametrize(("change", "id"), [
    ({"user": {"uid": 1, "gid": 0}}, "admission.user.refused"),
    ({"user": {"uid": 0, "gid": 5}}, "admission.user.refused"),
    ({"cwd": "/tmp"}, "admission.cwd.refused"),
])  # fmt: skip
def test_user_and_directory(change: dict[str, Any], id: str) -> None:
    assert refusal(config(process=change)) == id


@pytest.mark.parametrize("mount", [
    bind("/data"),
    bind("/"),
    bind("/allowed/../etc"),
    bind("//etc"),
    bind("/allowedx"),
    bind("/etc/hosts.d"),
    bind("etc"),
    {"destination": "/data", "type": "tmpfs"},
    {"destination": "/proc", "type": "bind", "source": "/srv", "options": ["bind"]},
    {"destination": "/dev/pts", "type": "tmpfs", "options": ["rbind"], "source": "/srv"},
    {"destination": "/usr", "type": "overlay", "source": "overlay"},
    {"destination": "/usr", "type": "proc"},
    {"destination": "/run", "type": "tmpfs", "options": ["bind"], "source": "/srv"},
])  # fmt: skip
def test_mounts_that_are_refused(mount: dict[str, Any]) -> None:
    assert refusal(config(mounts=[mount]), '[files]\nallowed = ["/allowed"]\n') == "admission.mount.refused"


@pytest.mark.parametrize(
    "destination", ["/dev/attestation", "/dev/attestation/keys", "/dev//attestation/", "/dev/x/../attestation"]
)
def test_nothing_hides_dev_attestation(destination: str) -> None:
    toml = '[files]\nallowed = ["/dev"]\n'
    assert refusal(config(mounts=[bind(destination)]), toml) == "admission.mount.attestation"


def test_mounts_that_pass() -> None:
    toml = """[files]
allowed = ["/allowed"]
tmpfs = ["/tmp"]
[[files.encrypted]]
path = "/secret"
key = "sealed:mrenclave"
"""
    mounts = [
        bind("/allowed/below/"), bind("/allowed"), bind("/secret/"), bind("/etc/hosts"), bind("/etc/resolv.conf"),
        bind("/dev/shm"), {"destination": "/tmp", "type": "tmpfs"}, {"destination": "/dev", "type": "tmpfs"},
        {"destination": "/sys/fs/cgroup", "type": "cgroup"},
    ]  # fmt: skip
    assert len(admission.admit(config(mounts=mounts), manifest(toml))["mounts"]) == len(mounts)


def test_mounts_through_links_of_the_image(tmp_path: Path) -> None:
    for directory in ("etc", "data", "run"):
        (tmp_path / directory).mkdir()
    (tmp_path / "link").symlink_to("etc")
    (tmp_path / "absolute").symlink_to("/data/../etc")
    (tmp_path / "data/up").symlink_to("../../../etc")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "chain").symlink_to("link")
    tree = build(tmp_path)

    def resolve(path: str) -> str:
        return admission.follow_links(tree, path)

    assert [resolve(path) for path in ("/link/x", "/absolute", "/data/up", "/chain/", "/data/new/x", "/data/../..")] == [
        "/etc/x", "/etc", "/etc", "/etc", "/data/new/x", "/",
    ]  # fmt: skip
    toml = '[files]\nallowed = ["/link", "/data", "/absolute", "/circle"]\n'
    for destination in ("/link", "/link/x", "/absolute", "/data/up/x"):
        assert refusal(config(mounts=[bind(destination)]), toml, resolve=resolve) == "admission.mount.refused"
    assert refusal(config(mounts=[bind("/circle")]), toml, resolve=resolve) == "admission.mount.links"
    admission.admit(config(mounts=[bind("/data/new")]), manifest(toml), resolve=resolve)


def test_masks_and_hooks() -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        linux = {"namespaces": [{"type": "mount"}], key: ["/proc/kcore", "/etc/ssl"]}
        assert refusal(config(linux=linux)) == "admission.mask.refused"
        linux[key] = ["/proc/../etc"]
        assert refusal(config(linux=linux)) == "admission.mask.refused"
        linux[key] = ["/proc/kcore", "/sys/firmware"]
        admission.admit(config(linux=linux), manifest())
    hook = {"path": "/bin/hook", "args": ["hook", "a"]}
    for name in ("createContainer", "startContainer"):
        assert refusal(config(hooks={name: [hook]})) == "admission.hook.refused"
        admission.admit(config(hooks={name: [hook]}), manifest().with_process(hooks=(("/bin/hook", "a"),)))
        admission.admit(config(hooks={name: [hook]}), manifest().with_enclave(debug=True))
    admission.admit(config(hooks={"createRuntime": [hook], "prestart": [hook], "poststop": [hook]}), manifest())


def test_exec_policy() -> None:
    named = manifest('[exec]\ncommands = ["/bin/id", ["/bin/sh", "-c", "date"]]\n')
    for allowed in (["/bin/id"], ["/bin/id", "-u"], ["/bin/sh", "-c", "date"]):
        admission.admit_exec(allowed, None, named)
    for refused in (["/bin/sh"], ["/bin/sh", "-c", "date; id"], ["id"], [], ["/bin/id2"]):
        with pytest.raises(PolicyError):
            admission.admit_exec(refused, None, named)
    admission.admit_exec(["/anything"], None, manifest('[exec]\ncommands = ["*"]\n'))
    admission.admit_exec(["/anything"], None, manifest().with_enclave(debug=True))


def test_exec_is_for_the_measured_user() -> None:
    own = manifest('[exec]\ncommands = ["*"]\n').with_process(user="7:8,9")
    for user in (None, "7", "7:8"):
        admission.admit_exec(["/x"], user, own)
    for user in ("0", "0:0", "7:9", "8:7", "root", ""):
        with pytest.raises(PolicyError) as caught:
            admission.admit_exec(["/x"], user, own)
        assert caught.value.id == "admission.exec.user"
    admission.admit_exec(["/x"], "0:0", own.with_enclave(debug=True))


def test_requests_come_from_variables_first() -> None:
    document = config(process={"env": ["ENCLAVE_TYPE=sgx-sim"]}, annotations={"enclave.type": "intelSgx"})
    assert admission.requested(document, "ENCLAVE_TYPE") == "sgx-sim"
    document["process"]["env"] = []
    assert admission.requested(document, "ENCLAVE_TYPE") == "intelSgx"
    assert admission.requested(document, "ENCLAVE_RUNTIME_PATH") is None


paths = st.sampled_from(["/a", "/a/b", "/etc", "/etc/hosts", "/proc", "/dev", "/dev/shm", "/run", "/tmp/../etc", "/x/"])
mounts = st.lists(st.fixed_dictionaries(
    {"destination": paths, "type": st.sampled_from(["bind", "tmpfs", "proc", "none"]), "source": st.just("/srv")},
    optional={"options": st.lists(st.sampled_from(["bind", "rbind", "ro"]), max_size=2)},
), max_size=5)  # fmt: skip
names = st.sampled_from(["A", "PATH", "MODE", "HOSTNAME", "ENCLAVE_TYPE", "X_SERVICE_HOST", "TERM"])
env = st.lists(st.builds(lambda name, value: f"{name}={value}", names, st.text("ab", max_size=2)), max_size=5)
argv = st.lists(st.text("ab/", min_size=1, max_size=3), min_size=1, max_size=3)


@given(mounts, env, argv, st.integers(0, 3))
def test_a_configuration_is_admitted_by_its_own_manifest(
    mounts: list[dict[str, Any]], env: list[str], argv: list[str], uid: int
) -> None:
    document = config(mounts=mounts, process={"env": env, "args": argv, "user": {"uid": uid, "gid": uid,
                      "additionalGids": [uid, 7]}, "cwd": "/a//b/"})  # fmt: skip
    fields = admission.manifest_fields(document, Manifest())
    own = Manifest().with_process(**{key: fields[key] for key in ("args", "env", "cwd", "user")})
    own = own._replace(
        process=own.process._replace(args=tuple(fields["args"])),
        files=own.files._replace(allowed=tuple(fields["allowed"]), tmpfs=tuple(fields["tmpfs"])),
    )
    assert Manifest.from_canonical(own.canonical()) == own
    try:
        admitted = admission.admit(document, own)
    except PolicyError as error:
        # The only things that no manifest allows.
        assert error.id in ("admission.mount.nested", "admission.mount.covers")
        assert len(mounts) > 1 or mounts[0]["destination"] == "/dev"
        return
    assert admitted["process"]["args"] == argv
    assert admitted["process"]["user"]["additionalGids"] == [uid, 7]
    assert not [entry for entry in admitted["process"]["env"] if entry.startswith("ENCLAVE_")]


@given(mounts, env)
def test_nothing_comes_in_that_the_manifest_does_not_name(mounts: list[dict[str, Any]], env: list[str]) -> None:
    own = manifest('[files]\nallowed = ["/a"]\n')
    try:
        admitted = admission.admit(config(mounts=mounts, process={"env": env}), own)
    except PolicyError:
        return
    for entry in admitted["process"]["env"]:
        name, _, value = entry.partition("=")
        assert own.process.env.get(name) == value or name in own.process.env_from_host
    for mount in admitted["mounts"]:
        binds = {"bind", "rbind"} & set(mount.get("options", ())) or mount["type"] in ("bind", "none")
        if binds:
            assert mount["destination"] in ("/a", "/a/b", "/etc/hosts", "/dev/shm"), mount


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["root", "path", "process", "args", "env", "cwd", "mounts", "destination", "linux",
                                       "namespaces", "type", "annotations"]), inner, max_size=5),
)  # fmt: skip


@given(values)
def test_any_json_has_a_shape_or_a_clear_error(value: Any) -> None:
    try:
        admission.check_shape(value)
    except InclavareError as error:
        assert isinstance(error, UsageError)
        assert error.remedy


ENCRYPTED = """[files]
allowed = ["/data", "/secrets", "/dev"]
[[files.encrypted]]
path = "/secrets/keys"
key = "sealed:mrenclave"
"""


def test_nothing_is_mounted_or_made_below_the_hosts_own_files() -> None:
    # /data/link may be a link to /etc by the time that crun looks.
    nested = config(mounts=[bind("/data"), bind("/data/link")])
    assert refusal(nested, ENCRYPTED) == "admission.mount.nested"
    volume = {"destination": "/data", "type": "nfs", "source": "host:/x"}
    assert refusal(config(mounts=[volume, {"destination": "/data/t", "type": "tmpfs"}]), ENCRYPTED) == (
        "admission.mount.nested"
    )
    shm = {"namespaces": [{"type": "mount"}], "devices": [{"path": "/dev/shm/x/null", "type": "c"}]}
    assert refusal(config(mounts=[bind("/dev/shm")], linux=shm)) == "admission.mount.nested"


@pytest.mark.parametrize("destination", ["/secrets", "/dev"])
def test_the_hosts_files_never_lie_above_what_is_protected(destination: str) -> None:
    assert refusal(config(mounts=[bind(destination)]), ENCRYPTED) == "admission.mount.covers"


def test_destinations_are_written_as_they_were_checked() -> None:
    mounts = [bind("data/./x/"), bind("/secrets/keys/"), {"destination": "//dev/pts/../pts", "type": "devpts"}]
    admitted = admission.admit(config(mounts=mounts), manifest(ENCRYPTED))
    assert [mount["destination"] for mount in admitted["mounts"]] == ["/data/x", "/secrets/keys", "/dev/pts"]


@pytest.mark.parametrize("path", ["/proc/self/root/etc", "/proc/1/root/etc/x", "/proc/thread-self/cwd"])
def test_a_processs_directory_leads_out_of_proc(path: str) -> None:
    toml = '[files]\nallowed = ["/proc"]\n'
    assert refusal(config(mounts=[bind(path)]), toml) == "admission.mount.process"
    for key in ("maskedPaths", "readonlyPaths"):
        linux = {"namespaces": [{"type": "mount"}], key: [path]}
        assert refusal(config(linux=linux)) == "admission.mount.process"


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/../etc/x", "/dev", "/dev/attestation/quote", "etc/x"])
def test_devices_stand_below_dev(path: str) -> None:
    linux = {"namespaces": [{"type": "mount"}], "devices": [{"path": path, "type": "c", "major": 1, "minor": 5}]}
    assert refusal(config(linux=linux)) == "admission.device.refused"
    linux["devices"] = [{"path": "/dev/sgx_enclave", "type": "c", "major": 10, "minor": 125}]
    assert admission.admit(config(linux=linux), manifest())["linux"] == linux


def test_additional_groups_are_the_measured_ones() -> None:
    asked = config(process={"user": {"uid": 0, "gid": 0, "additionalGids": [0, 6, 27]}})
    assert admission.admit(asked, manifest())["process"]["user"]["additionalGids"] == []
    with_group = manifest().with_process(user="0:0,27")
    assert admission.admit(asked, with_group)["process"]["user"]["additionalGids"] == [27]
    assert admission.admit(config(), with_group)["process"]["user"]["additionalGids"] == [27]


def test_neither_a_hooks_environment_nor_its_first_word_is_the_hosts() -> None:
    hook = {"path": "/bin/busybox", "args": ["rm", "-rf"], "env": ["LD_PRELOAD=/data/x.so", "PATH=/bin", "PATH=/data"]}
    own = manifest().with_process(hooks=(("/bin/busybox", "-rf"),))
    [admitted] = admission.admit(config(hooks={"startContainer": [hook]}), own)["hooks"]["startContainer"]
    assert admitted == {"path": "/bin/busybox", "args": ["/bin/busybox", "-rf"], "env": ["PATH=/bin"]}


def test_of_a_variable_that_is_there_twice_the_last_counts() -> None:
    env = ["MODE=fast", "MODE=safe"]
    assert "MODE=safe" in admission.admit(config(process={"env": env}), manifest())["process"]["env"]
    assert admission.manifest_fields(config(process={"env": env}), Manifest())["env"] == {"MODE": "safe"}


def test_sources_of_mounts_start_at_the_callers_bundle() -> None:
    mounts = [
        {**bind("/data"), "source": "data"},
        bind("/x"),
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs"},
    ]
    before = config(mounts=mounts)
    after = admission.with_absolute_sources(before, "/bundle")
    assert [mount["source"] for mount in after["mounts"]] == ["/bundle/data", "/srv", "tmpfs"]
    assert before["mounts"][0]["source"] == "data"


@pytest.mark.parametrize(
    ("value", "debug"), [("1", True), ("TRUE", True), ("yes", True), ("false", False), ("0", False)]
)
def test_debug_is_asked_for(value: str, debug: bool) -> None:
    assert admission.wants_debug(config(process={"env": [f"ENCLAVE_DEBUG={value}"]})) is debug


SHAPES: list[dict[str, Any]] = [
    {"process": {"env": ["NOVALUE"]}},
    {"process": {"env": ["=x"]}},
    {"process": {"env": ["A=\0"]}},
    {"process": {"args": ["\ud800"]}},
    {"process": {"cwd": "relative"}},
    {"process": {"user": {"uid": -1}}},
    {"process": {"user": {"gid": True}}},
    {"process": {"user": {"additionalGids": ["wheel"]}}},
    {"process": {"user": "root"}},
    {"mounts": [{"destination": "/data", "options": "rbind"}]},
    {"mounts": [{"destination": "/data", "type": 3}]},
    {"mounts": [{"destination": "/data\0/x"}]},
    {"hooks": {"startContainer": ["x"]}},
    {"hooks": {"startContainer": [{"path": "bin/x"}]}},
    {"hooks": {"createContainer": [{"path": "/bin/x", "env": 3}]}},
    {"linux": {"namespaces": [{"type": "mount"}, "x"]}},
    {"linux": {"namespaces": [{"type": "mount"}], "devices": [{"type": "c"}]}},
    {"linux": {"namespaces": [{"type": "mount"}], "maskedPaths": [1]}},
    {"linux": {"namespaces": [{"type": "mount"}, {"type": "mount", "path": "/proc/1/ns/mnt"}]}},
    {"linux": {"namespaces": [{"type": "mount"}, {"type": "mount"}]}},
]


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_shapes_that_are_refused(change: dict[str, Any]) -> None:
    admission.check_shape(config())
    with pytest.raises(UsageError) as caught:
        admission.check_shape(config(**change))
    assert caught.value.id in ("config.oci.shape", "config.oci.namespace")


def test_absent_and_null_parts_are_the_same() -> None:
    document = config(mounts=None, annotations=None, hooks=None, process={"env": None, "user": None})
    assert admission.admit(admission.check_shape(document), manifest())["mounts"] == []


@given(values)
def test_what_has_a_shape_is_admitted_or_refused_and_never_a_fault(value: Any) -> None:
    document = config()
    for key in ("hooks", "annotations", "mounts"):
        document[key] = value
    document["process"]["user"] = value
    try:
        checked = admission.check_shape(document)
        admission.admit(checked, manifest())
    except InclavareError as error:
        assert error.remedy


def test_the_hosts_variables_never_stand_in_for_secrets() -> None:
    """Or a host that withholds an optional secret could choose it."""
    text = (
        '[process]\nargs = ["/bin/app"]\nenv_from_host = ["APP_*"]\n'
        '[[secrets]]\nuri = "kbs:///a/b/c"\nenv = "APP_KEY"\nrequired = false\n'
    )
    manifest = Manifest.parse(text)
    assert admission.admit_env(["APP_MODE=x"], manifest) == ["APP_MODE=x"]
    with pytest.raises(PolicyError) as caught:
        admission.admit_env(["APP_KEY=known"], manifest)
    assert caught.value.id == "admission.env.secret" and caught.value.found == "APP_KEY"

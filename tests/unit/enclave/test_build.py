"""Building enclave images from real images, with skopeo and umoci, and from directories."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recompute
from small_enclaves import Signers

import inclavare
from inclavare.enclave import oci, stored
from inclavare.enclave.build import Built, Recipe, build_image, derive_manifest
from inclavare.enclave.image import native_image, runtime_digest
from inclavare.enclave.manifest import Manifest
from inclavare.enclave.reference import Reference
from inclavare.enclave.signing import check_sigstruct
from inclavare.errors import IntegrityError, PlatformError, ResourceError, UsageError
from inclavare.sgx.image import EnclaveImage

PACKAGE = Path(inclavare.__file__).parent
_missing = [name for name in ("skopeo", "umoci", "busybox") if shutil.which(name) is None]
needs_tools = pytest.mark.skipif(
    bool(_missing) or os.geteuid() != 0, reason=f"needs root, skopeo, umoci and busybox; missing: {_missing or 'root'}"
)


def _sh(*argv: str | Path) -> str:
    return subprocess.run([str(arg) for arg in argv], check=True, capture_output=True, text=True).stdout


def _image_of(manifest: Manifest, root: bytes) -> EnclaveImage:
    return native_image(manifest, root, runtime_digest())


def _build(
    signers: Signers,
    source: str | Path,
    destination: str | Path | None,
    text: str = "",
    tls: bool = True,
    **options: Any,
) -> Built:
    recipe = Recipe(signers.ours, _image_of, text.encode(), "my.toml", tee="sgx-sim")
    opened = Reference.parse(str(source))
    target = opened if destination is None else Reference.parse(str(destination), destination=True)
    return build_image(opened, target, recipe, in_place=destination is None, tls_verify=tls, **options)


def _fill(root: Path) -> None:
    for name in ("bin", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n")
    (root / "etc/group").write_text("extra:x:7:app\n")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    _fill(root)
    (root / "bin/app").write_bytes(b"\x7fELF not really")
    (root / "bin/app").chmod(0o755)
    return root


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real busybox image in an OCI layout, tag ``one``, of two layers."""
    base = tmp_path_factory.mktemp("layout")
    root = base / "root"
    _fill(root)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    os.chown(root / "etc/group", 3, 4)
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    image = f"{base}/image:one"
    _sh("umoci", "init", "--layout", base / "image")
    _sh("umoci", "new", "--image", image)
    _sh("umoci", "insert", "--image", image, root, "/")
    (base / "more").write_text("second layer")
    _sh("umoci", "insert", "--image", image, base / "more", "/srv/more")
    _sh(
        *("umoci", "config", "--image", image, "--config.user", "app", "--config.workingdir", "/srv"),
        *("--config.entrypoint", "/bin/sh", "--config.cmd", "-c", "--config.cmd", "echo hi"),
        *("--config.env", "PATH=/bin", "--config.env", "A=x=y", "--config.label", "mine=kept"),
    )
    return base / "image"


def _unpacked(reference: str, work: Path, *tls: str) -> tuple[Path, dict[str, Any]]:
    """An image as others unpack it, and its configuration."""
    _sh("skopeo", "copy", "--quiet", *tls, reference, f"oci:{work}/check:x")
    config: dict[str, Any] = json.loads(_sh("skopeo", "inspect", "--config", f"oci:{work}/check:x"))
    _sh("umoci", "unpack", "--image", f"{work}/check:x", work / "bundle")
    return work / "bundle/rootfs", config


def _check(built: Built, root: Path) -> None:
    """Everything about a finished root file system, recomputed."""
    assert recompute.mrenclave(root, PACKAGE) == built.identity.mrenclave
    found = stored.read(root)
    assert found is not None and found.sigstruct is not None
    check_sigstruct(found.sigstruct, built.identity.image, found.manifest, built.identity.mrenclave)


def _leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


# --- images


@needs_tools
@pytest.mark.parametrize(
    "form", ["oci:{d}/out:new", "oci:{d}/out", "docker-archive:{d}/out.tar:one:latest", "oci-archive:{d}/o.tar:x"]
)
def test_image_to_image(layout: Path, tmp_path: Path, signers: Signers, form: str) -> None:
    destination = form.format(d=tmp_path)
    built = _build(signers, f"oci:{layout}:one", destination)
    source = "docker-archive:" + str(tmp_path / "out.tar") if form.startswith("docker") else destination
    root, config = _unpacked(source, tmp_path)
    _check(built, root)
    assert config["config"]["Entrypoint"] == ["/bin/sh"]
    assert config["config"]["Cmd"] == ["-c", "echo hi"]
    assert config["config"]["Labels"] == {"mine": "kept", "enclave.type": "sgx-sim"}
    assert config["config"]["Env"] == ["PATH=/bin", "A=x=y", "ENCLAVE_TYPE=sgx-sim"]
    assert len(config["rootfs"]["diff_ids"]) == 3
    process = built.identity.manifest.process
    assert process.args == ("/bin/sh", "-c", "echo hi")
    assert process.env == {"PATH": "/bin", "A": "x=y"}
    assert (process.cwd, process.user) == ("/srv", "1000:1001,7")
    assert _leftovers(tmp_path) == []


@needs_tools
def test_the_image_asks_for_the_measured_process(layout: Path, tmp_path: Path, signers: Signers) -> None:
    """Otherwise an engine would ask for the original's, and the start would be refused."""
    toml = '[process]\nargs = ["/bin/sh", "-c", "echo other"]\ncwd = "/tmp"\nuser = "3:4"\nenv = {A = "new"}\n'
    built = _build(signers, f"oci:{layout}:one", f"oci:{tmp_path}/out:x", toml)
    root, config = _unpacked(f"oci:{tmp_path}/out:x", tmp_path)
    _check(built, root)
    found = config["config"]
    assert [*found.get("Entrypoint", []), *found["Cmd"]] == ["/bin/sh", "-c", "echo other"]
    assert (found["WorkingDir"], found["User"]) == ("/tmp", "3:4")
    assert sorted(found["Env"]) == ["A=new", "ENCLAVE_TYPE=sgx-sim", "PATH=/bin"]
    assert found["Labels"]["mine"] == "kept"


@needs_tools
def test_archive_as_source_and_twice_the_same(layout: Path, tmp_path: Path, signers: Signers) -> None:
    _sh("skopeo", "copy", "--quiet", f"oci:{layout}:one", f"docker-archive:{tmp_path}/in.tar:one:1")
    first = _build(signers, f"docker-archive:{tmp_path}/in.tar", f"oci:{tmp_path}/a:x")
    second = _build(signers, f"oci:{layout}:one", f"oci:{tmp_path}/b:x")
    assert first.identity.mrenclave == second.identity.mrenclave
    # An enclave image built again is itself: its own layer is not measured, its variables are not the application's.
    third = _build(signers, f"oci:{tmp_path}/a:x", f"oci:{tmp_path}/c:x")
    assert third.identity.mrenclave == first.identity.mrenclave
    found = oci.stored_in_layout(oci.pull(Reference.parse(f"oci:{tmp_path}/c:x"), _directory(tmp_path / "w")))
    assert found is not None and found.tree.root == first.identity.tree.root


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\nhttp: {{addr: '{host}'}}\n"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://{host}/v2/", timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.skip("docker-registry did not start")
        yield host
    finally:
        process.kill()
        process.wait()


@needs_tools
def test_registry_to_registry(layout: Path, tmp_path: Path, signers: Signers, registry: str) -> None:
    _sh("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:one", f"docker://{registry}/in:1")
    built = _build(signers, f"docker://{registry}/in:1", f"docker://{registry}/out:1", tls=False)
    root, _ = _unpacked(f"docker://{registry}/out:1", tmp_path, "--src-tls-verify=false")
    _check(built, root)
    with pytest.raises(UsageError, match="reading docker://"):
        _build(signers, f"docker://{registry}/missing:1", f"oci:{tmp_path}/no", tls=False)


def test_plain_http_is_for_this_machine_only(tmp_path: Path, signers: Signers) -> None:
    if shutil.which("skopeo") is None or os.geteuid():
        pytest.skip("needs skopeo and root")
    with pytest.raises(UsageError, match="plain HTTP"):
        _build(signers, "docker://registry.example/in:1", f"oci:{tmp_path}/out", tls=False)


# --- directories


def test_rootfs_to_rootfs(rootfs: Path, tmp_path: Path, signers: Signers) -> None:
    os.link(rootfs / "bin/app", rootfs / "bin/again")
    (rootfs / "bin/sh").symlink_to("/etc/shadow")
    before = recompute.tree_root(rootfs)
    built = _build(signers, rootfs, tmp_path / "out", '[process]\nargs = ["/bin/app"]\nuser = "app"')
    _check(built, tmp_path / "out")
    assert built.identity.tree.root == before
    assert built.identity.manifest.process.user == "1000:1001,7"
    assert not (rootfs / ".inclavare").exists()
    assert _leftovers(tmp_path) == []


def test_in_place(rootfs: Path, signers: Signers) -> None:
    for _ in range(2):
        _check(_build(signers, rootfs, None, '[process]\nargs = ["/bin/app"]'), rootfs)


@needs_tools
def test_rootfs_to_image(rootfs: Path, tmp_path: Path, signers: Signers) -> None:
    rootfs.chmod(0o711)
    built = _build(
        signers, rootfs, f"oci:{tmp_path}/out:x", '[process]\nargs = ["/bin/app", "a b"]\nuser = "app"\nenv = {A = "1"}'
    )
    root, config = _unpacked(f"oci:{tmp_path}/out:x", tmp_path)
    _check(built, root)
    assert config["config"]["Cmd"] == ["/bin/app", "a b"]
    assert config["config"]["User"] == "1000:1001"
    assert config["config"]["Env"] == ["A=1", "ENCLAVE_TYPE=sgx-sim"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    made = tmp_path / "bundle"
    _fill(made / "rootfs")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/app"],
            "env": ["A=1", "ENCLAVE_RUNTIME_LOGLEVEL=debug"],
            "cwd": "/tmp",
            "user": {"uid": 5, "gid": 6, "additionalGids": [7]},
        },
        "root": {"path": "rootfs"},
        "annotations": {"mine": "kept"},
    }
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_bundle(bundle: Path, tmp_path: Path, signers: Signers) -> None:
    before = (bundle / "config.json").read_bytes()
    built = _build(signers, bundle, tmp_path / "out")
    _check(built, tmp_path / "out/rootfs")
    process = built.identity.manifest.process
    assert (process.args, process.env, process.cwd, process.user) == (("/bin/app",), {"A": "1"}, "/tmp", "5:6,7")
    document = json.loads((tmp_path / "out/config.json").read_bytes())
    assert document["annotations"] == {"mine": "kept", "enclave.type": "sgx-sim"}
    assert (bundle / "config.json").read_bytes() == before
    again = _build(signers, bundle, None)
    assert again.identity.mrenclave == built.identity.mrenclave
    assert json.loads((bundle / "config.json").read_bytes())["annotations"]["enclave.type"] == "sgx-sim"


def test_the_bundle_asks_for_the_measured_process(bundle: Path, tmp_path: Path, signers: Signers) -> None:
    toml = '[process]\nargs = ["/bin/other"]\ncwd = "/"\nuser = "8:9"\nenv = {A = "2", B = "3"}\n'
    _build(signers, bundle, tmp_path / "out", toml)
    process = json.loads((tmp_path / "out/config.json").read_bytes())["process"]
    assert (process["args"], process["cwd"]) == (["/bin/other"], "/")
    assert process["user"] == {"uid": 8, "gid": 9, "additionalGids": []}
    assert sorted(process["env"]) == ["A=2", "B=3", "ENCLAVE_RUNTIME_LOGLEVEL=debug"]


# --- wrong inputs


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("debian:12", "no such directory"),
        ("/no/such", "no such directory"),
        ("docker:x", "without //"),
        ("oci:", "no name"),
        ("/etc/hostname", "a file"),
    ],
)
def test_sources_that_are_none(text: str, found: str) -> None:
    with pytest.raises(UsageError, match="is not an image") as caught:
        Reference.parse(text)
    assert found in str(caught.value.found)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an image"):
        Reference.parse(str(tmp_path))
    (tmp_path / "oci-layout").touch()
    with pytest.raises(UsageError) as caught:
        Reference.parse(str(tmp_path))
    assert caught.value.remedy == f"write oci:{tmp_path}"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"root": {}}', b'{"root": {"path": "nowhere"}}', b'{"root": {"path": 3}}']
)
def test_bundles_that_are_none(tmp_path: Path, signers: Signers, content: bytes) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_bytes(content)
    with pytest.raises(UsageError, match="not a bundle's configuration"):
        _build(signers, tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_tools
def test_an_image_that_is_none(tmp_path: Path, signers: Signers) -> None:
    (tmp_path / "x.tar").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match="reading docker-archive"):
        _build(signers, f"docker-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/out")
    with pytest.raises(UsageError, match="reading oci:"):
        _build(signers, f"oci:{tmp_path}/missing:x", f"oci:{tmp_path}/out")
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


@needs_tools
def test_a_damaged_layer(layout: Path, tmp_path: Path, signers: Signers) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(layout, copy)
    blob = max((copy / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UsageError, match="reading oci:"):
        _build(signers, f"oci:{copy}:one", f"oci:{tmp_path}/out:x")
    assert not (tmp_path / "out").exists()


def test_missing_programs(layout_free: Path, signers: Signers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(layout_free))
    with pytest.raises(PlatformError, match="skopeo and umoci not found") as caught:
        _build(signers, "docker-daemon:x:1", f"oci:{layout_free}/out")
    assert caught.value.remedy == "apt-get install skopeo umoci"


@pytest.fixture
def layout_free(tmp_path: Path) -> Path:
    return _directory(tmp_path / "empty")


def test_existing_destinations_are_kept(rootfs: Path, tmp_path: Path, signers: Signers) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(UsageError, match="exists already") as caught:
        _build(signers, rootfs, out, '[process]\nargs = ["/bin/app"]')
    assert "--force" in (caught.value.remedy or "")
    assert os.listdir(out) == ["precious"]
    _build(signers, rootfs, out, '[process]\nargs = ["/bin/app"]', force=True)
    assert not (out / "precious").exists()
    assert _leftovers(tmp_path) == []
    with pytest.raises(UsageError, match="same directory"):
        _build(signers, rootfs, rootfs)
    with pytest.raises(UsageError, match="does not exist"):
        _build(signers, rootfs, tmp_path / "a/b")


@needs_tools
def test_existing_image_destinations(layout: Path, tmp_path: Path, signers: Signers) -> None:
    source = f"oci:{layout}:one"
    _build(signers, source, f"oci:{tmp_path}/out:x")
    index = (tmp_path / "out/index.json").read_bytes()
    for destination in (f"oci:{tmp_path}/out:x", f"docker-archive:{tmp_path}/file"):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UsageError, match="exists already"):
            _build(signers, source, destination)
    assert (tmp_path / "out/index.json").read_bytes() == index
    assert (tmp_path / "file").read_text() == "precious"
    _build(signers, source, f"oci:{tmp_path}/out:y")
    _build(signers, source, f"oci:{tmp_path}/out:x", force=True)
    names = [
        entry["annotations"]["org.opencontainers.image.ref.name"]
        for entry in json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]
    ]
    assert sorted(names) == ["x", "y"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(UsageError, match="not an OCI layout"):
        _build(signers, source, f"oci:{tmp_path}/other:x")


@needs_tools
def test_an_untagged_image_is_replaced(layout: Path, tmp_path: Path, signers: Signers) -> None:
    source, target = f"oci:{layout}:one", f"oci:{tmp_path}/out"
    index = tmp_path / "out/index.json"
    _build(signers, source, target, '[enclave]\nsize = "64M"')
    before = json.loads(index.read_bytes())["manifests"]
    _build(signers, source, f"{target}:kept")
    _build(signers, source, target, '[enclave]\nsize = "128M"', force=True)
    after = json.loads(index.read_bytes())["manifests"]
    plain = [entry for entry in after if not entry.get("annotations")]
    assert len(plain) == 1 and len(after) == 2
    assert plain[0]["digest"] != before[0]["digest"]


@pytest.mark.parametrize("text", ["", "[process]\nargs = []"])
def test_no_command(rootfs: Path, tmp_path: Path, signers: Signers, text: str) -> None:
    with pytest.raises(UsageError, match=r"my\.toml: process\.args is empty"):
        _build(signers, rootfs, tmp_path / "out", text)
    assert sorted(os.listdir(tmp_path)) == ["rootfs"]


def test_mistakes_in_the_manifest_leave_nothing(rootfs: Path, tmp_path: Path, signers: Signers) -> None:
    with pytest.raises(UsageError, match=r"my\.toml:3: process\.user_: unknown key"):
        _build(signers, rootfs, tmp_path / "out", '[process]\nargs = ["/bin/app"]\nuser_ = "app"')
    with pytest.raises(UsageError, match="cannot be resolved"):
        _build(signers, rootfs, tmp_path / "out", '[process]\nargs = ["/bin/app"]\nuser = "nobody"')
    assert sorted(os.listdir(tmp_path)) == ["rootfs"]


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_an_image_that_plays_tricks_with_the_reserved_name(
    rootfs: Path, tmp_path: Path, signers: Signers, kind: str
) -> None:
    victim = _directory(tmp_path / "victim")
    reserved = rootfs / ".inclavare"
    if kind == "file":
        reserved.touch()
    else:
        reserved.symlink_to(victim if kind == "link" else "/nowhere")
    for destination in (None, tmp_path / "out"):
        with pytest.raises(IntegrityError, match="not a directory"):
            _build(signers, rootfs, destination, '[process]\nargs = ["/bin/app"]')
    assert os.listdir(victim) == []


@needs_tools
def test_an_image_whose_passwd_points_at_the_hosts(layout: Path, tmp_path: Path, signers: Signers) -> None:
    shutil.copytree(layout, tmp_path / "copy")
    image = f"{tmp_path}/copy:one"
    (tmp_path / "passwd").symlink_to("../../../../../../../../etc/passwd")
    _sh("umoci", "insert", "--image", image, tmp_path / "passwd", "/etc/passwd")
    _sh("umoci", "config", "--image", image, "--config.user", "daemon")
    with pytest.raises((UsageError, IntegrityError)):
        _build(signers, f"oci:{image}", f"oci:{tmp_path}/out:x")


@needs_tools
def test_a_full_disk_leaves_nothing(layout: Path, rootfs: Path, tmp_path: Path, signers: Signers) -> None:
    small = _directory(tmp_path / "small")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        (rootfs / "bin/big").write_bytes(os.urandom(1 << 20))
        for source, destination in (
            (rootfs, small / "out"),
            (f"oci:{layout}:one", f"oci:{small}/out:x"),
            (f"oci:{layout}:one", f"docker-archive:{small}/out.tar"),
            (f"oci:{layout}:one", small / "out"),
        ):
            with pytest.raises(ResourceError, match="no space left") as caught:
                _build(signers, source, destination, '[process]\nargs = ["/bin/app"]\nuser = "0"')
            assert caught.value.remedy
            assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_temporary_files_are_removed(
    rootfs: Path, tmp_path: Path, signers: Signers, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = _directory(tmp_path / "tmp")
    monkeypatch.setenv("TMPDIR", str(temporary))
    _build(signers, rootfs, tmp_path / "out", '[process]\nargs = ["/bin/app"]')
    with pytest.raises(UsageError):
        _build(signers, rootfs, tmp_path / "out2")
    assert os.listdir(temporary) == []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="no temporary directory"):
        _build(signers, rootfs, tmp_path / "out2")


@pytest.mark.parametrize(
    "config", [{"Env": "A=1"}, {"Cmd": [1]}, {"User": 5}, {"Entrypoint": {}}, {"WorkingDir": ["/"]}]
)
def test_odd_image_configurations(rootfs: Path, config: dict[str, Any]) -> None:
    config = {"Cmd": ["/bin/app"], **config}
    if config.get("Entrypoint") == {}:
        assert derive_manifest(config, rootfs).process.args == ("/bin/app",)
        return
    with pytest.raises(UsageError, match="image's configuration is wrong"):
        derive_manifest(config, rootfs)


def test_an_image_may_name_its_platform(rootfs: Path) -> None:
    assert derive_manifest({"Cmd": ["/a"], "Env": ["ENCLAVE_TYPE=sgx-sim"]}, rootfs).enclave.tee == ("sgx-sim",)
    assert derive_manifest({"Cmd": ["/a"], "Labels": {"enclave.type": "intelSgx"}}, rootfs).enclave.tee == ("sgx",)
    with pytest.raises(UsageError, match="unknown enclave type"):
        derive_manifest({"Cmd": ["/a"], "Env": ["ENCLAVE_TYPE=tdx"]}, rootfs)

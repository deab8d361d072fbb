"""Gramine's memory layout, against what Gramine 1.9's own signing tool computes for the same manifest and loader."""

from __future__ import annotations

import hashlib
import struct
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.enclave import gramine, gramine_toml
from inclavare.errors import InclavareError, IntegrityError, UsageError
from inclavare.sgx.measure import measure

PAGE = 4096


def libpal() -> bytes:
    """A shared object of 64 bits with a read-only, a code and a data segment, the last with a tail of zeros."""
    segments = [(4, 0, 0, 0x1000, 0x1000), (5, 0x1000, 0x1000, 0x51, 0x51), (6, 0x2EF8, 0x3EF8, 0x10C, 0x4F48)]
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0x1010, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    for flags, offset, address, file_size, memory_size in segments:
        header += struct.pack("<IIQQQQQQ", 1, flags, offset, address, address, file_size, memory_size, PAGE)
    body = bytearray(0x2EF8 + 0x10C)
    body[: len(header)] = header
    for at in range(0x1000, len(body)):
        body[at] = at * 7 % 251
    return bytes(body)


def manifest(more: str = "", features: str = "", *, size: str = "256M", threads: int = 8) -> bytes:
    return (
        f'[loader]\nentrypoint = {{ uri = "file:/x/libsysdb.so", sha256 = "{"ab" * 32}" }}\n[sgx]\n'
        f'enclave_size = "{size}"\nmax_threads = {threads}\nisvprodid = 7\nisvsvn = 3\n{more}\n'
        f"[sgx.cpu_features]\n{features}\n"
    ).encode()


#: More of the manifest, CPU features, and MRENCLAVE as graminelibos.get_tbssigstruct() of Gramine 1.9 computes it.
KNOWN = [
    (
        "debug = true",
        'avx = "required"\npkru = "required"',
        "256M",
        8,
        "694b2149b1c7e6f9ae635f62cbac4f15bbe99e8497363acd6450e6e1b9fdc617",
    ),
    (
        "edmm_enable = true\nuse_exinfo = true",
        'amx = "disabled"',
        "1G",
        4,
        "b0d962bdad24c1a0c697b74f516e1feabe9f3e9d7317be11274ba805a077a6d5",
    ),
    ("", "", "64M", 1, "60ccb8ca091830372ac8a8c06704caf3c5f6d4ed0c72bd544897f0eaed754520"),
]


@pytest.mark.parametrize(("more", "features", "size", "threads", "mrenclave"), KNOWN)
def test_mrenclave_is_gramines(more: str, features: str, size: str, threads: int, mrenclave: str) -> None:
    image = gramine.image(manifest(more, features, size=size, threads=threads), libpal())
    assert measure(image).hex() == mrenclave


@pytest.mark.parametrize(
    ("more", "features", "fields"),
    [
        ("debug = true", 'avx = "required"\npkru = "required"', (6, 0x207, 0xFFFFFFFFFFF9FF1F, 0)),
        ("use_exinfo = true", 'amx = "disabled"', (4, 3, 0xFFFFFFFFFFFFFF1B, 1)),
        ("", "", (4, 3, 0xFFFFFFFFFFF9FF1B, 0)),
    ],
)
def test_sigstruct_fields_are_gramines(more: str, features: str, fields: tuple[int, ...]) -> None:
    found = gramine.sigstruct_fields(manifest(more, features))
    assert tuple(found[name] for name in ("attributes", "xfrm", "xfrm_mask", "miscselect")) == fields
    assert (found["isv_prod_id"], found["isv_svn"]) == (7, 3)


@pytest.mark.parametrize(
    "text",
    [
        b"not toml",
        b"\xff",
        b"sgx = 1",
        b"",
        b'[enclave]\nsize = "1G"',
        b"[sgx]\ncpu_features = 1",
        *(manifest(more) for more in ('debug = "yes"', "edmm_enable = 1")),
        *(manifest("", features) for features in ('avx = "maybe"', 'pkru = "unspecified"', "mpx = 1")),
        *(manifest(size=size) for size in ("", "12x", "3M", "0", "-1", "4K", "1e9G")),
        manifest(threads=0),
        manifest("isvprodid = 65536").replace(b"isvprodid = 7\n", b""),
    ],
)
def test_what_gramine_would_refuse(text: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        gramine.GramineManifest.parse(text)
    assert caught.value.id == "gramine.manifest"


def test_an_enclave_that_is_too_small_for_its_threads() -> None:
    with pytest.raises(UsageError) as caught:
        gramine.image(manifest(size="2M", threads=8), libpal())
    assert caught.value.id == "gramine.size"


@given(st.integers(0, 400), st.binary(min_size=1, max_size=9))
def test_damaged_loaders_are_refused_or_are_other_enclaves(at: int, junk: bytes) -> None:
    text, good = manifest(size="64M", threads=1), libpal()
    damaged = good[:at] + junk + good[at + len(junk) :]
    try:
        image = gramine.image(text, damaged)
    except InclavareError:
        return
    if damaged != good:
        # Bytes of headers that nobody loads may change; what is loaded may not, unnoticed.
        assert measure(image) != measure(gramine.image(text, good)) or at < 0x1000


def _tree(root: Path) -> Path:
    (root / "lib/deep").mkdir(parents=True)
    (root / "lib/a").write_bytes(b"a")
    (root / "lib/deep/b").write_bytes(b"b" * 3_000_000)
    (root / "lib/out").symlink_to("/")
    (root / "one").write_bytes(b"1")
    (root / "libsysdb.so").write_bytes(b"libos")
    return root


def test_trusted_files_are_expanded_and_hashed(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    text = (
        f'[loader]\nentrypoint = "file:{root}/libsysdb.so"\n[sgx]\n'
        f'trusted_files = ["file:{root}/one", {{ uri = "file:/given", sha256 = "{"00" * 32}" }}, "file:{root}/lib/"]\n'
    )
    seen = []
    signed = gramine.with_hashes(text.encode(), progress=seen.append)
    document = tomllib.loads(signed.decode())
    expected = [
        (f"file:{root}/one", hashlib.sha256(b"1").hexdigest()),
        ("file:/given", "00" * 32),
        (f"file:{root}/lib/a", hashlib.sha256(b"a").hexdigest()),
        (f"file:{root}/lib/deep/b", hashlib.sha256(b"b" * 3_000_000).hexdigest()),
    ]
    assert [(entry["uri"], entry["sha256"]) for entry in document["sgx"]["trusted_files"]] == expected
    assert document["loader"]["entrypoint"]["sha256"] == hashlib.sha256(b"libos").hexdigest()
    assert document["sgx"]["cpu_features"]["mpx"] == "disabled" and document["sgx"]["enclave_size"] == "256M"
    assert sum(seen) == 1 + 1 + 3_000_000 + 5
    with pytest.raises(UsageError):
        gramine.check_trusted_files(signed)  # /given does not exist
    good = signed.replace(b"file:/given", f"file:{root}/one".encode()).replace(b"00" * 32, expected[0][1].encode())
    gramine.check_trusted_files(good)
    (root / "lib/a").write_bytes(b"A")
    with pytest.raises(IntegrityError) as caught:
        gramine.check_trusted_files(good)
    assert caught.value.id == "gramine.trusted"


@pytest.mark.parametrize(
    "entry",
    ['"https://x"', '"file:{0}/lib"', '"file:{0}/one/"', '{{ uri = "file:{0}/lib/", sha256 = "00" }}', "1",
     '"file:{0}/missing"', '{{ uri = "file:{0}/one", other = 1 }}'],
)  # fmt: skip
def test_trusted_files_that_are_refused(tmp_path: Path, entry: str) -> None:
    root = _tree(tmp_path)
    text = f'[loader]\nentrypoint = "file:{root}/libsysdb.so"\n[sgx]\ntrusted_files = [{entry.format(root)}]\n'
    with pytest.raises(UsageError) as caught:
        gramine.with_hashes(text.encode())
    assert caught.value.id == "gramine.trusted"


#: What ``gramine-sgx-sign`` of Gramine 1.9 writes for the manifest below, with ``ROOT`` for the directory.
SIGNED = """\
[libos]
entrypoint = "/bin/x"

[loader]
log_level = "error"

[loader.env]
LD = "/lib\ttab"

[loader.entrypoint]
uri = "file:ROOT/libsysdb.so"
sha256 = "LIBOS"

[fs]
mounts = [
    { path = "/lib", uri = "file:/lib" },
    { type = "tmpfs", path = "/tmp" },
]

[sgx]
debug = true
enclave_size = "512M"
max_threads = 4
isvprodid = 0
isvsvn = 0
remote_attestation = "none"
enable_stats = false
edmm_enable = false
use_exinfo = false

[[sgx.trusted_files]]
uri = "file:ROOT/one"
sha256 = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"

[[sgx.trusted_files]]
uri = "file:ROOT/lib/a"
sha256 = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"

[sgx.cpu_features]
avx512 = "required"
avx = "unspecified"
amx = "unspecified"
mpx = "disabled"
pkru = "disabled"
"""


def test_the_signed_manifest_is_gramines_byte_for_byte(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    text = f"""
        libos.entrypoint = "/bin/x"
        loader.log_level = "error"
        loader.env.LD = "/lib\\ttab"
        fs.mounts = [ {{ path = "/lib", uri = "file:/lib" }}, {{ type = "tmpfs", path = "/tmp" }} ]
        sgx.debug = true
        sgx.enclave_size = "512M"
        sgx.trusted_files = [ "file:{root}/one", {{ uri = "file:{root}/lib/a" }}, "file:{root}/one" ]
        sgx.cpu_features.avx512 = "required"
    """
    signed = gramine.with_hashes(text.encode(), libos=root / "libsysdb.so").decode()
    libos = hashlib.sha256(b"libos").hexdigest()
    expected = SIGNED.replace("LIBOS", libos)
    assert signed.replace(str(root), "ROOT") == expected


def test_a_file_that_is_named_twice(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    head = f'[loader]\nentrypoint.uri = "file:{root}/libsysdb.so"\n[sgx]\n'
    one, given = f"file:{root}/one", "ab" * 32
    named = f'{head}trusted_files = ["{one}", {{ uri = "{one}", sha256 = "{given}" }}, "file:{root}/"]\n'
    files = tomllib.loads(gramine.with_hashes(named.encode()).decode())["sgx"]["trusted_files"]
    assert files[0] == {"uri": one, "sha256": given}
    assert [file["uri"] for file in files].count(one) == 1
    twice = f'{head}trusted_files = [{{ uri = "{one}", sha256 = "{given}" }}, {{ uri = "{one}", sha256 = "00" }}]\n'
    with pytest.raises(UsageError) as caught:
        gramine.with_hashes(twice.encode())
    assert caught.value.id == "gramine.trusted"


def test_chroot(tmp_path: Path) -> None:
    """Names are those within, links do not lead out, and the entry point is the host's."""
    root = _tree(tmp_path / "root")
    (root / "lib/link").symlink_to("/one")
    (root / "lib/up").symlink_to("../../../../one")
    (tmp_path / "one").write_bytes(b"the host's")
    text = (
        f'[loader]\nentrypoint.uri = "file:{root}/libsysdb.so"\n[sgx]\ntrusted_files = ["file:/lib/", "file:/lib/up"]'
    )
    files = tomllib.loads(gramine.with_hashes(text.encode(), chroot=root).decode())["sgx"]["trusted_files"]
    one = hashlib.sha256(b"1").hexdigest()
    hashes = {file["uri"]: file["sha256"] for file in files}
    assert list(hashes)[:2] == ["file:/lib/a", "file:/lib/deep/b"]
    assert hashes["file:/lib/up"] == one
    with pytest.raises(UsageError):
        gramine.with_hashes(text.replace("file:/lib/up", "file:lib/a").encode(), chroot=root)


OLD = ("avx", "avx512", "amx", "mpx", "pkru")


@pytest.mark.parametrize(("name", "bits"), [*zip(OLD, (0x4, 0xE4, 0x60000, 0x18, 0x200), strict=True)])
@pytest.mark.parametrize("value", ["true", "false"])
def test_cpu_features_of_gramine_1_5(name: str, bits: int, value: str) -> None:
    """Its manifests have ``require_…`` keys, which fix no bits besides the usual ones."""
    text = manifest(f"require_{name} = {value}").replace(b"[sgx.cpu_features]", b"")
    found = gramine.GramineManifest.parse(text)
    assert found.xfrm == 3 | (bits if value == "true" else 0)
    assert found.xfrm_mask == gramine.XFRM_MASK
    everything = manifest("\n".join(f"require_{one} = {str(one == 'amx').lower()}" for one in OLD), 'avx = "required"')
    assert gramine.GramineManifest.parse(everything).xfrm == 0x60003


anything = st.recursive(
    st.booleans()
    | st.integers(-5, 1 << 40)
    | st.text(max_size=8)
    | st.sampled_from(["64M", "required", "file:/", "file:x\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["uri", "sha256", "entrypoint", "x"]), inner)
    ),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["max_threads", "enclave_size", "debug", "edmm_enable", "cpu_features", "isvsvn", "trusted_files"]
        ),
        anything,
    )
    | anything,
    anything,
)
def test_any_manifest_is_read_or_refused(sgx: object, loader: object) -> None:
    text = gramine_toml.dumps({"sgx": sgx, "loader": loader}).encode()
    # "file:/" would be the whole machine.
    for work in (
        lambda: gramine.image(text, libpal()),
        lambda: gramine.with_hashes(text.replace(b"file:/", b"file:?")),
    ):
        try:
            work()
        except InclavareError as refusal:
            assert refusal.id.startswith("gramine.")


def test_a_manifest_without_a_loader_says_so() -> None:
    with pytest.raises(UsageError) as caught:
        gramine.with_hashes(b"[sgx]\n")
    assert "libsysdb.so" in str(caught.value.remedy)

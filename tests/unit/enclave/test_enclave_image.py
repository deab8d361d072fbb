"""The native enclave image, and MRENCLAVE computed a second time from the documented format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import recompute

import inclavare
from inclavare.enclave import image
from inclavare.enclave.image import native_image, runtime_digest
from inclavare.enclave.manifest import Manifest
from inclavare.errors import UsageError
from inclavare.sgx.measure import measure

ROOT = bytes(range(32))
BASE = '[enclave]\nsize = "8M"\nthreads = 3\ntee = ["sgx-sim"]\n[process]\nargs = ["/bin/app", "x"]\ncwd = "/srv"\n'


def _mrenclave(text: str = BASE, root: bytes = ROOT) -> bytes:
    return measure(native_image(Manifest.parse(text), root, runtime_digest()))


def test_runtime_digest_agrees_with_the_documented_format() -> None:
    assert runtime_digest() == recompute.runtime_digest(Path(inclavare.__file__).parent)


def test_what_a_runelet_loads_is_measured() -> None:
    code = (
        "import sys, inclavare.runelet.session, inclavare.runtimes.native, inclavare.tee.sgx_sim as sim\n"
        "import inclavare.tee.sgx_sim.quoting, inclavare.tee.sgx_sim.provisioning, inclavare.attestation.channel\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items() if n.startswith('inclavare.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    package = Path(inclavare.__file__).parent
    names = {Path(path).relative_to(package) for path in loaded}
    assert len(names) > 40
    measured = {Path(directory) for directory in image._TRUSTED_CODE}
    unmeasured = {name for name in names if name.parent not in measured} - {Path("errors.py")}
    # How a node is set up, and what it writes into its log, is the host's.
    assert unmeasured == {Path("config.py"), Path("log.py")}


@pytest.mark.parametrize("size", ["1M", "3M", "8M", "12M"])
@pytest.mark.parametrize("threads", [1, 5, 64])
def test_agrees_with_the_documented_format(size: str, threads: int) -> None:
    # A long environment, so that the manifest takes several pages.
    manifest = Manifest.parse(f'[enclave]\nsize = "{size}"\nthreads = {threads}').with_process(env={"LONG": "ä" * 5000})
    computed = measure(native_image(manifest, ROOT, runtime_digest()))
    assert computed == recompute.mrenclave_of(manifest.canonical(), ROOT, runtime_digest())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"x"', '"y"'),
        ('"/srv"', '"/srw"'),
        ('["sgx-sim"]', '["sgx"]'),
        ("threads = 3", "threads = 4"),
        ('"8M"', '"16M"'),
        ("[process]", "debug = true\n[process]"),
        ("[process]", "isv_svn = 1\n[process]"),
        ("[process]", '[exec]\ncommands = ["/bin/ps"]\n[process]'),
        ("[process]", '[files]\nallowed = ["/data"]\n[process]'),
        ("[process]", "[process]\nargs_from_host = true"),
        ("[process]", "[process]\nenv_from_host = []"),
        ("[process]", '[process]\nuser = "1:1"'),
        ("[process]", '[attestation]\npolicy = "p"\n[process]'),
    ],
)
def test_every_policy_line_is_another_enclave(old: str, new: str) -> None:
    assert old in BASE
    assert _mrenclave(BASE.replace(old, new, 1)) != _mrenclave()


def test_the_tree_and_the_runtime_are_in_it() -> None:
    assert _mrenclave(root=bytes(32)) != _mrenclave()
    manifest = Manifest.parse(BASE)
    assert measure(native_image(manifest, ROOT, bytes(32))) != _mrenclave()


def test_comments_and_order_are_not() -> None:
    head, tail = BASE.split("[process]")
    assert _mrenclave(f"# a comment\n[process]{tail}\n{head}") == _mrenclave()


def test_layout() -> None:
    image = native_image(Manifest.parse(BASE.replace("8M", "12M")), ROOT, runtime_digest())
    assert image.size == 16 << 20
    assert sum(run.count for run in image.runs) * 4096 == 12 << 20
    at = 0
    for run in image.runs:
        assert run.offset == at
        at = run.end
    assert image.attributes == 4
    assert native_image(Manifest.parse("[enclave]\ndebug = true"), ROOT, bytes(32)).attributes == 6


def test_too_small() -> None:
    with pytest.raises(UsageError, match="too small") as caught:
        native_image(Manifest.parse('[enclave]\nsize = "1M"\nthreads = 200'), ROOT, bytes(32))
    assert "at least" in str(caught.value.expected)


def test_digests_of_another_length_are_a_mistake() -> None:
    with pytest.raises(ValueError):
        native_image(Manifest(), b"short", bytes(32))

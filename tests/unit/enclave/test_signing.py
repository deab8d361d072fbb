"""Keys, SIGSTRUCTs made here and elsewhere, and the node's cache of them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from small_enclaves import Signers

from inclavare.config import Config
from inclavare.enclave import signing
from inclavare.enclave.image import native_image
from inclavare.enclave.manifest import Manifest
from inclavare.errors import IntegrityError, UsageError
from inclavare.sgx.image import EnclaveImage
from inclavare.sgx.measure import measure
from inclavare.sgx.structs import Sigstruct

MANIFEST = Manifest.parse('[enclave]\nsize = "2M"\nthreads = 1\nisv_prod_id = 5\nisv_svn = 2\ntee = ["sgx-sim"]')


@pytest.fixture
def image() -> EnclaveImage:
    return native_image(MANIFEST, bytes(32), bytes(32))


def _key(signers: Signers) -> Any:
    return signers.ours


def test_a_signature_is_over_this_enclave_and_no_other(image: EnclaveImage, signers: Signers) -> None:
    mrenclave = measure(image)
    made = signing.sign_image(image, MANIFEST, _key(signers))
    parsed = signing.check_sigstruct(made, image, MANIFEST, mrenclave)
    assert (parsed.enclave_hash, parsed.isv_prod_id, parsed.isv_svn) == (mrenclave, 5, 2)
    for manifest, hash_, name in (
        (MANIFEST, bytes(32), "ENCLAVEHASH"),
        (MANIFEST.with_enclave(isv_svn=3), mrenclave, "ISVSVN"),
        (MANIFEST.with_enclave(isv_prod_id=6), mrenclave, "ISVPRODID"),
    ):
        with pytest.raises(IntegrityError, match=name):
            signing.check_sigstruct(made, image, manifest, hash_)
    debug = native_image(MANIFEST.with_enclave(debug=True), bytes(32), bytes(32))
    with pytest.raises(IntegrityError, match="ATTRIBUTES"):
        signing.check_sigstruct(made, debug, MANIFEST, mrenclave)
    with pytest.raises(IntegrityError):
        signing.check_sigstruct(made[:600] + bytes([made[600] ^ 1]) + made[601:], image, MANIFEST, mrenclave)


def test_the_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.pem"
    with ThreadPoolExecutor(4) as pool:
        keys = [future.result() for future in [pool.submit(signing.load_or_make_key, path) for _ in range(4)]]
    assert len({key.private_numbers().d for key, _ in keys}) == 1
    assert sum(made for _, made in keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert signing.load_key(path).public_key().public_numbers().e == 3


def _pem(key: Any, encryption: Any = None) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return pem


def test_other_keys_are_refused(tmp_path: Path, signers: Signers) -> None:
    path = tmp_path / "key.pem"
    cases = {
        "exponent 65537": _pem(rsa.generate_private_key(65537, 3072)),
        "RSA-2048": _pem(rsa.generate_private_key(3, 2048)),
        "EllipticCurve|EC": _pem(ec.generate_private_key(ec.SECP256R1())),
        "encrypted": _pem(_key(signers), BestAvailableEncryption(b"x")),
        "not a PEM": b"rubbish",
    }
    import re

    for found, pem in cases.items():
        path.write_bytes(pem)
        with pytest.raises(UsageError, match="cannot sign enclaves") as caught:
            signing.load_key(path)
        assert re.search(found, str(caught.value.found))
        assert "openssl genrsa -3" in (caught.value.remedy or "")
    with pytest.raises(UsageError, match="cannot be read"):
        signing.load_key(tmp_path / "missing")


def test_signed_elsewhere(image: EnclaveImage, signers: Signers) -> None:
    key = _key(signers)
    data = signing.unsigned_data(image, MANIFEST)
    assert len(data) == signing.SIGNED_SIZE
    signature = key.sign(data, padding.PKCS1v15(), SHA256())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assembled = signing.attach_signature(data, signature, public)
    assert assembled == signing.sign_image(image, MANIFEST, key)
    with pytest.raises(IntegrityError):
        signing.attach_signature(data, signature[:-1] + bytes([signature[-1] ^ 1]), public)
    with pytest.raises(IntegrityError):
        signing.attach_signature(data[:40] + b"\1" + data[41:], signature, public)
    with pytest.raises(UsageError, match="signing data"):
        signing.attach_signature(data[:-1], signature, public)
    with pytest.raises(UsageError, match="public key"):
        signing.attach_signature(data, signature, b"rubbish")


def test_the_date_can_be_fixed(image: EnclaveImage, signers: Signers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = signing.sign_image(image, MANIFEST, _key(signers))
    assert Sigstruct.from_bytes(made).date == 0x20231114
    assert made == signing.sign_image(image, MANIFEST, _key(signers))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        signing.signing_date()


def test_the_node_signs_once(image: EnclaveImage, config: Config) -> None:
    first = signing.sign_on_node(image, MANIFEST, config)
    [entry] = (config.state_dir / "cache/sigstructs").iterdir()
    assert entry.read_bytes() == first
    assert signing.sign_on_node(image, MANIFEST, config) == first
    # Outside MRENCLAVE's pages, but inside the signature.
    other = signing.sign_on_node(image, MANIFEST.with_enclave(isv_svn=9), config)
    assert Sigstruct.from_bytes(other).isv_svn == 9
    entry.write_bytes(first[:-1] + b"\xff")
    assert signing.sign_on_node(image, MANIFEST, config) == first
    entry.write_bytes(b"")
    assert signing.sign_on_node(image, MANIFEST, config) == first
    config.node_signing_key.unlink()
    renewed = signing.sign_on_node(image, MANIFEST, config)
    assert Sigstruct.from_bytes(renewed).modulus != Sigstruct.from_bytes(first).modulus


def test_a_cached_signature_needs_no_cryptography(image: EnclaveImage, config: Config) -> None:
    signing.sign_on_node(image, MANIFEST, config)
    code = (
        "import sys; from pathlib import Path; from inclavare.config import Config; from inclavare.enclave import signing;"
        "from inclavare.enclave.image import native_image; from inclavare.enclave.manifest import Manifest;"
        "m = Manifest.from_canonical(sys.stdin.buffer.read());"
        f"signing.sign_on_node(native_image(m, bytes(32), bytes(32)), m, Config(state_dir=Path({str(config.state_dir)!r})));"
        "print('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=MANIFEST.canonical(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "False"

"""Signing enclaves: the RSA-3072 key with exponent 3, SIGSTRUCT over an image, and the node's cache of SIGSTRUCTs.

Only making and using a private key imports ``cryptography``; an enclave whose SIGSTRUCT is cached starts without it.
"""

from __future__ import annotations

import fcntl
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import IntegrityError, UsageError
from ..sgx import measure as sgx_measure
from ..sgx import sigstruct as sgx_sigstruct
from ..sgx.image import EnclaveImage
from ..sgx.structs import Sigstruct
from .manifest import Manifest
from .paths import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: Every attribute is fixed by the signer: none may be switched on or off by who loads the enclave.
_ALL_64 = (1 << 64) - 1
_ALL_32 = (1 << 32) - 1

SIGNED_SIZE = sgx_sigstruct.SIGNED_SIZE


def developer_key() -> Path:
    """Where ``inclavare build`` keeps a developer's own key."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "inclavare" / "signing-key.pem"


def load_key(path: Path) -> RSAPrivateKey:
    """Read a signing key.

    Raises:
        UsageError: missing, unreadable, encrypted, or not RSA-3072 with exponent 3.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"signing key {path} cannot be read",
            id="enclave.signing.key",
            found=error.strerror,
            expected="an RSA-3072 private key with exponent 3, PEM",
            remedy="name another file, or make one with: openssl genrsa -3 -out new-key.pem 3072",
        ) from None
    return _parse_key(pem, path)


def _parse_key(pem: bytes, path: Path) -> RSAPrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found = "not a PEM private key"
    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        found = "an encrypted key"
    except (ValueError, UnsupportedAlgorithm):
        pass
    else:
        if isinstance(key, RSAPrivateKey):
            exponent = key.public_key().public_numbers().e
            if key.key_size == 3072 and exponent == 3:
                return key
            found = f"RSA-{key.key_size} with exponent {exponent}"
        else:
            found = type(key).__name__.lstrip("_")
    raise UsageError(
        f"{path} cannot sign enclaves",
        id="enclave.signing.key",
        found=found,
        expected="an RSA-3072 private key with exponent 3, PEM, not encrypted",
        remedy="name another file, or make one with: openssl genrsa -3 -out new-key.pem 3072",
    )


def load_or_make_key(path: Path) -> tuple[RSAPrivateKey, bool]:
    """Read a signing key, or make it (mode 0600) if there is none; safe for several processes at once.

    Returns:
        The key, and whether it was made now.

    Raises:
        UsageError: it exists and is unusable, or its directory cannot be written.
        ResourceError: the disk is full.
    """
    try:
        return _parse_key(path.read_bytes(), path), False
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"signing key {path} cannot be read", id="enclave.signing.key", found=error.strerror) from None
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return _parse_key(path.read_bytes(), path), False
            key = generate_private_key(3, 3072)
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            write_atomically(path, pem, 0o600)
            return key, True
        finally:
            os.close(lock)
    except OSError as error:
        raise UsageError(
            f"signing key {path} cannot be made",
            id="enclave.signing.key",
            found=error.strerror,
            remedy="name a key with --key",
        ) from None


def signing_date() -> int:
    """Today (UTC) as BCD, ``0xyyyymmdd``; the day of ``SOURCE_DATE_EPOCH`` where that is set.

    Raises:
        UsageError: ``SOURCE_DATE_EPOCH`` is not a number.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        seconds = float(int(epoch)) if epoch else time.time()
        return int(time.strftime("%Y%m%d", time.gmtime(seconds)), 16)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            "SOURCE_DATE_EPOCH is not a time", id="enclave.signing.date", found=epoch, expected="seconds since 1970"
        ) from None


def sign_image(image: EnclaveImage, manifest: Manifest, key: RSAPrivateKey, *, mrenclave: bytes | None = None) -> bytes:
    """SIGSTRUCT over an image, 1808 bytes.

    Args:
        image: the pages.
        manifest: where ISVPRODID and ISVSVN come from.
        key: RSA-3072, exponent 3.
        mrenclave: MRENCLAVE of the image (32 bytes), if it has been computed already.

    Raises:
        UsageError: the key cannot sign enclaves.
    """
    return sgx_sigstruct.sign(mrenclave or sgx_measure.measure(image), key, **_fields(image, manifest)).to_bytes()


def sign_once(image: EnclaveImage, *, measurement: bytes | None = None) -> bytes:
    """A SIGSTRUCT, 1808 bytes, by a key that is thrown away. Product 0, version 1; everything as the image has it.

    Args:
        measurement: what to sign instead of the image's own MRENCLAVE, 32 bytes.
    """
    from cryptography.hazmat.primitives.asymmetric import rsa

    return sgx_sigstruct.sign(
        sgx_measure.measure(image) if measurement is None else measurement,
        rsa.generate_private_key(public_exponent=3, key_size=3072),
        attributes=image.attributes,
        attribute_mask=_ALL_64,
        xfrm=image.xfrm,
        xfrm_mask=_ALL_64,
        miscselect=image.miscselect,
        misc_mask=_ALL_32,
        isv_prod_id=0,
        isv_svn=1,
        date=signing_date(),
    ).to_bytes()


def unsigned_data(image: EnclaveImage, manifest: Manifest, *, mrenclave: bytes | None = None) -> bytes:
    """What a signer elsewhere signs (RSASSA-PKCS1-v1_5 with SHA-256): 256 bytes, SIGSTRUCT's 0–127 and 900–1027."""
    made = sgx_sigstruct.unsigned(mrenclave or sgx_measure.measure(image), **_fields(image, manifest))
    return made.signed_bytes()


def _fields(image: EnclaveImage, manifest: Manifest) -> sgx_sigstruct.SignedFields:
    return {
        "attributes": image.attributes,
        "attribute_mask": _ALL_64,
        "xfrm": image.xfrm,
        "xfrm_mask": _ALL_64,
        "miscselect": image.miscselect,
        "misc_mask": _ALL_32,
        "isv_prod_id": manifest.enclave.isv_prod_id,
        "isv_svn": manifest.enclave.isv_svn,
        "date": signing_date(),
    }


def attach_signature(unsigned: bytes, signature: bytes, public_key_pem: bytes) -> bytes:
    """SIGSTRUCT from what was signed elsewhere, 1808 bytes.

    Args:
        unsigned: the 256 bytes of :func:`unsigned_data`.
        signature: 384 bytes, big-endian as ``openssl dgst -sha256 -sign`` writes it, or little-endian as in SIGSTRUCT.
        public_key_pem: the signer's RSA-3072 public key with exponent 3.

    Raises:
        UsageError: a length is wrong, or the key is no such key.
        IntegrityError: the signature does not verify.
    """
    if len(unsigned) != SIGNED_SIZE or len(signature) != sgx_sigstruct.RSA_SIZE:
        raise UsageError(
            "these are not signing data and their signature",
            id="enclave.signing.external",
            found=f"{len(unsigned)} and {len(signature)} bytes",
            expected="256 bytes written by --gendata, and 384 bytes of RSA-3072 signature",
        )
    return sgx_sigstruct.catsig(unsigned, signature, sgx_sigstruct.public_modulus(public_key_pem)).to_bytes()


def check_sigstruct(sigstruct: bytes, image: EnclaveImage, manifest: Manifest, mrenclave: bytes) -> Sigstruct:
    """Check a SIGSTRUCT as EINIT would, and that it is over this enclave.

    Raises:
        IntegrityError: damaged, not signed correctly, or over another enclave; names the field.
    """
    parsed = Sigstruct.from_bytes(sigstruct)
    sgx_sigstruct.verify(parsed)
    from ..sgx.structs import Attributes

    wanted = Attributes(image.attributes, image.xfrm).to_bytes()
    mask = int.from_bytes(parsed.attribute_mask, "little")
    fields: tuple[tuple[str, object, object], ...] = (
        ("ENCLAVEHASH", parsed.enclave_hash.hex(), mrenclave.hex()),
        (
            "ATTRIBUTES",
            f"{int.from_bytes(parsed.attributes, 'little') & mask:#x}",
            f"{int.from_bytes(wanted, 'little') & mask:#x}",
        ),
        ("MISCSELECT", parsed.miscselect & parsed.misc_mask, image.miscselect & parsed.misc_mask),
        ("ISVPRODID", parsed.isv_prod_id, manifest.enclave.isv_prod_id),
        ("ISVSVN", parsed.isv_svn, manifest.enclave.isv_svn),
    )
    for name, found, expected in fields:
        if found != expected:
            raise IntegrityError(
                f"the SIGSTRUCT is over another enclave: {name} differs",
                id=f"enclave.signing.{name.lower()}",
                found=found,
                expected=expected,
                remedy="build the image again, or sign it again with: inclavare sign",
            )
    return parsed


def sign_on_node(image: EnclaveImage, manifest: Manifest, config: Config) -> bytes:
    """SIGSTRUCT by the node's own key for an image that carries none; made at first use and kept.

    Args:
        image: the pages.
        manifest: where ISVPRODID and ISVSVN come from.
        config: the node's; key and cache are in its ``state_dir``.

    Returns:
        1808 bytes. EINIT checks them against what it measured, so that on a cache hit nothing is measured here.

    Raises:
        UsageError: the node's key is unusable.
    """
    key_path = config.node_signing_key
    cache_dir = config.state_dir / "cache" / "sigstructs"
    try:
        cached = (cache_dir / _cache_name(image, manifest, key_path.read_bytes())).read_bytes()
        sgx_sigstruct.verify(Sigstruct.from_bytes(cached))
        return cached
    except (OSError, IntegrityError):
        # No key, no entry, or a damaged one: it costs a signature, nothing else.
        pass
    key, _ = load_or_make_key(key_path)
    made = sign_image(image, manifest, key)
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(cache_dir / _cache_name(image, manifest, key_path.read_bytes()), made, 0o600)
    except OSError:
        pass
    return made


def _cache_name(image: EnclaveImage, manifest: Manifest, pem: bytes) -> str:
    """Everything that the SIGSTRUCT depends on, without computing MRENCLAVE."""
    running = sha256(sha256(pem).digest())
    fixed = (image.size, image.ssa_frame_size, image.attributes, image.xfrm, image.miscselect)
    running.update(repr((fixed, manifest.enclave.isv_prod_id, manifest.enclave.isv_svn)).encode())
    for run in image.runs:
        content = b"" if run.data is None else sha256(run.data).digest()
        running.update(repr((run.offset, run.flags, run.count, run.measured)).encode() + content)
    return running.hexdigest()

"""Signing enclaves: the RSA-3072 key with exponent 3, SIGSTRUCT over an image, and the node's cache of SIGSTRUCTs.

Only making and using a private key imports ``cryptography``; an enclave whose SIGSTRUCT is cached starts without it.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import IntegrityError, ResourceError, UsageError
from ..sgx import measure as sgx_measure
from ..sgx import sigstruct as sgx_sigstruct
from ..sgx.image import EnclaveImage
from ..sgx.structs import Sigstruct
from .manifest import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: Every attribute is fixed by the signer: none may be switched on or off by who loads the enclave.
_ALL_64 = (1 << 64) - 1
_ALL_32 = (1 << 32) - 1

#: Bytes of SIGSTRUCT that the signature covers: 0–127 and 900–1027.
SIGNED_SIZE = 256


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
            remedy=f"make one with: openssl genrsa -3 -out {path} 3072",
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
        remedy=f"make one with: openssl genrsa -3 -out {path} 3072",
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


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that is either complete or not there.

    Raises:
        OSError: as open(2), write(2) and rename(2); nothing half-written stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as handle:
            handle.write(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
    return sgx_sigstruct.sign(
        mrenclave or sgx_measure.measure(image),
        key,
        attributes=image.attributes,
        attribute_mask=_ALL_64,
        xfrm=image.xfrm,
        xfrm_mask=_ALL_64,
        miscselect=image.miscselect,
        misc_mask=_ALL_32,
        isv_prod_id=manifest.enclave.isv_prod_id,
        isv_svn=manifest.enclave.isv_svn,
        date=signing_date(),
    ).to_bytes()


def unsigned_data(image: EnclaveImage, manifest: Manifest, *, mrenclave: bytes | None = None) -> bytes:
    """What a signer elsewhere signs (RSASSA-PKCS1-v1_5 with SHA-256): 256 bytes, SIGSTRUCT's 0–127 and 900–1027."""
    zeros = bytes(384)
    from ..sgx.structs import SIGSTRUCT_HEADER, SIGSTRUCT_HEADER2, Attributes

    return Sigstruct(
        header=SIGSTRUCT_HEADER,
        vendor=0,
        date=signing_date(),
        header2=SIGSTRUCT_HEADER2,
        swdefined=0,
        modulus=zeros,
        exponent=3,
        signature=zeros,
        miscselect=image.miscselect,
        misc_mask=_ALL_32,
        cet_attributes=0,
        cet_attributes_mask=0,
        isv_family_id=bytes(16),
        attributes=Attributes(image.attributes, image.xfrm).to_bytes(),
        attribute_mask=Attributes(_ALL_64, _ALL_64).to_bytes(),
        enclave_hash=mrenclave or sgx_measure.measure(image),
        isv_ext_prod_id=bytes(16),
        isv_prod_id=manifest.enclave.isv_prod_id,
        isv_svn=manifest.enclave.isv_svn,
        q1=zeros,
        q2=zeros,
    ).signed_bytes()


def attach_signature(unsigned: bytes, signature: bytes, public_key_pem: bytes) -> bytes:
    """SIGSTRUCT from what was signed elsewhere, 1808 bytes.

    Args:
        unsigned: the 256 bytes of :func:`unsigned_data`.
        signature: 384 bytes, big-endian as ``openssl dgst -sha256 -sign`` writes it.
        public_key_pem: the signer's RSA-3072 public key with exponent 3.

    Raises:
        UsageError: a length is wrong, or the key is no such key.
        IntegrityError: the signature does not verify.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if len(unsigned) != SIGNED_SIZE or len(signature) != 384:
        raise UsageError(
            "these are not signing data and their signature",
            id="enclave.signing.external",
            found=f"{len(unsigned)} and {len(signature)} bytes",
            expected="256 bytes written by --gendata, and 384 bytes of RSA-3072 signature",
        )
    try:
        key = load_pem_public_key(public_key_pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, RSAPublicKey) or key.key_size != 3072 or key.public_numbers().e != 3:
        raise UsageError(
            "the public key cannot belong to an enclave signer",
            id="enclave.signing.external",
            expected="an RSA-3072 public key with exponent 3, PEM",
            remedy="export it with: openssl rsa -in key.pem -pubout",
        )
    modulus = key.public_numbers().n
    number = int.from_bytes(signature, "big")
    q1, q2 = sgx_sigstruct.q1_q2(number, modulus)
    body = unsigned[:128] + modulus.to_bytes(384, "little") + (3).to_bytes(4, "little") + bytes(384) + unsigned[128:]
    try:
        found = replace(
            Sigstruct.from_bytes(body.ljust(1808, b"\0")),
            signature=number.to_bytes(384, "little"),
            q1=q1.to_bytes(384, "little"),
            q2=q2.to_bytes(384, "little"),
        )
    except OverflowError:
        raise IntegrityError(
            "the signature does not verify", id="enclave.signing.external", remedy="sign the data again"
        ) from None
    sgx_sigstruct.verify(found)
    return found.to_bytes()


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


def cached_sigstruct(
    image: EnclaveImage, manifest: Manifest, mrenclave: bytes, key_path: Path, cache_dir: Path
) -> bytes:
    """SIGSTRUCT by the node's own key, made at first use and kept.

    Args:
        image: the pages.
        manifest: where ISVPRODID and ISVSVN come from.
        mrenclave: MRENCLAVE of ``image``, 32 bytes.
        key_path: the node's key; made if missing.
        cache_dir: normally ``state_dir/cache/sigstructs``.

    Raises:
        UsageError: the key is unusable.
    """
    try:
        pem: bytes | None = key_path.read_bytes()
    except OSError:
        pem = None
    if pem is not None:
        known = cache_dir / _cache_name(image, manifest, mrenclave, pem)
        try:
            cached = known.read_bytes()
            check_sigstruct(cached, image, manifest, mrenclave)
            return cached
        except (OSError, IntegrityError):
            # Damage costs a signature, nothing else.
            pass
    key, _ = load_or_make_key(key_path)
    made = sign_image(image, manifest, key, mrenclave=mrenclave)
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(cache_dir / _cache_name(image, manifest, mrenclave, key_path.read_bytes()), made, 0o600)
    except OSError:
        pass
    return made


def sign_on_node(image: EnclaveImage, manifest: Manifest, config: Config) -> bytes:
    """SIGSTRUCT by the node's key for an image that carries none, 1808 bytes; see :func:`cached_sigstruct`.

    Raises:
        UsageError: the node's key is unusable.
    """
    mrenclave = sgx_measure.measure(image)
    cache_dir = config.state_dir / "cache" / "sigstructs"
    return cached_sigstruct(image, manifest, mrenclave, config.node_signing_key, cache_dir)


def _cache_name(image: EnclaveImage, manifest: Manifest, mrenclave: bytes, pem: bytes) -> str:
    # Attributes and SVNs are outside MRENCLAVE, so they have to be part of the name.
    rest = (image.attributes, image.xfrm, image.miscselect, manifest.enclave.isv_prod_id, manifest.enclave.isv_svn)
    return sha256(mrenclave + sha256(pem).digest() + repr(rest).encode()).hexdigest()


def full_disk(what: str, error: OSError) -> ResourceError:
    """The error for a write that failed for want of space."""
    return ResourceError(
        f"no space left for {what}",
        id="enclave.disk.full",
        found=error.strerror,
        remedy="free some space, or set TMPDIR to a larger file system, and try again; nothing half-written was left",
    )

"""``ca``: an authority that gives attested workloads short-lived X.509 certificates with a SPIFFE id.

::

    [[plugins]]
    type = "ca"
    name = "ca"                        # kbs+ca:///…
    tenants = ["default"]
    certificate = "/etc/…/ca.pem"      # the authority's certificate (its chain may follow) …
    key_file = "/etc/…/ca-key.pem"     # … and its key, EC or RSA, mode 0600
    trust_domain = "example.org"
    lifetime = "1h"
    dns_suffix = ""                    # certificates may name hosts below it: ".svc.example.org"

``GET issue/<path…>`` certifies the TEE's own key (EC keys only); ``?csr=<base64url of DER>``, or ``POST`` with the
request (PEM or DER) as the body, certifies another one: the request's signature proves its possession, and nothing but
its key is taken from it. ``?dns=a.svc.example.org,b.svc.example.org`` asks for host names.

The SPIFFE id is ``spiffe://<trust_domain>/<tenant>/<path…>`` (SPIFFE-ID, X509-SVID). Which paths an enclave may have is
for the tenant's resource policy to say, by ``data["resource-path"]``; without one there are no certificates. The answer
is PEM: certificate, authority. The authority's certificate alone: ``GET bundle``.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...enclave.signing_access import read_private
from ..store.errors import Invalid, NotFound
from . import Answer, settings

if TYPE_CHECKING:
    from cryptography import x509

    from ..config import VerdictConfig
    from ..store import Store
    from . import Request, Workload

_SEGMENT = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,252}[a-z0-9])?")
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MAX_PARTS = 8
_MAX_NAMES = 8
_BACKDATED = timedelta(minutes=1)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module."""

    certificate: str
    key_file: str
    trust_domain: str
    lifetime: str = "1h"
    dns_suffix: str = ""


class CaPlugin:
    """See :class:`inclavare.verdict.plugins.Plugin`."""

    methods = frozenset({"GET", "POST"})
    needs_resource_policy = True

    def __init__(self, config: Settings, lifetime: timedelta, chain: list[x509.Certificate], key: Any) -> None:
        self._config = config
        self._lifetime = lifetime
        self._chain = chain
        self._key = key

    def policy(self, tenant: str, request: Request) -> str | None:
        """The tenant's default decides."""
        return None

    def fetch(self, tenant: str, request: Request, workload: Workload) -> Answer:
        """See the module."""
        from cryptography.hazmat.primitives.serialization import Encoding

        kind, *path = request.path
        authority = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self._chain)
        if kind == "bundle" and not path and request.method == "GET":
            return Answer(authority)
        if kind != "issue":
            raise NotFound("the authority is not asked for this", id="verdict.plugin.ca.unknown")
        if not 1 <= len(path) <= _MAX_PARTS or not all(_SEGMENT.fullmatch(part) for part in path):
            raise Invalid("not a SPIFFE id's path", id="verdict.plugin.ca.path", found=request.name[:200])
        identity = f"spiffe://{self._config.trust_domain}/{tenant}/{'/'.join(path)}"
        made = self._issue(_public_key(request, workload), identity, self._hosts(request.query.get("dns", "")))
        detail = {
            "spiffe_id": identity,
            "serial": f"{made.serial_number:x}",
            "until": made.not_valid_after_utc.isoformat(),
        }
        return Answer(made.public_bytes(Encoding.PEM) + authority, detail)

    def _hosts(self, text: str) -> list[str]:
        hosts = [host for host in text.split(",") if host]
        suffix = self._config.dns_suffix
        for host in hosts:
            if not suffix or not host.endswith(suffix) or not _HOST.fullmatch(host) or len(hosts) > _MAX_NAMES:
                raise Invalid("a host name that is not certified", id="verdict.plugin.ca.dns", found=host[:253],
                              expected=f"names below {suffix}" if suffix else "none")  # fmt: skip
        return hosts

    def _issue(self, public_key: Any, identity: str, hosts: list[str]) -> x509.Certificate:
        from cryptography import x509
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.x509.oid import ExtendedKeyUsageOID

        authority = self._chain[0]
        now = datetime.now(UTC)
        end = min(now + self._lifetime, authority.not_valid_after_utc)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity), *map(x509.DNSName, hosts)]
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(authority.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _BACKDATED, authority.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            # RFC 5280, 4.2.1.6: critical where there is no subject.
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
            .sign(self._key, SHA256())
        )


def create(name: str, table: dict[str, Any], config: VerdictConfig, store: Store) -> CaPlugin:
    """The plugin.

    Raises:
        UsageError: a wrong configuration; the certificate is no authority's, or the key not its.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from ..config import duration

    found = settings(name, table, Settings)

    def wrong(key: str, why: object) -> Invalid:
        return Invalid(f"the plugin {name}: {key} is wrong", id=f"verdict.plugin.ca.{key}", found=why)

    try:
        lifetime = timedelta(seconds=duration(found.lifetime))
    except ValueError as error:
        raise wrong("lifetime", error) from None
    if not _DOMAIN.fullmatch(found.trust_domain):
        raise wrong("trust_domain", found.trust_domain)
    if found.dns_suffix and not (found.dns_suffix.startswith(".") and _HOST.fullmatch(found.dns_suffix[1:])):
        raise wrong("dns_suffix", found.dns_suffix)
    try:
        key = load_pem_private_key(read_private(Path(found.key_file), "verdict.plugin.ca.key_file"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise wrong("key_file", type(error).__name__) from None
    try:
        chain = x509.load_pem_x509_certificates(Path(found.certificate).read_bytes())
        is_authority = chain[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise wrong("certificate", type(error).__name__) from None
    if not is_authority:
        raise wrong("certificate", "not an authority's")
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) or key.public_key() != chain[0].public_key():
        raise wrong("key_file", "the key of another certificate, or neither EC nor RSA")
    return CaPlugin(found, lifetime, chain, key)


def _public_key(request: Request, workload: Workload) -> Any:
    """The key to certify; whoever asks has proven to possess it."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    text = request.query.get("csr")
    if request.method == "GET" and text is None:
        if workload.key is None or workload.key.jwk["kty"] != "EC":
            # An RSA key that decrypts must not sign, too.
            raise Invalid(
                "this key is not certified", id="verdict.plugin.ca.key", expected="an EC key, or a request (csr)"
            )
        return workload.key.public_key
    try:
        raw = request.body if text is None else base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        asked = (x509.load_pem_x509_csr if raw.startswith(b"-----") else x509.load_der_x509_csr)(raw)
        key = asked.public_key()
        good = asked.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, binascii.Error):
        raise Invalid(
            "not a certificate request", id="verdict.plugin.ca.csr", expected="PKCS #10, DER or PEM"
        ) from None
    if isinstance(key, rsa.RSAPublicKey):
        good = good and key.key_size >= 2048
    elif not (isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1", "secp521r1")):
        good = False
    if not good:
        raise Invalid("the request's key is not certified", id="verdict.plugin.ca.csr",
                      expected="a signature that holds; EC P-256 to P-521, or RSA of at least 2048 bits")  # fmt: skip
    return key

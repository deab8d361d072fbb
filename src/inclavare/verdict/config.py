"""verdictd's configuration, ``verdictd.toml``: every key with a default, an unknown one refused with its line.

::

    listen = "127.0.0.1:8443"          # address and port; every interface: "[::]:8443"
    public_url = ""                    # as clients see it, without a path; default https://<listen>
    state_dir = "/var/lib/inclavare/verdictd"
    workers = 1                        # processes; each verifies on one core

    [tls]
    certificate = ""                   # PEM chain; default: self-made in state_dir by `inclavare verdictd init`
    key = ""                           # PEM
    names = []                         # more names and addresses for the self-made certificate
    minimum = "1.3"                    # "1.2" for clients that know no better
    client_ca = ""                     # authority of administrators' certificates; nobody else needs one

    [store]
    url = ""                           # default sqlite:///<state_dir>/store.db
    url_file = ""                      # file (0600) with the URL, where it has a password in it

    [master_key]
    kind = "file"                      # file, passphrase, sealed (to verdictd's enclave) or vault-transit
    file = ""                          # key, passphrase or sealed key, mode 0600; default <state_dir>/master.key
    seal_policy = "mrenclave"          # or mrsigner: later versions of the enclave open it, too
    vault = {url = "", key = "", token_file = "", mount = "transit", namespace = "", ca_file = ""}

    [collateral]                       # for evidence that carries none; asked in this order
    sources = []                       # "https://pccs:8081", "intel", "amd", "file:/path.json", "platform" (sgx-sim's)
    refresh_after = "1d"
    pccs_check_certificate = true

    [tokens]                           # attestation tokens (EAR)
    issuer = "CoCo-Attestation-Service"
    lifetime = "5m"

    [attestation]
    nonce_life = "5m"                  # from challenge to evidence
    threads = 8                        # blocking work (verification, policies, database) at once, in each process
    keep_evidence = true               # the newest, for dry-runs of changed policies

    [limits]
    body = "64K"                       # of a request; of an attestation: evidence
    evidence = "1M"
    client_requests = 600              # a minute for each client address; a tenant's are its quota
    connections = 1024
    connection_life = "2m"             # whatever it does
    request_time = "10s"               # until a request's body is complete
    verifications = 64                 # waiting or under way; more are sent away with 503
    clock_skew = "30s"                 # tolerated in times that others wrote

    [tenants]                          # quotas of a new tenant
    secrets = 1000
    bytes = "64M"
    policies = 100
    requests = 6000                    # a minute

    [auth]                             # administrators
    token_life = "30d"                 # longest life of a token
    [[auth.oidc]]                      # OpenID Connect: who has this claim with this value has the role
    issuer = "https://login.example"
    audience = "verdictd"
    claim = "groups"
    value = "security"
    tenant = "default"                 # "*": every tenant
    role = "auditor"                   # admin, operator, auditor
    subject_claim = "sub"
    jwks_uri = ""                      # default: by discovery
    ca_file = ""
    [[auth.certificates]]              # TLS client certificates of tls.client_ca
    subject = "CN=alice,O=Example"     # RFC 4514; or
    san = ""                           # "DNS:…", "URI:…", "email:…" of the certificate; both, if both are given
    tenant = "default"
    role = "admin"

    [[plugins]]                        # kbs+<name>:///…  for the tenants that it names
    type = "vault"                     # vault, pkcs11, ca
    name = "vault"
    tenants = ["default"]
    …                                  # see inclavare.verdict.plugins

    [web]
    enabled = true

    [secret_provisioning]              # Gramine's protocol (libsecret_prov_attest)
    listen = ""                        # "127.0.0.1:4433"; empty: not served
    tenant = "default"
    secret = ""                        # the path of the secret that accepted enclaves get: "app/key/1"
    tls12 = false                      # for Gramine before 1.8

    [telemetry]
    log = ""                           # file for JSON lines; default standard error
    level = "info"                     # debug, info, warning, error
    metrics_token_file = ""            # bearer token (0600) for /metrics; without it, this machine only
    otlp_endpoint = ""                 # OpenTelemetry over HTTP, https://collector:4318/v1/traces
    otlp_headers_file = ""             # file (0600), name=value lines
    otlp_ca_file = ""
    sample = 1.0                       # share of requests that are traced

What is secret stands in a file of its own that only its owner can read, never here and never in the environment.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..config import parse_size
from ..errors import UsageError

DEFAULT_PATH = "/etc/inclavare/verdictd.toml"

Role = Literal["admin", "operator", "auditor"]
_Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Seconds(int):
    """Written ``"90s"``, ``"5m"``, ``"2h"`` or ``"1d"``."""


class Size(int):
    """Bytes; written ``4096``, ``"64K"`` or ``"1M"``."""


class AbsolutePath(str):
    """An absolute path; empty where the default counts."""


class _Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Tls(_Table, frozen=True):
    certificate: AbsolutePath = AbsolutePath()
    key: AbsolutePath = AbsolutePath()
    names: tuple[str, ...] = ()
    minimum: Literal["1.2", "1.3"] = "1.3"
    client_ca: AbsolutePath = AbsolutePath()


class StoreSection(_Table, frozen=True):
    url: str = ""
    url_file: AbsolutePath = AbsolutePath()


class VaultTransit(_Table, frozen=True):
    url: str = ""
    key: str = ""
    token_file: AbsolutePath = AbsolutePath()
    mount: str = "transit"
    namespace: str = ""
    ca_file: AbsolutePath = AbsolutePath()


class MasterKeySection(_Table, frozen=True):
    kind: Literal["file", "passphrase", "sealed", "vault-transit"] = "file"
    file: AbsolutePath = AbsolutePath()
    seal_policy: Literal["mrenclave", "mrsigner"] = "mrenclave"
    vault: VaultTransit = VaultTransit()


class CollateralSection(_Table, frozen=True):
    sources: tuple[str, ...] = ()
    refresh_after: Seconds = Seconds(86400)
    pccs_check_certificate: bool = True


class Tokens(_Table, frozen=True):
    issuer: Annotated[str, Meta(min_length=1, max_length=256)] = "CoCo-Attestation-Service"
    lifetime: Seconds = Seconds(300)


class AttestationSection(_Table, frozen=True):
    nonce_life: Seconds = Seconds(300)
    threads: Annotated[int, Meta(ge=1, le=256)] = 8
    keep_evidence: bool = True


class Limits(_Table, frozen=True):
    body: Size = Size(64 << 10)
    evidence: Size = Size(1 << 20)
    client_requests: _Count = 600
    connections: _Count = 1024
    connection_life: Seconds = Seconds(120)
    request_time: Seconds = Seconds(10)
    verifications: _Count = 64
    clock_skew: Seconds = Seconds(30)


class TenantDefaults(_Table, frozen=True):
    secrets: _Count = 1000
    bytes: Size = Size(64 << 20)
    policies: _Count = 100
    requests: _Count = 6000


class OidcRule(_Table, frozen=True):
    issuer: str
    audience: str
    claim: str
    value: str
    tenant: str
    role: Role
    subject_claim: str = "sub"
    jwks_uri: str = ""
    ca_file: AbsolutePath = AbsolutePath()


class CertificateRule(_Table, frozen=True):
    tenant: str
    role: Role
    subject: str = ""
    san: str = ""


class Auth(_Table, frozen=True):
    token_life: Seconds = Seconds(30 * 86400)
    oidc: tuple[OidcRule, ...] = ()
    certificates: tuple[CertificateRule, ...] = ()


class Web(_Table, frozen=True):
    enabled: bool = True


class SecretProvisioning(_Table, frozen=True):
    listen: str = ""
    tenant: str = "default"
    secret: str = ""
    tls12: bool = False


class Telemetry(_Table, frozen=True):
    log: AbsolutePath = AbsolutePath()
    level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_token_file: AbsolutePath = AbsolutePath()
    otlp_endpoint: str = ""
    otlp_headers_file: AbsolutePath = AbsolutePath()
    otlp_ca_file: AbsolutePath = AbsolutePath()
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0


class VerdictConfig(_Table, frozen=True):
    """The whole file. Sizes in bytes, times in seconds; plugins' tables are read by the plugins."""

    listen: str = "127.0.0.1:8443"
    public_url: str = ""
    state_dir: AbsolutePath = AbsolutePath("/var/lib/inclavare/verdictd")
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    tls: Tls = Tls()
    store: StoreSection = StoreSection()
    master_key: MasterKeySection = MasterKeySection()
    collateral: CollateralSection = CollateralSection()
    tokens: Tokens = Tokens()
    attestation: AttestationSection = AttestationSection()
    limits: Limits = Limits()
    tenants: TenantDefaults = TenantDefaults()
    auth: Auth = Auth()
    plugins: tuple[dict[str, Any], ...] = ()
    web: Web = Web()
    secret_provisioning: SecretProvisioning = SecretProvisioning()
    telemetry: Telemetry = Telemetry()

    @classmethod
    def load(cls, path: Path) -> VerdictConfig:
        """Read a file.

        Raises:
            UsageError: ``verdict.config.*``: unreadable, not TOML, an unknown key, a wrong type or value.
        """
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path} cannot be read",
                id="verdict.config.file",
                found=getattr(error, "strerror", None) or "not UTF-8",
                remedy="make one with: inclavare verdictd init",
            ) from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "verdictd.toml") -> VerdictConfig:
        """Read TOML.

        Args:
            name: what to call it in errors.

        Raises:
            UsageError: see :meth:`load`; names file, line and key.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{name}: {error}", id="verdict.config.syntax", remedy="correct the file") from None
        try:
            config = _convert(document)
        except msgspec.ValidationError as error:
            raise _refusal(error, document, text, name) from None
        config._check(name, text)
        return config

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``."""
        return split_address(self.listen)

    @property
    def base_url(self) -> str:
        """``public_url``, or what follows from ``listen``."""
        return self.public_url or f"https://{self.listen}"

    @property
    def directory(self) -> Path:
        """``state_dir``."""
        return Path(self.state_dir)

    @property
    def certificate(self) -> Path:
        """The TLS certificate's file."""
        return Path(self.tls.certificate or self.directory / "tls-cert.pem")

    @property
    def certificate_key(self) -> Path:
        """The TLS key's file."""
        return Path(self.tls.key or self.directory / "tls-key.pem")

    @property
    def master_key_file(self) -> Path:
        """The master key's file."""
        return Path(self.master_key.file or self.directory / "master.key")

    def store_url(self) -> str:
        """The database's URL.

        Raises:
            UsageError: ``verdict.config.secret``: ``url_file`` cannot be read, or others can read it.
        """
        if self.store.url_file:
            from ..enclave.signing_access import read_private

            return read_private(Path(self.store.url_file), "verdict.config.secret").decode("utf-8", "replace").strip()
        return self.store.url or f"sqlite:///{self.directory / 'store.db'}"

    def _check(self, name: str, text: str) -> None:
        """What a type cannot say."""

        def refuse(path: tuple[str, ...], found: object, expected: str) -> None:
            raise _wrong(name, text, path, found, expected)

        provisioning = self.secret_provisioning
        for path, address in ((("listen",), self.listen), (("secret_provisioning", "listen"), provisioning.listen)):
            host, _, port = address.rpartition(":")
            if (address or path == ("listen",)) and not (host and port.isdecimal() and int(port) <= 65535):
                refuse(path, address, "host:port, for example 127.0.0.1:8443 or [::]:8443")
        if provisioning.listen and not provisioning.secret:
            refuse(("secret_provisioning", "secret"), "", "the path of a secret: repo/type/tag")
        if self.public_url and not re.fullmatch(r"https://[^/?#@]+", self.public_url):
            refuse(("public_url",), self.public_url, "https://host[:port], without a path")
        if not self.state_dir:
            refuse(("state_dir",), "", "an absolute path")
        if bool(self.tls.certificate) != bool(self.tls.key):
            refuse(("tls",), "one of certificate and key", "both, or neither")
        if self.store.url and self.store.url_file:
            refuse(("store", "url"), "url and url_file", "one of them")
        if re.search(r"//[^/@]*:[^/@]*@", self.store.url):
            refuse(("store", "url"), "a URL with a password", "a URL without; put it into url_file")
        vault = self.master_key.vault
        if self.master_key.kind == "vault-transit" and not (vault.url and vault.key and vault.token_file):
            refuse(("master_key", "vault"), "not complete", "url, key and token_file")
        if self.auth.certificates and not self.tls.client_ca:
            refuse(("auth", "certificates"), "no tls.client_ca", "the authority of these certificates")
        if any(not (rule.subject or rule.san) for rule in self.auth.certificates):
            refuse(("auth", "certificates"), "one that names nobody", "subject, san or both")
        if any(not rule.issuer.startswith("https://") for rule in self.auth.oidc):
            refuse(("auth", "oidc"), "another issuer", "https://…")
        for at, source in enumerate(self.collateral.sources):
            if not re.fullmatch(r"intel|amd|platform|file:/.+|https://.+", source):
                refuse(
                    ("collateral", "sources"), self.collateral.sources[at], "intel, amd, platform, file:/… or https://…"
                )
        url = self.telemetry.otlp_endpoint
        if url and not re.fullmatch(r"https://.+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/.*)?", url):
            refuse(("telemetry", "otlp_endpoint"), url, "https://…, or http on this machine")


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def duration(value: object) -> Seconds:
    """Seconds from ``"90s"``, ``"5m"``, ``"2h"``, ``"1d"``.

    Raises:
        ValueError: not a time; says what is.
    """
    found = re.fullmatch(r"(\d{1,9})([smhd])", value) if isinstance(value, str) else None
    if found is None or int(found[1]) == 0:
        raise ValueError('a time such as "90s", "5m", "2h" or "1d"')
    return Seconds(int(found[1]) * _DURATIONS[found[2]])


def _decode(kind: type, value: Any) -> Any:
    if kind is Seconds:
        return duration(value)
    if kind is Size:
        return Size(parse_size(value))
    if kind is AbsolutePath:
        if not isinstance(value, str) or (value and not value.startswith("/")):
            raise ValueError("an absolute path")
        return AbsolutePath(value)
    # What msgspec expects of a dec_hook for a type that it does not know.
    raise NotImplementedError(kind)


def _convert(document: dict[str, Any]) -> VerdictConfig:
    return msgspec.convert(document, VerdictConfig, dec_hook=_decode)


def _refusal(error: msgspec.ValidationError, document: dict[str, Any], text: str, name: str) -> UsageError:
    problem, _, where = str(error).partition(" - at `$")
    path: list[str | int] = []
    for part in re.findall(r"\.([^.\[\]`]+)|(\[)", where):
        path.append(_failing(document, path) if part[1] else part[0])
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", problem)
    missing = re.fullmatch(r"Object missing required field `(.*)`", problem)
    if unknown is not None:
        label = _label([*path, unknown[1]])
        return UsageError(
            f"{name}:{_line(text, [*path, unknown[1]])}: unknown key {label}",
            id="verdict.config.key",
            remedy="remove it or correct its name",
        )
    if missing is not None:
        path.append(missing[1])
        problem = "it must be given"
    return _wrong(name, text, tuple(path), None, problem)


def _failing(document: dict[str, Any], path: list[str | int]) -> int:
    """Which item of the array at ``path`` does not convert: msgspec does not say it."""
    items: Any = document
    for key in path:
        items = items[key]
    for number, item in enumerate(items):
        alone: Any = [item]
        for key in reversed(path):
            alone = {key: alone}
        try:
            _convert(alone)
        except msgspec.ValidationError:
            return number
    return 0


def _wrong(name: str, text: str, path: tuple[str | int, ...], found: object, expected: str) -> UsageError:
    return UsageError(
        f"{name}:{_line(text, path)}: {_label(path)} is wrong",
        id="verdict.config.value",
        found=found,
        expected=expected,
    )


def _line(text: str, path: Any) -> int:
    from ..enclave.toml_lines import line_of

    return line_of(text, tuple(path))


def _label(path: Any) -> str:
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")

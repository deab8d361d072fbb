"""The runelet's life: admit, measure, load, mount, serve, and take everything back."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..enclave import stored as stored_files
from ..enclave.manifest import Manifest
from ..enclave.tree import DigestCache, Tree, build
from ..errors import InclavareError, IntegrityError, PlatformError, PolicyError, ResourceError, UsageError
from ..log import EventLog
from ..runtimes.base import Container, EnclaveRuntime, Session, runtime
from ..shield import mounts
from ..tee.base import Enclave, Platform, canonical_name, usable_platform
from . import admission
from .control import ControlServer
from .job import BUNDLE, CONTROL, MANIFEST, Job, remove_traces, write_meta

if TYPE_CHECKING:
    from .broker import Broker
    from .guest_api import GuestApi


class Runelet:
    """One enclave and what serves its container."""

    def __init__(self, job: Job, guard: socket.socket) -> None:
        self._job = job
        self._guard = guard
        self._log = EventLog(job.node.log_dir / "runelet.log", container=job.id, process="runelet")
        self._enclave: Enclave | None = None
        self._session: Session | None = None
        self._control: ControlServer | None = None
        self._container: int | None = None
        self._broker: Broker | None = None
        self._guest: GuestApi | None = None
        self._violations: set[str] = set()

    # --- start

    def start(self) -> dict[str, Any]:
        """Make the enclave and everything that its container needs; returns what rune needs to go on.

        Raises:
            InclavareError: refused or impossible; the caller ends the process, which takes everything back.
        """
        _harden()
        mounts.private_namespace()
        job = self._job
        contents = self._open_rootfs()
        stored = stored_files.read(contents)
        tee = self._tee(stored)
        platform = usable_platform(tee, job.node)
        manifest, tree = self._identity(stored, tee, contents)
        if tee not in manifest.enclave.tee:
            raise PolicyError(
                f"the manifest does not accept the enclave type {tee}",
                id="admission.tee.refused",
                found=tee,
                expected=", ".join(manifest.enclave.tee),
                remedy="set ENCLAVE_TYPE to one of these, or change [enclave] tee in enclave.toml and build again",
            )
        asked = admission.with_absolute_sources(job.config, str(job.bundle))
        config = admission.admit(asked, manifest, resolve=lambda path: admission.follow_links(tree, path))
        wants_broker = _wants_broker(manifest)
        if wants_broker:
            from . import broker

            broker.check(manifest)
        kind = runtime(manifest.enclave.runtime)
        kind.check(platform)
        container = Container(job.id, manifest, config, tree, contents, job.places, self._on_violation, self._on_fault)
        prepared = kind.prepare(container)
        try:
            self._enclave = self._load(kind, platform, manifest, tree, stored)
            if wants_broker and manifest.attestation.verdictd:
                self._broker = broker.Broker(manifest, broker.EnclaveAttester(self._enclave, platform), self._log)
        except BaseException:
            kind.abandon(prepared)
            raise
        self._session = kind.start(container, self._enclave, platform, prepared, self._broker)
        self._control = ControlServer(job.directory / CONTROL, job.id, self._enclave, platform, self._session.secrets)
        self._control.start()
        return self._publish(manifest, tee, self._enclave, self._session)

    def _open_rootfs(self) -> int:
        path = self._job.bundle / self._job.config["root"]["path"]
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"the root file system {path} cannot be opened: {error.strerror}",
                id="bundle.rootfs.missing",
                remedy="correct root.path in config.json",
            ) from None

    def _tee(self, stored: stored_files.Stored | None) -> str:
        value = admission.requested(self._job.config, "ENCLAVE_TYPE")
        for variable, what in (("RUNE_CARRIER", "LibOS carrier"), ("ENCLAVE_RUNTIME_PATH", "PAL enclave runtime")):
            carrier = admission.requested(self._job.config, variable)
            if carrier:
                raise PlatformError(
                    f"{variable} asks for the {what} {carrier}, which this version does not have",
                    id="runtime.carrier.missing",
                    expected="the native enclave runtime",
                    remedy=f"unset {variable}",
                )
        if value is not None:
            return canonical_name(value)
        if stored is None:
            raise UsageError("no enclave type was named", id="tee.type.missing", remedy="set ENCLAVE_TYPE")
        accepted = stored.manifest.enclave.tee
        if len(accepted) != 1:
            raise UsageError(
                "the image can run on several TEE platforms and none was named",
                id="tee.type.ambiguous",
                expected=", ".join(accepted),
                remedy="set ENCLAVE_TYPE to one of these; a simulated one is never chosen by itself",
            )
        return accepted[0]

    def _identity(self, stored: stored_files.Stored | None, tee: str, contents: int) -> tuple[Manifest, Tree]:
        """The manifest and the tree, as stored in the image or made here at first use."""
        if stored is not None:
            manifest, tree = stored.manifest, stored.tree
            if admission.wants_debug(self._job.config) and not manifest.enclave.debug:
                raise PolicyError(
                    "ENCLAVE_DEBUG is set, but the image was signed as a production enclave",
                    id="admission.debug.refused",
                    remedy="unset it, or build the image with [enclave] debug = true",
                )
            tree.verify_root(tree.root)  # EINIT compares this root with the signed measurement
            return manifest, tree
        if tee not in self._job.node.on_node_signing:
            raise PolicyError(
                f"the image carries no enclave signature, and this node does not sign for {tee}",
                id="admission.unsigned.refused",
                expected="/.inclavare/ in the image",
                remedy="build it with `inclavare build`, or add the platform to [signing] on_node "
                "in /etc/inclavare/config.toml",
            )
        template = self._template()
        fields = admission.manifest_fields(self._job.config, template)
        debug = admission.wants_debug(self._job.config)
        manifest = _measured_at_first_use(template, fields, tee, debug=debug)
        rootfs = Path(f"/proc/self/fd/{contents}")
        cache = DigestCache(self._digest_cache())
        tree = build(rootfs, cache=cache, trusted=manifest.files.trusted, allowed=manifest.files.allowed)
        allowed, tmpfs = (
            tuple(sorted({admission.follow_links(tree, path) for path in paths}))
            for paths in (manifest.files.allowed, manifest.files.tmpfs)
        )
        if (allowed, tmpfs) != (manifest.files.allowed, manifest.files.tmpfs):
            # Mounts go where the image's links lead (/var/run to /run, say), and that is what has to be measured.
            manifest = manifest._replace(files=manifest.files._replace(allowed=allowed, tmpfs=tmpfs))
            tree = build(rootfs, cache=cache, trusted=manifest.files.trusted, allowed=allowed)
        return manifest, tree

    def _template(self) -> Manifest:
        path = self._job.node.default_manifest
        if path is None:
            return Manifest.parse("", "built-in defaults")
        try:
            return Manifest.parse(path.read_text(), str(path))
        except OSError as error:
            raise UsageError(
                f"the default manifest {path} cannot be read: {error.strerror}",
                id="config.manifest.missing",
                remedy="correct [signing] default_manifest in /etc/inclavare/config.toml",
            ) from None

    def _digest_cache(self) -> Path:
        """One cache per image: containers of one image share the lower layers of their overlay mounts."""
        from hashlib import sha256

        rootfs = os.path.realpath(self._job.bundle / self._job.config["root"]["path"])
        identity = rootfs
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
            for line in handle:
                fields = line.split()
                if fields[4] == rootfs and "- overlay " in line:
                    lower = next((o for o in fields[-1].split(",") if o.startswith("lowerdir=")), rootfs)
                    # The first layer of Docker's is the container's own "-init" layer.
                    identity = lower.partition(":")[2] or lower
        name = sha256(os.fsencode(identity)).hexdigest()[:32]
        return self._job.node.state_dir / "cache" / "digests" / name

    def _load(
        self,
        kind: EnclaveRuntime,
        platform: Platform,
        manifest: Manifest,
        tree: Tree,
        stored: stored_files.Stored | None,
    ) -> Enclave:
        image = kind.image(manifest, tree.root)
        if stored is None:
            from ..enclave.signing import sign_on_node

            sigstruct = sign_on_node(image, manifest, self._job.node)
        elif stored.sigstruct is None:
            raise IntegrityError(
                "the image has a manifest but no signature",
                id="enclave.sigstruct.missing",
                expected="/.inclavare/sigstruct",
                remedy="sign it with `inclavare sign`",
            )
        else:
            sigstruct = stored.sigstruct
        return platform.load(image, sigstruct, label=self._job.id)

    def _publish(self, manifest: Manifest, tee: str, enclave: Enclave, session: Session) -> dict[str, Any]:
        directory = self._job.directory
        try:
            bundle = directory / BUNDLE
            bundle.mkdir(mode=0o700)
            (bundle / "config.json").write_text(json.dumps(session.configure()))
            (directory / MANIFEST).write_bytes(manifest.canonical())
            write_meta(
                directory,
                tee=tee,
                runtime=manifest.enclave.runtime,
                mrenclave=enclave.mrenclave.hex(),
                mrsigner=enclave.mrsigner.hex(),
                debug=enclave.debug,
                epc_pages=enclave.epc_pages,
                runelet=os.getpid(),
            )
        except OSError as error:
            raise ResourceError(
                f"cannot write the container's state: {error.strerror}",
                id="runelet.state.unwritable",
                found=error.filename,
                remedy="make room on that disk, or set run_dir in /etc/inclavare/config.toml",
            ) from None
        self._log.event(
            "enclave.started", tee=tee, mrenclave=enclave.mrenclave.hex(), debug=enclave.debug, pages=enclave.epc_pages
        )
        return {"bundle": str(bundle), "mrenclave": enclave.mrenclave.hex()}

    # --- life

    def serve(self) -> str:
        """Until the container ends or a part of the enclave fails; returns why."""
        assert self._session is not None
        if self._broker is not None:
            self._broker.keep_fresh(self._session.secrets)
            self._guest = self._guest_api(self._broker)
        wake, waker = os.pipe()
        signal.signal(signal.SIGTERM, lambda *_: os.write(waker, b"t"))
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        poller.register(self._guard, select.POLLIN)
        helpers = {os.pidfd_open(pid): pid for pid in self._session.processes()}
        for fd in helpers:
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == wake:
                    return "container ended"
                if fd == self._guard.fileno():
                    message = self._guard.recv(64)
                    if not message:
                        return "guard died"
                    try:
                        self._container = os.pidfd_open(int(message))
                        if self._guest is not None:
                            self._guest.start(int(message))
                    except ProcessLookupError:
                        pass  # it has ended already; the guard says so next
                elif fd in helpers:
                    self._log.event("shield.encrypted.died", level="error", pid=helpers[fd], action="container killed")
                    return "helper died"

    def _guest_api(self, broker: Broker) -> GuestApi:
        """Confidential Containers' interface; it begins to listen when there is a container."""
        from .guest_api import GuestApi

        user = (self._job.config["process"].get("user") or {}).get("uid", 0)  # as admitted: the measured one
        return GuestApi(broker, user=int(user), log=self._log)

    def stop(self, why: str) -> None:
        """Take everything back. The container is killed first if it still runs: it must not outlive its enclave."""
        if why != "container ended" and self._container is not None:
            try:
                signal.pidfd_send_signal(self._container, signal.SIGKILL)
                poller = select.poll()
                poller.register(self._container, select.POLLIN)
                poller.poll(5000)
            except ProcessLookupError:
                pass
        if self._broker is not None:
            self._broker.close()
        if self._control is not None:
            self._control.close()
        if self._session is not None:
            self._session.close()
        if self._enclave is not None:
            self._enclave.destroy()
        if why == "guard died":
            remove_traces(self._job.places, everything=False)
        self._log.event("enclave.ended", reason=why)

    def _on_violation(self, path: str, reason: str) -> None:
        """The host's contents differ from the tree: said once for each path, refused every time."""
        if path not in self._violations:
            self._violations.add(path)
            self._log.event("shield.tree.violation", level="error", path=path, reason=reason)

    def _on_fault(self, error: BaseException) -> None:
        self._log.event("shield.server.fault", level="error", trace="".join(traceback.format_exception(error)))


def _harden() -> None:
    """No core dump, no ptrace, no /proc/PID/mem for others."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mounts.prctl(mounts.PR_SET_DUMPABLE, 0)
    mounts.prctl(mounts.PR_SET_NAME, b"runelet")
    os.umask(0o077)


def _wants_broker(manifest: Manifest) -> bool:
    """Whether there is anything to fetch, or an interface to serve; without, none of it is imported."""
    keys = (volume.key for volume in manifest.files.encrypted)
    return bool(manifest.secrets or manifest.attestation.verdictd or any(key.startswith("kbs") for key in keys))


def _measured_at_first_use(template: Manifest, fields: dict[str, Any], tee: str, *, debug: bool) -> Manifest:
    measured = template.with_enclave(tee=(tee,), debug=template.enclave.debug or debug).with_process(
        args=tuple(fields["args"]),
        env=fields["env"],
        cwd=fields["cwd"],
        user=fields["user"],
        hooks=tuple(tuple(hook) for hook in fields["hooks"]),
    )
    return measured._replace(
        files=template.files._replace(allowed=tuple(fields["allowed"]), tmpfs=tuple(fields["tmpfs"]))
    )


def main(job: Job, guard: socket.socket, link: socket.socket) -> NoReturn:
    """Body of the runelet process; never returns.

    Args:
        job: the container.
        guard: to the guard, which sends the container's pid.
        link: to rune, which waits for one JSON message: ``{"ready": …}`` with a mount namespace's file descriptor
            beside it, or ``{"error": …}``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runelet = Runelet(job, guard)
    try:
        ready = runelet.start()
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(link, [json.dumps({"ready": ready}).encode()], [namespace])
        os.close(namespace)
        link.close()
        why = runelet.serve()
    except InclavareError as error:
        _send_error(link, error)
        runelet.stop("start refused")
        os._exit(1)
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        log = EventLog(job.node.log_dir / "runelet.log", container=job.id)
        log.event("runelet.fault", level="error", trace=trace)
        _send_error(
            link,
            InclavareError(
                f"the runelet failed: {type(error).__name__}: {error}",
                id="runelet.fault",
                remedy=f"see {job.node.log_dir}/runelet.log and report it",
            ),
        )
        runelet.stop("fault")
        os._exit(1)
    runelet.stop(why)
    os._exit(0)


def _send_error(link: socket.socket, error: InclavareError) -> None:
    # Cut, so that a long argument vector in an error still fits into the one message that rune reads.
    fields = {key: value[:2000] if isinstance(value, str) else value for key, value in error.to_dict().items()}
    try:
        link.sendall(json.dumps({"error": fields}).encode())
    except OSError:
        pass  # rune is gone

"""verdictd as a process: its master key, its socket, its workers, and its end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import serving
from ..errors import InclavareError, PlatformError
from .config import VerdictConfig, split_address
from .telemetry import event, start_logging, start_tracing

if TYPE_CHECKING:
    from .app import Application
    from .store import MasterKey, Store

SHUTDOWN_SECONDS = 20
_ENDING = (signal.SIGTERM, signal.SIGINT)
_PURGE_SECONDS = 60.0
#: A checkpoint with every so many purges.
_CHECKPOINT_TURNS = 60
#: A worker that ended by itself is started again, but not faster than this.
_RESTART_SECONDS = 1.0
#: How a worker ends that would end again (sysexits.h, EX_CONFIG).
_MISCONFIGURED = 78
HEADERS = (("strict-transport-security", "max-age=31536000"),)


def master_key(config: VerdictConfig) -> MasterKey:
    """The configured master key.

    Raises:
        UsageError: its file is missing, readable by others, or holds none.
        PlatformError: it is sealed, and this is no enclave.
    """
    from . import store

    section = config.master_key
    if section.kind == "vault-transit":
        vault = section.vault
        return store.TransitKey(
            vault.url,
            vault.key,
            token_file=Path(vault.token_file),
            mount=vault.mount,
            namespace=vault.namespace or None,
            ca_file=Path(vault.ca_file) if vault.ca_file else None,
        )
    kinds = {"file": store.FileKey, "passphrase": store.PassphraseKey, "sealed": store.SealedKey}
    found: MasterKey = kinds[section.kind].load(config.master_key_file)  # type: ignore[attr-defined]
    return found


def open_store(config: VerdictConfig) -> Store:
    """The configured store.

    Raises:
        UsageError, PlatformError: see :func:`master_key`.
        InclavareError: see :meth:`inclavare.verdict.store.Store.open`.
    """
    from .store import Store

    return Store.open(config.store_url(), master_key(config))


def serve(config: VerdictConfig, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Args:
        ready: is told the address, ``https://host:port``, when connections are taken.

    Raises:
        UsageError: the address is taken, TLS or a policy is wrong, …
    """
    from .plugins import Plugins

    _harden()  # the store is opened here, too
    host, port = config.address
    with _multiprocess_metrics(config), serving.listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        # What is wrong is found, and told, here, before any worker begins.
        with open_store(config) as store:
            _tls(config)
            Plugins(config, store)
        ready(f"https://{shown}:{listening.getsockname()[1]}")
        if config.workers == 1:
            work(config, listening)
        else:
            _supervise(config, listening)


def work(config: VerdictConfig, listening: socket.socket) -> None:
    """One worker: answer what comes in on a socket, until a signal says it is enough."""
    from .app import build

    _harden()
    start_logging(config.telemetry)
    start_tracing(config.telemetry)
    with open_store(config) as store:
        application = build(config, store)
        server = http_server(config, application)
        # Before uvicorn listens to signals, one that comes must not be lost; afterwards it raises the last once more.
        for number in _ENDING:
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        stop = threading.Event()
        purging = threading.Thread(target=_purge, args=(store, stop), name="purge", daemon=True)
        purging.start()
        event("verdict.started", address=config.listen, pid=os.getpid())
        try:
            with _secret_provisioning(config, application):
                server.run(sockets=[listening])
        finally:
            stop.set()
            purging.join()
            application.close()
            event("verdict.stopped", pid=os.getpid())


def http_server(config: VerdictConfig, application: Application) -> Any:
    """The HTTPS server for an application; see :func:`inclavare.serving.server`."""
    server = serving.server(
        application,
        _tls(config),
        connections=config.limits.connections,
        connections_per_client=max(1, config.limits.connections // 2),
        first_request_seconds=config.limits.request_time,
        shutdown_seconds=SHUTDOWN_SECONDS,
        keep_alive_seconds=30,
        connection_seconds=config.limits.connection_life,
        headers=HEADERS,
    )
    ended = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        # Not ready any more, at once; the socket closes a moment later.
        application.stopping = True
        ended(number, frame)

    server.handle_exit = handle_exit  # type: ignore[method-assign,assignment]
    return server


def _tls(config: VerdictConfig) -> ssl.SSLContext:
    minimum = ssl.TLSVersion.TLSv1_2 if config.tls.minimum == "1.2" else ssl.TLSVersion.TLSv1_3
    client_ca = Path(config.tls.client_ca) if config.tls.client_ca else None
    context = serving.tls_context(config.certificate, config.certificate_key, client_ca=client_ca, minimum=minimum)
    if client_ca is not None:
        # Administrators show one; TEEs have none.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


@contextmanager
def _secret_provisioning(config: VerdictConfig, application: Application) -> Iterator[None]:
    """Gramine's protocol beside HTTP, in a thread with an event loop of its own, if it is configured."""
    section = config.secret_provisioning
    if not section.listen:
        yield
        return
    import asyncio

    from .secret_prov import SecretProvConfig, SecretProvServer

    host, port = split_address(section.listen)
    settings = SecretProvConfig(config.certificate, config.certificate_key, host=host, port=port, tls12=section.tls12)
    server = SecretProvServer(
        settings,
        lambda evidence: application.decider.release_to_certificate(section.tenant, evidence, section.secret),
        lambda id, **fields: event(id, **{f"error_{key}" if key == "id" else key: fields[key] for key in fields}),
    )
    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever, name="secret-provisioning", daemon=True)
    running.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        loop.close()


def _supervise(config: VerdictConfig, listening: socket.socket) -> None:
    """Several workers on one socket; one that ends is started again. Forks, so there must be no thread yet."""
    children: dict[int, float] = {}
    stopping = failed = False

    def stop(number: int, _: Any) -> None:
        nonlocal stopping
        stopping = True
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    for number in _ENDING:
        signal.signal(number, stop)
    start_logging(config.telemetry)
    while not stopping or children:
        while not stopping and len(children) < config.workers:
            # A signal has to find every child in the list, and none with this process's own handler.
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            children[_fork(config, listening)] = time.monotonic()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        try:
            pid, status = os.wait()
        except (InterruptedError, ChildProcessError):
            continue
        began = children.pop(pid, 0.0)
        if stopping:
            continue
        code = os.waitstatus_to_exitcode(status)
        event("verdict.worker.ended", level=logging.ERROR, pid=pid, status=code)
        if code == _MISCONFIGURED:
            failed = True
            stop(signal.SIGTERM, None)
        else:
            time.sleep(max(0.0, _RESTART_SECONDS - (time.monotonic() - began)))
    if failed:
        raise PlatformError("a worker cannot be started", id="verdict.worker", remedy="the log says why")


def _fork(config: VerdictConfig, listening: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from ..shield import mounts

        mounts.prctl(mounts.PR_SET_PDEATHSIG, signal.SIGTERM)
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)  # nothing is under way yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        work(config, listening)
        code = 0
    except InclavareError as error:
        code = _MISCONFIGURED
        event("verdict.worker.failed", level=logging.ERROR, reason=error.one_line())
    except BaseException as error:
        event("verdict.worker.failed", level=logging.ERROR, reason=type(error).__name__)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _purge(store: Store, stop: threading.Event) -> None:
    """Remove what has expired, now and then. Replicas do not hinder one another in it.

    Every hour the log gets a checkpoint of the audit trail: there the database's owner cannot take it back.
    """
    turns = 0
    while not stop.wait(_PURGE_SECONDS):
        try:
            store.purge()
            if turns % _CHECKPOINT_TURNS == 0:
                event("verdict.audit.checkpoint", checkpoint=store.audit.checkpoint())
            turns += 1
        except InclavareError as error:
            event("verdict.purge.failed", level=logging.WARNING, reason=error.id)


@contextmanager
def _multiprocess_metrics(config: VerdictConfig) -> Iterator[None]:
    """A directory in which the workers' metrics come together; it has to be known before they are imported."""
    if config.workers == 1:
        yield
        return
    directory = tempfile.mkdtemp(prefix="verdictd-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _harden() -> None:
    """No core dumps, and no other process of this user may look into this one's memory."""
    import resource

    from ..shield import mounts

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mounts.prctl(mounts.PR_SET_DUMPABLE, 0)

"""Blocking sockets: as :mod:`ssl` has them, verified before they are handed out."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ...errors import InclavareError, PlatformError
from .session import Peer, Session

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

#: Seconds for connecting, TLS and the exchange together.
HANDSHAKE_TIMEOUT = 10.0
_RECEIVE = 1 << 16


class SessionMaker(Protocol):
    """A context."""

    def session(self, server_name: str | None = None) -> Session:
        """A new connection's session."""


class AttestedSocket:
    """An open connection to a verified peer. One thread may read while another writes.

    Made by :func:`wrap` and :func:`connect` only, which return it after the peer has been verified.
    """

    def __init__(self, sock: socket.socket, session: Session) -> None:
        self._socket = sock
        self._session = session
        self._state = threading.RLock()  # of the session
        self._out = threading.Lock()  # keeps ciphertext in order
        self._timeout: float | None = None
        self._closed = False

    @property
    def peer(self) -> Peer | None:
        """Who is at the other end; ``None`` on a server's side that does not ask clients to attest."""
        return self._session.peer

    def settimeout(self, seconds: float | None) -> None:
        """For each later read or write; ``None`` waits for ever."""
        self._timeout = seconds

    def gettimeout(self) -> float | None:
        """What :meth:`settimeout` has set."""
        return self._timeout

    def fileno(self) -> int:
        """The TCP socket's; ready to read does not mean that there is data."""
        return self._socket.fileno()

    def getpeername(self) -> Any:
        """The peer's address."""
        return self._socket.getpeername()

    def getsockname(self) -> Any:
        """This side's address."""
        return self._socket.getsockname()

    def recv(self, size: int) -> bytes:
        """Up to ``size`` bytes; empty at the end of the peer's data.

        Raises:
            TimeoutError: nothing came in time.
            InclavareError: the peer's evidence has expired, or the connection was cut off.
        """
        deadline = _deadline(self._timeout)
        while True:
            with self._state:
                data = self._session.read()
                if len(data) > size:
                    self._session.unread(data[size:])
                    data = data[:size]
                if data or self._session.eof or size == 0:
                    return data
            self._receive(deadline)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0) -> int:
        """As :meth:`recv`, into a buffer."""
        view = memoryview(buffer).cast("B")
        data = self.recv(nbytes or len(view))
        view[: len(data)] = data
        return len(data)

    def sendall(self, data: ReadableBuffer) -> None:
        """Send everything.

        Raises:
            TimeoutError: the peer does not take it in time.
            InclavareError: the peer's evidence has expired, or the end of data has been sent.
        """
        with self._state:
            self._session.tick()
            self._session.write(memoryview(data).cast("B"))
        self._flush(_deadline(self._timeout))

    def send(self, data: ReadableBuffer) -> int:
        """As :meth:`sendall`; returns the number of bytes."""
        self.sendall(data)
        return memoryview(data).nbytes

    def shutdown(self, how: int = socket.SHUT_WR) -> None:
        """End this side's data (SHUT_WR); the peer may go on."""
        if how != socket.SHUT_RD:
            with self._state:
                self._session.end()
            self._flush(_deadline(self._timeout))

    def makefile(self, mode: str = "rb", buffering: int = -1, **text: Any) -> Any:
        """A file over the connection, as :meth:`socket.socket.makefile`."""
        raw = _Raw(self)
        size = io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering
        if "b" in mode and size == 0:
            return raw
        buffered: Any = (
            io.BufferedRWPair(raw, raw, size)
            if "r" in mode and "w" in mode
            else io.BufferedWriter(raw, size)
            if "w" in mode
            else io.BufferedReader(raw, size)
        )
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **text)

    def close(self) -> None:
        """End the connection; what was sent is delivered."""
        if self._closed:
            return
        self._closed = True
        with self._state:
            self._session.close()
        try:
            self._flush(_deadline(1.0))
            self._socket.shutdown(socket.SHUT_WR)
        except (OSError, InclavareError):
            pass
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside

    def _establish(self, deadline: float) -> None:
        self._flush(deadline)
        while not self._session.open:
            if self._session.error is not None:
                raise self._session.error
            self._receive(deadline)

    def _receive(self, deadline: float | None) -> None:
        """One read from the network, or a tick."""
        with self._state:
            due = self._session.due()
        wait = None if deadline is None else deadline - time.monotonic()
        if wait is not None and wait <= 0:
            raise TimeoutError("timed out")
        if due is not None and (wait is None or due < wait):
            wait = due + 0.001
        self._socket.settimeout(wait)
        try:
            data = self._socket.recv(_RECEIVE)
        except TimeoutError:
            data = None
        with self._state:
            if data is None:
                self._session.tick()
            elif data:
                self._session.feed(data)
            else:
                self._session.feed_eof()
            while self._session.jobs:
                self._session.jobs.popleft().run(self._session)
        self._flush(deadline, quiet=self._session.error is not None)
        if self._session.error is not None:
            raise self._session.error

    def _flush(self, deadline: float | None, *, quiet: bool = False) -> None:
        with self._out:
            with self._state:
                data = self._session.outgoing()
            if not data:
                return
            wait = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._socket.settimeout(wait)
            try:
                self._socket.sendall(data)
            except OSError:
                if not quiet:
                    raise


class _Raw(io.RawIOBase):
    def __init__(self, attested: AttestedSocket) -> None:
        self._attested = attested

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        return self._attested.recv_into(buffer)

    def write(self, data: ReadableBuffer, /) -> int:
        return self._attested.send(data)


def wrap(
    sock: socket.socket, context: SessionMaker, *, server_name: str | None = None, timeout: float = HANDSHAKE_TIMEOUT
) -> AttestedSocket:
    """Attest over a connected TCP socket, which is closed if that fails.

    Args:
        timeout: seconds, for everything until the peer is verified.

    Raises:
        EvidenceError, AppraisalError: the peer is not who it should be; the message says why.
        PlatformError: ``ratls.tls``, ``ratls.timeout``, ``ratls.truncated``: TLS failed; or this side cannot quote.
    """
    deadline = time.monotonic() + timeout
    try:
        attested = AttestedSocket(sock, context.session(server_name))
        attested._establish(deadline)
    except OSError as error:
        sock.close()
        raise _lost(error, timeout) from None
    except BaseException:
        sock.close()
        raise
    return attested


def connect(host: str, port: int, context: SessionMaker, *, timeout: float = HANDSHAKE_TIMEOUT) -> AttestedSocket:
    """Connect to a server and verify it.

    Raises:
        PlatformError: ``ratls.unreachable``; and see :func:`wrap`.
    """
    try:
        sock = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise unreachable(host, port, error) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return wrap(sock, context, server_name=host, timeout=timeout)


class Server:
    """Serves verified peers, each in a thread of its own; see :func:`serve`."""

    def __init__(
        self,
        address: tuple[str, int],
        handler: Callable[[AttestedSocket], None],
        context: SessionMaker,
        *,
        connections: int,
        timeout: float,
        on_refused: Callable[[Any, InclavareError], None] | None,
    ) -> None:
        from ... import serving

        self._handler = handler
        self._context = context
        self._timeout = timeout
        self._on_refused = on_refused
        self._slots = threading.BoundedSemaphore(connections)
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._listening = serving.listen(*address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port, *_ = self._listening.getsockname()
        return host, port

    def serve_forever(self) -> None:
        """Until :meth:`stop`; then waits for the connections under way."""
        while not self._stopping.is_set():
            self._slots.acquire()
            try:
                sock, _ = self._listening.accept()
            except OSError:
                self._slots.release()
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.add(thread)
            thread.start()
        for thread in list(self._threads):
            thread.join()

    def start(self) -> Self:
        """:meth:`serve_forever` in a thread."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Take no more connections."""
        self._stopping.set()
        try:
            self._listening.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, sock: socket.socket) -> None:
        peername = None
        try:
            peername = sock.getpeername()
            with wrap(sock, self._context, timeout=self._timeout) as attested:
                self._handler(attested)
        except InclavareError as error:
            if self._on_refused is not None:
                self._on_refused(peername, error)
        except OSError:
            pass  # the peer has gone
        finally:
            self._threads.discard(threading.current_thread())
            self._slots.release()


def serve(
    address: tuple[str, int],
    handler: Callable[[AttestedSocket], None],
    context: SessionMaker,
    *,
    connections: int = 256,
    timeout: float = HANDSHAKE_TIMEOUT,
    on_refused: Callable[[Any, InclavareError], None] | None = None,
) -> Server:
    """A server whose handler gets verified connections only, each in a thread.

    Args:
        address: host and port; port 0 for any.
        connections: at once; more wait.
        timeout: seconds until a peer has to be verified.
        on_refused: told the address of each peer that was refused, or cut off, and why.

    Raises:
        UsageError: ``serving.listen``: the address is taken, or not this machine's.
        InclavareError: the platform does not quote.
    """
    # A machine that cannot quote is found out before the first connection.
    context.session()
    return Server(address, handler, context, connections=connections, timeout=timeout, on_refused=on_refused)


def unreachable(host: str, port: int, error: OSError) -> PlatformError:
    """No TCP connection."""
    return PlatformError(
        f"{host}, port {port} cannot be reached",
        id="ratls.unreachable",
        found=error.strerror or str(error),
        remedy="check the address, and whether the server runs",
    )


def timed_out(seconds: float) -> PlatformError:
    """The peer is too slow."""
    return PlatformError(
        "the peer was not verified in time",
        id="ratls.timeout",
        expected=f"TLS and evidence in {seconds:g} seconds",
        remedy="see the peer's log, or allow more time",
    )


def _lost(error: OSError, timeout: float) -> PlatformError:
    if isinstance(error, TimeoutError):
        return timed_out(timeout)
    return PlatformError(
        "the connection was lost before the peer was verified",
        id="ratls.truncated",
        found=error.strerror or str(error),
        remedy="see the peer's log",
    )


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout

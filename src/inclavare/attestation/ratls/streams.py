"""asyncio: attested transports under any protocol, and streams. Quoting and verifying run in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from ...errors import InclavareError
from .session import Job, Peer, Session
from .sockets import HANDSHAKE_TIMEOUT, SessionMaker, timed_out, unreachable

#: Bytes that may wait for the network before the writer is paused.
WRITE_BUFFER = 1 << 19
#: Called for each connection that was refused: the peer's address, and why.
OnRefused = Callable[[Any, InclavareError], None]
Handler = Callable[["asyncio.StreamReader", "AttestedWriter"], Awaitable[None]]


class AttestedTransport(asyncio.Transport):
    """The transport that an application's protocol gets, once the peer is verified.

    Besides what the TCP transport knows, ``get_extra_info`` knows ``peer`` (a :class:`Peer` or ``None``) and ``result``
    (what the context's check gave).
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See :meth:`asyncio.BaseTransport.get_extra_info`."""
        if name in ("peer", "result"):
            return getattr(self._link.session, name)
        return self._link.extra.get(name) or self._link.raw.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send; dropped when the connection is closing."""
        self._link.write(data)

    def write_eof(self) -> None:
        """No more data from this side; the peer may go on."""
        self._link.end()

    def can_write_eof(self) -> bool:
        """Yes."""
        return True

    def pause_reading(self) -> None:
        """No more ``data_received`` until :meth:`resume_reading`."""
        self._link.pause()

    def resume_reading(self) -> None:
        """Again."""
        self._link.resume()

    def is_reading(self) -> bool:
        """Neither paused nor closing."""
        return not self._link.paused and not self.is_closing()

    def close(self) -> None:
        """Send what is buffered, then end."""
        self._link.close()

    def abort(self) -> None:
        """End at once."""
        self._link.raw.abort()

    def is_closing(self) -> bool:
        """Closed, closing or lost."""
        return self._link.closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another protocol from now on."""
        self._link.protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol."""
        assert self._link.protocol is not None
        return self._link.protocol

    def get_write_buffer_size(self) -> int:
        """Bytes of ciphertext that wait."""
        return self._link.raw.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Of ciphertext, bytes."""
        self._link.raw.set_write_buffer_limits(high, low)


class Link(asyncio.Protocol):
    """Between TCP's transport and the application's protocol, which is made only when the peer is verified.

    Args:
        context: makes the session.
        protocol: makes the application's protocol.
        timeout: seconds until the peer has to be verified.
        on_refused: told of peers that were not.
        opened: a future that is set to the application's transport, or to the error.
        extra: what the transport's ``get_extra_info`` knows besides.
    """

    raw: asyncio.Transport
    session: Session

    def __init__(
        self,
        context: SessionMaker,
        protocol: Callable[[], asyncio.BaseProtocol],
        *,
        server_name: str | None = None,
        timeout: float = HANDSHAKE_TIMEOUT,
        on_refused: OnRefused | None = None,
        opened: asyncio.Future[AttestedTransport] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._context = context
        self._make = protocol
        self._server_name = server_name
        self._timeout = timeout
        self._on_refused = on_refused
        self._opened = opened
        self.extra = extra or {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._job: asyncio.Task[None] | None = None
        self._ready = False
        self._backlog = bytearray()  # ciphertext that came before the session was made
        self._told_eof = self._closed_here = False
        self.protocol: asyncio.Protocol | None = None
        self.paused = False
        self.closing = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP is there; TLS begins."""
        self.raw = cast("asyncio.Transport", transport)
        # As asyncio's own TLS has it: a chunk must not fill the buffer each time.
        self.raw.set_write_buffer_limits(WRITE_BUFFER)
        self._timer = self._loop.call_later(self._timeout, self._on_timeout)
        self._start(Job(lambda: self._context.session(self._server_name), self._on_session))

    def data_received(self, data: bytes) -> None:
        """Ciphertext."""
        if not self._ready:
            self._backlog += data
            return
        self.session.feed(data)
        self._advance()

    def eof_received(self) -> bool:
        """TCP's end; without TLS's own before, the connection was cut off."""
        if self._ready:
            self.session.feed_eof()
            self._advance()
            return not self.closing
        self.raw.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """TCP is gone."""
        self.closing = True
        if self._timer is not None:
            self._timer.cancel()
        error = self.session.error if self._ready else None
        if error is None and not self._closed_here:
            error = InclavareError("the connection was cut off", id="ratls.truncated", found=exc)
        if self.protocol is not None:
            self.protocol.connection_lost(None if error is None else _as_os_error(error))
        elif error is not None:
            self._refused(error)

    def pause_writing(self) -> None:
        """TCP is slower than the application."""
        if self.protocol is not None:
            self.protocol.pause_writing()

    def resume_writing(self) -> None:
        """TCP has caught up."""
        if self.protocol is not None:
            self.protocol.resume_writing()

    # --- the application's side

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`AttestedTransport.write`."""
        if not self.closing:
            self.session.write(data)
            self._flush()

    def end(self) -> None:
        """See :meth:`AttestedTransport.write_eof`."""
        if not self.closing:
            self.session.end()
            self._flush()
            self._close_if_ended()

    def close(self) -> None:
        """See :meth:`AttestedTransport.close`."""
        if not self.closing:
            self.closing = self._closed_here = True
            self.session.close()
            self._flush()
            self.raw.close()

    def pause(self) -> None:
        """See :meth:`AttestedTransport.pause_reading`."""
        self.paused = True
        self._set_reading()

    def resume(self) -> None:
        """See :meth:`AttestedTransport.resume_reading`."""
        self.paused = False
        if not self.closing:
            self._loop.call_soon(self._advance)

    # --- inside

    def _start(self, job: Job) -> None:
        """Run a job in a thread; the peer waits meanwhile, so that nothing piles up."""
        self._job = self._loop.create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        self._set_reading(busy=True)
        error: InclavareError | None = None
        result = None
        try:
            result = await self._loop.run_in_executor(None, job.compute)
        except InclavareError as refusal:
            error = refusal
        except Exception as fault:
            error = InclavareError(f"attestation failed: {type(fault).__name__}: {fault}", id="ratls.fault")
        self._job = None
        if self.closing:
            return
        if error is None:
            job.finish(result)
        elif self._ready:
            self.session.fail(error)
        else:
            self._refused(error)
            self.raw.abort()
            return
        self._advance()

    def _on_session(self, session: Session) -> None:
        self.session, self._ready = session, True
        data, self._backlog = bytes(self._backlog), bytearray()
        session.feed(data)

    def _advance(self) -> None:
        """After anything has happened: start work, send, deliver, end."""
        if self.closing or not self._ready:
            return
        self._flush()
        session = self.session
        if session.error is not None:
            self.closing = True
            if self.protocol is None:
                self._refused(session.error)
            self.raw.close()
            return
        if self._job is None and session.jobs:
            self._start(session.jobs.popleft())
        self._set_reading()
        if not session.open:
            return
        if self.protocol is None:
            if self._timer is not None:
                self._timer.cancel()
            self.protocol = cast("asyncio.Protocol", self._make())
            transport = AttestedTransport(self)
            self.protocol.connection_made(transport)
            if self._opened is not None and not self._opened.done():
                self._opened.set_result(transport)
            self._schedule()
        if not self.paused and not self.closing:
            data = session.read()
            if data:
                self.protocol.data_received(data)
        if session.eof and not (self._told_eof or self.paused or self.closing):
            self._told_eof = True
            if not self.protocol.eof_received():
                self.close()
        self._close_if_ended()

    def _close_if_ended(self) -> None:
        if self._told_eof and self.session.ended:
            self.close()

    def _flush(self) -> None:
        data = self.session.outgoing()
        if data:
            self.raw.write(data)

    def _set_reading(self, *, busy: bool = False) -> None:
        if self.raw.is_closing():
            return
        if busy or self._job is not None or self.paused:
            self.raw.pause_reading()
        else:
            self.raw.resume_reading()

    def _schedule(self) -> None:
        due = self.session.due()
        if due is not None:
            self._timer = self._loop.call_later(due + 0.001, self._on_due)

    def _on_due(self) -> None:
        if not self.closing:
            self.session.tick()
            self._advance()
            # Not at once again while an answer is awaited.
            due = self.session.due()
            if due is not None and not self.closing:
                self._timer = self._loop.call_later(max(due, 0.05) + 0.001, self._on_due)

    def _on_timeout(self) -> None:
        if self.protocol is None and not self.closing:
            self.closing = True
            self._refused(timed_out(self._timeout))
            self.raw.abort()

    def _refused(self, error: InclavareError) -> None:
        if self._opened is not None:
            if not self._opened.done():
                self._opened.set_exception(error)
        elif self._on_refused is not None:
            self._on_refused(self.raw.get_extra_info("peername"), error)
            self._on_refused = None


class AttestedWriter(asyncio.StreamWriter):
    """A stream's writing side."""

    @property
    def peer(self) -> Peer | None:
        """Who is at the other end; ``None`` on a server's side that does not ask clients to attest."""
        found: Peer | None = self.get_extra_info("peer")
        return found


async def create_connection(
    protocol: Callable[[], asyncio.BaseProtocol],
    host: str,
    port: int,
    context: SessionMaker,
    *,
    timeout: float = HANDSHAKE_TIMEOUT,
) -> AttestedTransport:
    """Connect to a server and verify it, then give the protocol its transport.

    Raises:
        InclavareError: as :func:`inclavare.attestation.ratls.connect`.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[AttestedTransport] = loop.create_future()

    def link() -> Link:
        return Link(context, protocol, server_name=host, timeout=timeout, opened=opened)

    try:
        async with asyncio.timeout(timeout):
            raw, _ = await loop.create_connection(link, host, port)
    except OSError as error:
        raise unreachable(host, port, error) from None
    try:
        return await opened
    except asyncio.CancelledError:
        raw.abort()
        raise


async def open_connection(
    host: str, port: int, context: SessionMaker, *, timeout: float = HANDSHAKE_TIMEOUT
) -> tuple[asyncio.StreamReader, AttestedWriter]:
    """As :func:`asyncio.open_connection`, verified.

    Raises:
        InclavareError: as :func:`inclavare.attestation.ratls.connect`.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport = await create_connection(lambda: protocol, host, port, context, timeout=timeout)
    return reader, AttestedWriter(transport, protocol, reader, loop)


async def start_server(
    handler: Handler,
    host: str,
    port: int,
    context: SessionMaker,
    *,
    timeout: float = HANDSHAKE_TIMEOUT,
    on_refused: OnRefused | None = None,
) -> asyncio.Server:
    """As :func:`asyncio.start_server`; the handler is called for verified peers only.

    Raises:
        OSError: the address cannot be listened on.
    """
    loop = asyncio.get_running_loop()

    def protocol() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
            return handler(reader, AttestedWriter(writer.transport, made, reader, loop))

        made = asyncio.StreamReaderProtocol(reader, connected)
        return made

    return await loop.create_server(lambda: Link(context, protocol, timeout=timeout, on_refused=on_refused), host, port)


def _as_os_error(error: InclavareError) -> OSError:
    """What protocols understand as a lost connection."""
    found = ConnectionAbortedError(error.one_line())
    found.__cause__ = error
    return found

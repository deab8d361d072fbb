"""A side-car that puts attested TLS in front of plain TCP, on either side.

A server takes attested connections and passes their data to a program on this machine's loopback; a client takes plain
connections on loopback and passes them on over attested TLS. Nothing is passed on before the peer is verified.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ... import serving
from ...errors import InclavareError, PlatformError, UsageError
from .contexts import Context
from .session import Peer
from .streams import WRITE_BUFFER, AttestedTransport, Link, create_connection

#: Told of each event: its id and fields.
Tell = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Settings:
    """One proxy.

    Attributes:
        listen: host and port; port 0 for any.
        connect: where connections go.
        context: a server's or a client's; says which side this proxy is.
        connections: at once; more are closed.
        handshake_seconds: for TCP, TLS and evidence.
        idle_seconds: connections without data for so long are closed.
        drain_seconds: how long connections may go on when the proxy has to end.
    """

    listen: tuple[str, int]
    connect: tuple[str, int]
    context: Context
    connections: int = 1024
    handshake_seconds: float = 10.0
    idle_seconds: float = 600.0
    drain_seconds: float = 10.0


class _End(asyncio.Protocol):
    """One end of a pair: what it receives, the other sends."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self.transport: asyncio.Transport | None = None
        self.other: _End
        self._early = b""  # before the other end is there: pausing takes effect after the first read
        self._eof = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(WRITE_BUFFER)
        self._pair.on_made(self)

    def data_received(self, data: bytes) -> None:
        self._pair.active = True
        self._pair.bytes += len(data)
        if self.other.transport is None:
            self._early += data
            assert self.transport is not None
            self.transport.pause_reading()
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        # asyncio tells of it once more when reading is resumed after it.
        if not self._eof:
            self._eof = True
            self._pass_eof()
        return True  # the other direction may go on

    def _pass_eof(self) -> None:
        if self.other.transport is None:
            return
        if not self.other.transport.is_closing():
            self.other.transport.write_eof()
        self._pair.on_eof()

    def begin(self) -> None:
        """The other end is there."""
        assert self.transport is not None and self.other.transport is not None
        if self._early:
            self.other.transport.write(self._early)
            self._early = b""
        if self._eof:
            self._pass_eof()
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.on_lost(exc)


class _Pair:
    """A connection that is passed on: ``front`` took it, ``back`` goes on with it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.front, self.back = _End(self), _End(self)
        self.front.other, self.back.other = self.back, self.front
        self.active = True
        self.bytes = 0
        self._peer: Peer | None = None
        self._address: Any = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._directions = 2
        self._ended = False

    def on_made(self, end: _End) -> None:
        """``front``: the peer of a server is verified, or a program has connected to a client."""
        if end is not self.front:
            return
        assert end.transport is not None
        if not self._proxy.admit(self):
            end.transport.abort()
            return
        end.transport.pause_reading()
        self._address = end.transport.get_extra_info("peername")
        self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        settings = self._proxy.settings
        host, port = settings.connect
        loop = asyncio.get_running_loop()
        try:
            if settings.context.server:
                try:
                    async with asyncio.timeout(settings.handshake_seconds):
                        await loop.create_connection(lambda: self.back, host, port)
                except OSError as error:
                    raise _unreachable(host, port, error) from None
                attested = cast("AttestedTransport", self.front.transport)
            else:
                attested = await create_connection(
                    lambda: self.back, host, port, settings.context, timeout=settings.handshake_seconds
                )
        except InclavareError as error:
            self._proxy.refused(self._address, error)
            self.end()
            return
        if self._ended:
            self.end()
            return
        self._peer = attested.get_extra_info("peer")
        self._proxy.accepted(self._address, self._peer)
        self._timer = loop.call_later(settings.idle_seconds, self._on_idle)
        self.front.begin()

    def _on_idle(self) -> None:
        seconds = self._proxy.settings.idle_seconds
        if not self.active:
            self._proxy.tell("proxy.idle", address=_text(self._address), seconds=seconds)
            self.end()
            return
        self.active = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_idle)

    def on_eof(self) -> None:
        """One direction has ended."""
        self._directions -= 1
        if self._directions == 0:
            self.end()

    def on_lost(self, exc: Exception | None) -> None:
        """Either end is gone."""
        if not self._ended:
            reason = exc.__cause__ if exc is not None else None
            if isinstance(reason, InclavareError):
                # Whoever counts refusals must not count those that were accepted and broke off.
                broke_off = self._timer is not None and reason.id == "ratls.truncated"
                (self._proxy.broken if broke_off else self._proxy.refused)(self._address, reason)
        self.end()

    def end(self) -> None:
        """Close both ends; what was received is delivered."""
        if not self._ended:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            if self._task is not None and self._task is not asyncio.current_task():
                self._task.cancel()
            self._proxy.ended(self, self._address, self.bytes)
        for side in (self.front, self.back):
            if side.transport is not None and not side.transport.is_closing():
                side.transport.close()

    def abort(self) -> None:
        """At once."""
        for side in (self.front, self.back):
            if side.transport is not None:
                side.transport.abort()


class Proxy:
    """See :class:`Settings`. Its side without TLS must be loopback.

    Args:
        tell: ``proxy.listening``, ``.accepted``, ``.refused``, ``.ended``, ``.full``, ``.idle`` and ``.stopped``, each
            with its fields.

    Raises:
        UsageError: ``proxy.plain.remote``.
    """

    def __init__(self, settings: Settings, tell: Tell) -> None:
        plain = settings.connect if settings.context.server else settings.listen
        if not serving.is_loopback(plain[0]):
            raise UsageError(
                "plain text would leave this machine",
                id="proxy.plain.remote",
                found=plain[0],
                expected="127.0.0.1 or ::1",
                remedy="run the proxy beside the program, in the same network namespace",
            )
        self.settings = settings
        self.tell = tell
        self._pairs: set[_Pair] = set()
        self._under_way = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; returns where.

        Raises:
            UsageError: ``serving.listen``: the address cannot be used.
            InclavareError: the platform does not quote.
        """
        await asyncio.to_thread(self.settings.context.prepare)
        listening = serving.listen(*self.settings.listen)
        self._server = await asyncio.get_running_loop().create_server(self._protocol, sock=listening, backlog=1024)
        host, port, *_ = listening.getsockname()
        return host, port

    async def stop(self) -> None:
        """Take no more connections; those under way have ``drain_seconds``."""
        assert self._server is not None
        self._server.close()
        end = asyncio.get_running_loop().time() + self.settings.drain_seconds
        while self._pairs and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        cut = len(self._pairs)
        for pair in list(self._pairs):
            pair.abort()
        await asyncio.sleep(0)
        self.tell("proxy.stopped", cut=cut)

    def _protocol(self) -> asyncio.BaseProtocol:
        pair = _Pair(self)
        if not self.settings.context.server:
            return pair.front
        return _Counted(self, pair)

    @property
    def full(self) -> bool:
        """As many connections as are allowed, those counted that are not verified yet."""
        return self._under_way + len(self._pairs) >= self.settings.connections

    def begin(self) -> None:
        """A connection that is to be verified."""
        self._under_way += 1

    def done(self) -> None:
        """It is verified, or gone."""
        self._under_way -= 1

    def admit(self, pair: _Pair) -> bool:
        """Whether there is room."""
        if self.full:
            self.tell("proxy.full", connections=self.settings.connections)
            return False
        self._pairs.add(pair)
        return True

    def accepted(self, address: Any, peer: Peer | None) -> None:
        """A pair is complete."""
        self.tell("proxy.accepted", address=_text(address), peer=_describe(peer))

    def refused(self, address: Any, error: InclavareError) -> None:
        """A peer is not who it should be, or cannot be reached."""
        self.tell("proxy.refused", address=_text(address), reason=error.to_dict())

    def broken(self, address: Any, error: InclavareError) -> None:
        """A pair that was complete breaks off."""
        self.tell("proxy.broken", address=_text(address), reason=error.to_dict())

    def ended(self, pair: _Pair, address: Any, count: int) -> None:
        """A pair is gone."""
        if pair in self._pairs:
            self._pairs.discard(pair)
            self.tell("proxy.ended", address=_text(address), bytes=count)


class _Counted(Link):
    """A server's connection; counts towards the limit from its first byte on."""

    def __init__(self, proxy: Proxy, pair: _Pair) -> None:
        super().__init__(
            proxy.settings.context,
            self._verified,
            timeout=proxy.settings.handshake_seconds,
            on_refused=proxy.refused,
        )
        self._proxy, self._pair = proxy, pair
        self._counts = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._proxy.full:
            self._proxy.tell("proxy.full", connections=self._proxy.settings.connections)
            self.closing = self._closed_here = True
            cast("asyncio.Transport", transport).abort()
            return
        self._proxy.begin()
        self._counts = True
        super().connection_made(transport)

    def _verified(self) -> asyncio.BaseProtocol:
        self._uncount()
        return self._pair.front

    def connection_lost(self, exc: Exception | None) -> None:
        self._uncount()
        super().connection_lost(exc)

    def _uncount(self) -> None:
        if self._counts:
            self._counts = False
            self._proxy.done()


async def run(settings: Settings, tell: Tell) -> None:
    """Until SIGTERM or SIGINT.

    Raises:
        UsageError, InclavareError: see :class:`Proxy` and :meth:`Proxy.start`.
    """
    proxy = Proxy(settings, tell)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    host, port = await proxy.start()
    tell(
        "proxy.listening",
        host=host,
        port=port,
        connect=_text(settings.connect),
        attests=settings.context.attests,
        verifies=settings.context.verifies,
    )
    await stopping.wait()
    await proxy.stop()


def _describe(peer: Peer | None) -> dict[str, Any] | None:
    if peer is None:
        return None
    claims = peer.claims
    names = ("tee", "simulated", "debug", "mrenclave", "mrsigner", "isv_prod_id", "isv_svn", "tcb_status")
    return {
        **{name: getattr(claims, name) for name in names},
        "fresh": peer.fresh,
        "evidence_sha256": hashlib.sha256(peer.evidence.quote).hexdigest(),
    }


def _text(address: Any) -> str:
    if not isinstance(address, tuple):
        return str(address)
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unreachable(host: str, port: int, error: OSError) -> PlatformError:
    return PlatformError(
        f"the program at {host}, port {port} cannot be reached",
        id="proxy.connect",
        found=error.strerror or str(error) or type(error).__name__,
        remedy="start it, or correct --connect",
    )

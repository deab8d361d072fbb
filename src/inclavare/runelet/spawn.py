"""Start a guard and a runelet, and wait until the container can be created in the runelet's mount namespace."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import InclavareError, PlatformError
from .job import Job, lock, remove_traces

#: Largest message from the runelet to rune.
_MESSAGE = 1 << 16


def spawn(
    job: Job, *, claim: Callable[[], None], delete: Callable[[], None], kill_all: Callable[[], None]
) -> tuple[dict[str, Any], int]:
    """Fork guard and runelet.

    The caller then enters the namespace and becomes the low-level runtime; the guard takes that process's end before
    the container exists as a failed creation, and takes everything back.

    Args:
        job: the container.
        claim: makes its directory; called in the guard, so that there is no moment in which the caller's end would
            leave it behind. Its :class:`InclavareError` is the caller's.
        delete: ``delete --force`` with the low-level runtime; called in the guard.
        kill_all: kills all processes of the container; called in the guard.

    Returns:
        what the runelet published, and a file descriptor of its mount namespace.

    Raises:
        InclavareError: the claim or the runelet refused; everything has been taken back.
    """
    link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        # The guard is a grandchild, so that a caller that waits for its children never meets it.
        if os.fork() != 0:
            os._exit(0)
        link.close()
        _guard(job, caller, far, claim, delete, kill_all)
    far.close()
    os.close(caller)
    os.waitpid(child, 0)
    data, fds, _, _ = socket.recv_fds(link, _MESSAGE, 1)
    message = json.loads(data) if data else {}
    if "ready" in message and fds:
        # Kept open until exec: the guard sees this process's end through its pidfd, not through this socket.
        return message["ready"], fds[0]
    _await_end(link)
    if "error" in message:
        raise InclavareError.from_dict(message["error"])
    raise PlatformError(
        "the runelet ended before the enclave was ready",
        id="runelet.process.died",
        remedy=f"see {job.node.log_dir}/runelet.log",
    )


def _await_end(link: socket.socket) -> None:
    """Until guard and runelet are gone, so that the id can be used again at once."""
    link.settimeout(15)
    try:
        while link.recv(_MESSAGE):
            pass
    except OSError:
        pass


def _guard(
    job: Job,
    caller: int,
    link: socket.socket,
    claim: Callable[[], None],
    delete: Callable[[], None],
    kill_all: Callable[[], None],
) -> NoReturn:
    """Body of the guard process."""
    claimed = False
    try:
        os.setsid()
        os.chdir("/")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        _detach({caller, link.fileno()})
        try:
            claim()
        except InclavareError as error:
            link.send(json.dumps({"error": error.to_dict()}).encode())
            os._exit(0)
        claimed = True
        held = lock(job.directory)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        runelet = os.fork()
        if runelet == 0:
            os.close(held)
            os.close(caller)
            near.close()
            from .session import main

            main(job, far, link)
        far.close()
        _guard_runelet(job, caller, runelet, near, delete, kill_all)
    except BaseException as error:
        from ..log import EventLog

        EventLog(job.node.log_dir / "runelet.log", container=job.id).event(
            "guard.fault", level="error", reason=f"{type(error).__name__}: {error}"
        )
        if claimed:
            remove_traces(job.places, everything=True)
        os._exit(1)
    os._exit(0)


def _guard_runelet(
    job: Job, caller: int, runelet: int, near: socket.socket, delete: Callable[[], None], kill_all: Callable[[], None]
) -> None:
    from .guard import Guard

    def tell(pid: int) -> None:
        try:
            near.send(str(pid).encode())
        except OSError:
            pass  # the runelet is gone; its pidfd says so next

    Guard(job, caller, runelet, tell=tell, delete=delete, kill_all=kill_all).run()


def _detach(keep: set[int]) -> None:
    """Standard streams to /dev/null, every other descriptor of the caller closed."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    keep = keep | {0, 1, 2}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass

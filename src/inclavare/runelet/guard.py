"""The guard: a small process beside each runelet that sees to it that neither survives the other.

::

    rune ─fork─▶ guard ─fork─▶ runelet ─exec─▶ gocryptfs
      └─exec─▶ crun create|run ──▶ container

The guard watches the caller (rune, which becomes crun), the runelet and the container. A dead runelet means a killed
container; a dead container means the runelet's end; a caller that dies before the container exists means that all is
taken back. It keeps to what ``os`` offers, so that it stays small and can hardly fail. If the guard itself is killed,
the runelet does the same work from its side (:mod:`inclavare.runelet.session`).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from ..log import EventLog
from .job import Job, remove_traces, write_meta

#: While the low-level runtime creates the container its pid file is looked at this often, in milliseconds.
_POLL_MS = 3
#: How long a runelet may take to unmount and wipe before it is killed.
_GRACE_SECONDS = 5.0


class Guard:
    """See the module.

    Args:
        job: the container.
        caller: pidfd of the process that runs the low-level runtime.
        runelet: pid of the runelet, a child of this process.
        tell: sends the container's pid to the runelet.
        delete: ``delete --force`` with the low-level runtime.
        kill_all: kills every process of the container, for one without a pid namespace of its own.
    """

    def __init__(
        self,
        job: Job,
        caller: int,
        runelet: int,
        *,
        tell: Callable[[int], None],
        delete: Callable[[], None],
        kill_all: Callable[[], None],
    ) -> None:
        self._job = job
        self._caller = caller
        self._runelet_pid = runelet
        self._runelet = os.pidfd_open(runelet)
        self._tell = tell
        self._delete = delete
        self._kill_all = kill_all
        self._log = EventLog(job.node.log_dir / "runelet.log", container=job.id, process="guard")

    def run(self) -> None:
        """Watch until nothing is left to watch, then clean up."""
        container = self._await_container()
        if container is None:
            self._log.event("guard.create.abandoned", level="warning")
            self._end_runelet()
            self._delete()
            remove_traces(self._job.places, everything=True)
            return
        interrupted = self._watch(container)
        os.close(container)
        self._end_runelet()
        if self._job.foreground:
            self._await_caller()
        if interrupted:
            self._delete()
        # A foreground run deletes its container when it ends; otherwise state and delete are still to come.
        deleted = not os.path.lexists(f"{self._job.root}/{self._job.id}")
        remove_traces(self._job.places, everything=deleted)
        if not deleted:
            write_meta(self._job.directory, ended=time.time())

    def _await_container(self) -> int | None:
        """A pidfd of the container once it exists; ``None`` if its creation failed or was interrupted."""
        poller = select.poll()
        poller.register(self._caller, select.POLLIN)
        poller.register(self._runelet, select.POLLIN)
        while True:
            gone = {fd for fd, _ in poller.poll(_POLL_MS)}
            container = self._container()
            if container is not None:
                return container
            if gone:
                return None

    def _container(self) -> int | None:
        try:
            pid = int(self._job.pid_file.read_text())
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):
            return None
        self._tell(pid)
        try:
            write_meta(self._job.directory, pid=pid)
        except OSError as error:
            self._log.event("guard.meta.unwritable", level="warning", reason=str(error))
        return pidfd

    def _watch(self, container: int) -> bool:
        """Wait for the end of the container, and bring it about if need be; whether the caller was interrupted."""
        poller = select.poll()
        poller.register(container, select.POLLIN)
        poller.register(self._runelet, select.POLLIN)
        if self._job.foreground:
            poller.register(self._caller, select.POLLIN)
        interrupted = False
        while True:
            gone = {fd for fd, _ in poller.poll()}
            if container in gone:
                # crun's and runc's foreground run outlive the container; one that was killed does not clean up.
                return interrupted
            if self._runelet in gone:
                self._log.event("runelet.process.died", level="error", action="container killed")
                poller.unregister(self._runelet)
                self._kill(container)
            if self._caller in gone and not interrupted:
                self._log.event("rune.run.interrupted", level="warning", action="container killed")
                poller.unregister(self._caller)
                interrupted = True
                self._kill(container)

    def _await_caller(self) -> None:
        poller = select.poll()
        poller.register(self._caller, select.POLLIN)
        poller.poll(_GRACE_SECONDS * 1000)

    def _kill(self, container: int) -> None:
        try:
            signal.pidfd_send_signal(container, signal.SIGKILL)
        except ProcessLookupError:
            pass
        namespaces = (self._job.config.get("linux") or {}).get("namespaces") or []
        if not any(entry.get("type") == "pid" and not entry.get("path") for entry in namespaces):
            self._kill_all()

    def _end_runelet(self) -> None:
        try:
            signal.pidfd_send_signal(self._runelet, signal.SIGTERM)
        except ProcessLookupError:
            pass
        poller = select.poll()
        poller.register(self._runelet, select.POLLIN)
        if not poller.poll(_GRACE_SECONDS * 1000):
            self._log.event("runelet.process.stuck", level="error", action="killed")
            signal.pidfd_send_signal(self._runelet, signal.SIGKILL)
            poller.poll()
        try:
            status = os.waitpid(self._runelet_pid, 0)[1]
        except ChildProcessError:
            status = 1
        if status != 0:
            from ..tee.base import reclaim

            reclaim(self._job.node)

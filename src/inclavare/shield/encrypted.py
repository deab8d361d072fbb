"""An encrypted directory: gocryptfs over a directory of the host, under a key that the host never sees.

gocryptfs runs with an explicit master key that it reads from a pipe (never from argv or a file), so there is no
configuration file and no password to stretch. The adversary who owns the directory sees sizes and times, can delete,
and can put back old versions of whole files; contents and names stay secret and cannot be changed unnoticed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path

from ..errors import PlatformError, ResourceError
from . import mounts
from .secrets import Secret

KEY_SIZE = 32
_DEADLINE_SECONDS = 10.0


class EncryptedDirectory:
    """A mounted encrypted directory; the serving process ends with this one, whatever ends it."""

    def __init__(self, process: subprocess.Popen[bytes], mount_point: str) -> None:
        self._process = process
        self.mount_point = mount_point
        # Read always, so that a long-lived gocryptfs with many warnings never waits for a full pipe; the last ones tell
        # why it ended.
        self._said: deque[bytes] = deque(maxlen=8)
        self._reader = threading.Thread(target=self._listen, name="gocryptfs-stderr", daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            self._said.extend(stream)

    @classmethod
    def start(cls, cipher: Path, mount_point: Path, key: Secret) -> EncryptedDirectory:
        """Begin to mount; :meth:`wait` returns when the directory is usable.

        Args:
            cipher: where ciphertext lies; exists.
            mount_point: exists, empty.
            key: 32 bytes.

        Raises:
            PlatformError: gocryptfs is not installed.
        """
        command = [
            "setpriv", "--pdeathsig", "KILL",
            "gocryptfs", "-notifypid", str(os.getpid()), "-fg", "-q", "-nosyslog",
            "-allow_other", "-suid", "-dev", "-exec", "-masterkey=stdin", "-deterministic-names",
            str(cipher), str(mount_point),
        ]  # fmt: skip
        path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        if shutil.which("gocryptfs", path=path) is None:
            raise PlatformError(
                "gocryptfs is not installed; it encrypts what an enclave container writes",
                id="shield.encrypted.missing",
                remedy="apt-get install gocryptfs fuse3",
            )
        # gocryptfs says by SIGUSR1 that it is ready, and wait() takes the signal off; no thread may be hit by it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": path, "HOME": "/"},
            )
        except FileNotFoundError:
            raise PlatformError(
                "setpriv is not installed; it ties gocryptfs to this process's life",
                id="shield.encrypted.missing",
                remedy="apt-get install util-linux",
            ) from None
        assert process.stdin is not None
        try:
            with process.stdin:
                process.stdin.write(key.reveal().hex().encode())
        except BrokenPipeError:
            pass  # wait() tells why it ended
        return cls(process, str(mount_point))

    @property
    def pid(self) -> int:
        """The serving process."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until the directory is usable; call from the main thread, before another is started.

        Raises:
            ResourceError: gocryptfs ended or did not mount in time.
        """
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while True:
            # Not the mere appearance of the mount: gocryptfs then still looks up a file in it itself, and a request of
            # ours that has it change its user id meanwhile would wait for that thread, and that thread for us.
            ready = signal.sigtimedwait({signal.SIGUSR1}, 0.02)
            if ready is not None and ready.si_pid == self._process.pid:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ResourceError(
                    "gocryptfs could not mount the encrypted layer",
                    id="shield.encrypted.mount",
                    found=self._last_words(),
                    remedy="check that /dev/fuse exists and that the disk under state_dir has room",
                )

    def _last_words(self) -> str:
        self._process.kill()
        self._process.wait()
        self._reader.join(1)
        said = b" ".join(self._said).decode(errors="replace")
        return " ".join(said.split())[-400:] or f"exit {self._process.returncode}"

    def stop(self) -> None:
        """Unmount and end the process. Idempotent."""
        mounts.umount(self.mount_point)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(1)

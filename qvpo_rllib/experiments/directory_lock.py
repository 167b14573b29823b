"""One program at a time writes to a directory.

The lock is the kernel's (`flock`) on a file `.lock` in the directory: it ends with the process,
however that ends, so that nothing has to be cleaned up after a SIGKILL or a power cut. A `.lock`
that was left behind is no obstacle. Readers need no lock.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import ClassVar

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


class DirectoryLock:
    """Keeps other programs from writing to `directory`, until `release` or the process's end.

    Within a process it may be taken several times: it is released with the last of them. Where the
    file system has no locks (some network file systems are mounted without), a warning says so and
    nothing is locked.

    Raises:
        ValueError: another program has it, or the directory cannot be written to. Nothing was
            changed.
    """

    # By the directory's device and inode, since it may be renamed: descriptor, times taken.
    _own: ClassVar[dict[tuple[int, int], tuple[int | None, int]]] = {}

    def __init__(self, directory: Path) -> None:
        self._directory: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        status = os.fstat(self._directory)
        self._key = (status.st_dev, status.st_ino)
        try:
            file, taken = self._own.get(self._key) or (_lock(self._directory, directory), 0)
        except BaseException:
            os.close(self._directory)
            raise
        self._own[self._key] = file, taken + 1

    def release(self) -> None:
        """May be called twice. Leaves no file behind."""
        if self._directory is None:
            return
        file, taken = self._own.pop(self._key)
        if taken > 1:
            self._own[self._key] = file, taken - 1
        elif file is not None:
            if _is_in_place(file, self._directory):  # or the directory was emptied meanwhile
                os.unlink(LOCK_FILE, dir_fd=self._directory)
            os.close(file)
        os.close(self._directory)
        self._directory = None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _lock(directory: int, path: Path) -> int | None:
    """The descriptor that holds the lock; None where there are no locks."""
    while True:
        try:
            # To be written to: locks on NFS ask for that.
            file = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=directory)
        except OSError as error:
            raise ValueError(
                f"{str(path)!r} cannot be written to: {error}. Give another directory, or see to "
                "its permissions."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip()
            os.close(file)
            if error.errno in NO_LOCKS:
                logger.warning(
                    "The file system of %s has no locks (%s): nothing but you keeps two programs "
                    "from writing there at once.",
                    path,
                    error.strerror,
                )
                return None
            raise ValueError(
                f"Another program is writing to {str(path)!r}: {holder or 'an unknown one'}. Two "
                "at once would damage its checkpoints. Wait until that one has ended, end it, or "
                "give another directory. Nothing was changed."
            ) from error
        if _is_in_place(file, directory):
            break
        os.close(file)  # the holder released it in between, and with it the file's name
    os.ftruncate(file, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return file


def _is_in_place(file: int, directory: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(LOCK_FILE, dir_fd=directory))
    return False

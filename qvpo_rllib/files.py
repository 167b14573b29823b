"""Files that survive a crash: written whole or not at all, checked by digest, locked."""

import contextlib
import errno
import fcntl
import importlib.metadata
import io
import json
import logging
import mmap
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash


class FileRecord(NamedTuple):
    """What a whole file has. The digest finds accidents; it is no signature."""

    num_bytes: int
    digest: str  # xxh3-128 of the content, hexadecimal


def record_of(file: Path) -> FileRecord:
    """Reads the file once, memory-mapped."""
    num_bytes = file.stat().st_size
    if num_bytes == 0:
        return FileRecord(0, xxhash.xxh3_128_hexdigest(b""))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return FileRecord(num_bytes, xxhash.xxh3_128_hexdigest(view))


def check_file(file: Path, expected: FileRecord) -> None:
    """Raises `ValueError` unless the file is there, whole and unchanged."""
    advice = "use another checkpoint; nothing was changed."
    if not file.is_file():
        raise ValueError(f"The checkpoint lacks its file {str(file)!r}: {advice}")
    num_bytes = file.stat().st_size
    if num_bytes != expected.num_bytes:
        raise ValueError(
            f"{str(file)!r} is damaged: it has {num_bytes:,} bytes instead of "
            f"{expected.num_bytes:,}; {advice}"
        )
    if record_of(file).digest != expected.digest:
        raise ValueError(f"{str(file)!r} is damaged: its content has changed; {advice}")


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


PACKAGES = ("qvpo_rllib", "torch", "numpy")


class OutputDirectory:
    """A new directory for the files of one experiment; removed again if nothing came into it.

    Args:
        path: must not exist, or be an empty directory.

    Raises:
        ValueError: it holds something, is a file, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        if os.path.lexists(self.path):
            if not self.path.is_dir():
                self._refuse("is a file")
            if any(self.path.iterdir()):
                self._refuse("is a directory with files in it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The directory {str(self.path)!r} cannot be made: {error}. Give another --out."
            ) from error
        if not os.access(self.path, os.W_OK):
            self._refuse("cannot be written to")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"Cannot write results to {str(self.path)!r}: it {what}. Give another --out, which "
            "must not exist yet or be empty; nothing was changed."
        )

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `rows`, which share their keys, as the Parquet file `name`."""
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
        write_atomically(self.path / name, file.getvalue())

    def write_summary(self, name: str, summary: Mapping[str, Any]) -> None:
        """Writes `summary` as the JSON file `name`, with the versions that made it."""
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        record = {**summary, "versions": {"python": platform.python_version(), **versions}}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / name, text.encode())


def sync(directory: Path) -> None:
    """Waits until files and names are on disk, so that a power cut leaves no empty ones."""
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, place: Path) -> None:
    """A hard link at `place`, or a copy where the file system has none."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path`: after a crash it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

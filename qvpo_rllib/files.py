"""Writing, reading, checking and locking files so that a crash or a second program does no harm.

Whatever the package writes goes through `write_atomically` and `write_json`, `replacing` for a
writer that wants a path (Parquet, pictures, video), or `new_directory`. A file is flushed to disk
before it gets its name: neither a crash nor a power cut leaves a part of one, or an empty one.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import mmap
import os
import platform
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, NoReturn

import xxhash

logger = logging.getLogger(__name__)


# --- writing -----------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path`: after a crash it holds the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object, *, allow_nan: bool = True) -> None:
    """Replaces `path` by `value` as JSON; `ValueError` for a NaN unless `allow_nan`."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=allow_nan).encode() + b"\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to, which replaces `path` at the block's end.

    The yielded name has the suffix of `path`, and no other process gets the same. If the block
    raises, `path` is as it was and the new file is deleted.
    """
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_directory(path: Path, temporary: Path) -> Iterator[Path]:
    """Yields the empty directory `temporary`, which is renamed to `path` at the block's end.

    What the block wrote is on disk before the directory gets its name. If the block raises,
    `temporary` is deleted.

    Args:
        path: must not exist, or be an empty directory: `OSError` otherwise.
        temporary: on the same file system; whatever an earlier process left there is deleted.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)


_LOCKS: list[IO[str]] = []  # of this process's scratch directories, held until it ends


def scratch_directory(prefix: str, parent: str | None = None) -> Path:
    """Returns a new directory for temporary files, this process's own until it ends.

    It deletes those of the same prefix that were left by processes of this user that have ended.

    Args:
        parent: the system's directory for temporary files if None.
    """
    for lock in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*/{LOCK_FILE}"):
        with contextlib.suppress(OSError):  # another user's, or a process that lives has it
            status = lock.parent.lstat()
            if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode):
                with lock.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    file = (directory / LOCK_FILE).open("w")
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    _LOCKS.append(file)
    return directory


def sync(directory: Path) -> None:
    """Waits until every file below `directory`, and its name, is on disk."""
    for path in [directory, *directory.rglob("*")]:
        fsync(path)


def fsync(path: Path) -> None:
    """Waits until the file's content, or the names in the directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, place: Path) -> None:
    """Makes a hard link at `place`, or a copy where the file system has none."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


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
                f"The directory {str(self.path)!r} cannot be made: {error}. Give another."
            ) from error
        if not os.access(self.path, os.W_OK):
            self._refuse("cannot be written to")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"Cannot write results to {str(self.path)!r}: it {what}. Give another directory, "
            "which must not exist yet or be empty; nothing was changed."
        )

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes `rows`, which share their keys, as the Parquet file `name`."""
        import pyarrow as pa  # not needed to write a bundle, which uses the rest of this module
        import pyarrow.parquet as pq

        with replacing(self.path / name) as temporary:
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), temporary)

    def write_summary(self, name: str, summary: Mapping[str, object]) -> None:
        """Writes `summary` as the JSON file `name`, with the versions that made it."""
        versions = installed_versions("qvpo_rllib", "torch", "numpy")
        write_json(self.path / name, {**summary, "versions": versions}, allow_nan=False)


def installed_versions(*packages: str) -> dict[str, str | None]:
    """Returns the versions of "python" and of `packages`; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


# --- reading -----------------------------------------------------------------------------------

KINDS = {dict: "an object", list: "a list", int: "a whole number", float: "a number", str: "a text"}


def read_json(
    file: Path,
    kind: type,
    advice: str,
    keys: Mapping[str, type] | None = None,
    entries: tuple[str, Mapping[str, type]] | None = None,
) -> Any:
    """Returns the content of a JSON file of a run or an experiment.

    Args:
        kind: the type that the content must have.
        advice: how to go on if it is damaged.
        keys: what an object must have, and of which types.
        entries: one of the keys, and what each of its entries must have.

    Raises:
        ValueError: the file cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
        _check_kind("it", content, kind, keys or {})
        if entries is not None:
            name, of_an_entry = entries
            found = content[name]
            for entry in found.values() if isinstance(found, dict) else found:
                _check_kind(f"an entry of its {name!r}", entry, dict, of_an_entry)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(file.parent)!r} cannot be read: its {file.name} is damaged ({error}). {advice}"
        ) from error
    return content


def _check_kind(what: str, content: Any, kind: type, keys: Mapping[str, type]) -> None:
    """Raises `ValueError` unless `content` is of the type `kind` and has the `keys`."""
    allowed: Any = (int, float) if kind is float else kind
    if not isinstance(content, allowed) or isinstance(content, bool):
        raise ValueError(f"{what} is {repr(content)[:60]} and must be {KINDS[kind]}")
    if missing := [name for name in keys if name not in content]:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    for name, expected in keys.items():
        _check_kind(f"{what} has {name!r}, which", content[name], expected, {})


# --- checking ----------------------------------------------------------------------------------


class FileRecord(NamedTuple):
    """Length and digest of a file's content. The digest finds accidents; it is no signature."""

    num_bytes: int
    digest: str  # xxh3-128 of the content, hexadecimal


def record_of(file: Path) -> FileRecord:
    """Returns the record of `file`, which is read once, memory-mapped."""
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


# --- locking -----------------------------------------------------------------------------------

LOCK_FILE = ".lock"
# A disk's troubles, as against mistakes of a program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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
        """Gives the lock back and leaves no file behind. May be called twice."""
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
    """Returns the descriptor that holds the lock; None where there are no locks."""
    while True:
        try:
            # Opened for writing, as locks on NFS demand.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(LOCK_FILE, flags, 0o666, dir_fd=directory)
        except OSError as error:
            raise ValueError(
                f"{str(path)!r} cannot be written to: {error}. Give another directory, or see to "
                f"its permissions and to what its {LOCK_FILE!r} is."
            ) from error
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # what we write harms it
            os.close(file)
            raise ValueError(
                f"{str(path)!r} cannot be locked: its {LOCK_FILE!r} has another name too, or is no "
                "plain file. Delete it if it is not yours; nothing was changed."
            )
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

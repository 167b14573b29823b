"""Length and digest of a file: by them a checkpoint's damage is found before it is loaded."""

import mmap
from pathlib import Path
from typing import NamedTuple

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

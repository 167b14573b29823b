"""Builds `native.cpp` with the machine's C++ compiler, once for each processor, and loads it."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
# Multiplication and addition may be one operation, as in every library of matrix products. Nothing
# else of the arithmetic is loosened: a NaN stays a NaN.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "clang++", "c++")  # or what $CXX names

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "qvpo_pack": [_POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER],
    "qvpo_sample": [
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
        *(_INT, _INT, _INT, _POINTER, _INT),
    ],
    "qvpo_min_q": [_POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _INT, _POINTER, _INT],
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, built if this machine has not yet.

    Raises:
        OSError: no compiler, or it failed, or nothing can be written.
    """
    library = ctypes.CDLL(str(_built()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.qvpo_lanes.restype = _INT
    return library


def cache_dir() -> Path:
    """Where built libraries stay: $XDG_CACHE_HOME/qvpo_rllib, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qvpo_rllib"


def _built() -> Path:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    compiler = next((path for path in map(shutil.which, names) if path), None)
    if compiler is None:
        raise OSError(f"no C++ compiler: looked for {', '.join(names)}")
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *_what_decides(compiler)])).hexdigest()
    library = cache_dir() / f"native-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Processes that build at once each move their own file into place.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[:300]}")
            os.replace(built, library)
    return library


def _what_decides(compiler: str) -> list[bytes]:
    """What a built library depends on beside its source: a home folder may be many machines'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return [part.encode() for part in (" ".join(FLAGS), compiler, platform.machine(), features)]
